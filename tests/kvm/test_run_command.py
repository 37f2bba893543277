"""`avmm run` as a user has it: exit codes, streams, the terminal, signals."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys
import termios
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

Assemble = Callable[[str], Path]

ECHO = """
1:  inb 0x3fd
    test $1, %al
    jz 1b
    inb 0x3f8
    mov $0x3f8, %dx
    out %al, %dx
    jmp 1b
"""


def command(kernel: Path, *more: str) -> list[str]:
    base = [sys.executable, "-m", "avmm", "run", "--kernel", str(kernel)]
    return [*base, "--memory", "4M", "--cmdline", "", *more]


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}


def run(kernel: Path, *more: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        command(kernel, *more),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        env=environment(),
        check=False,
    )


@pytest.mark.parametrize(
    ("guest", "code", "message"),
    [
        ("putc 'p'\npoweroff", 0, b""),
        ("putc 'p'\nreboot", 0, b""),
        ("putc 'p'\noutb 0x505, 1\n1: jmp 1b", 1, b"avmm: crash: the guest's kernel panicked"),
    ],
)
def test_the_exit_code_says_how_the_guest_ended(
    tiny_guest: Assemble, guest: str, code: int, message: bytes
) -> None:
    result = run(tiny_guest(guest))
    assert (result.returncode, result.stdout) == (code, b"p")
    assert result.stderr.startswith(message)
    assert bool(result.stderr) == bool(message)


def test_what_a_guest_said_before_it_had_a_console_on_virtio_is_shown(tiny_guest: Assemble) -> None:
    result = run(tiny_guest("putc 'p'\npoweroff"), "--console")
    assert (result.returncode, result.stdout) == (0, b"p")


def test_a_disk_that_cannot_be_is_bad_input(tiny_guest: Assemble, tmp_path: Path) -> None:
    disk = tmp_path / "odd.img"
    disk.write_bytes(bytes(1000))
    result = run(tiny_guest("poweroff"), "--disk", str(disk))
    assert result.returncode == 2
    assert result.stderr.decode() == (f"avmm: Disk {disk}: 1000 bytes is not a multiple of 512\n")


def test_statistics_come_as_json(tiny_guest: Assemble) -> None:
    result = run(tiny_guest("putc 'p'\npoweroff"), "--stats")
    assert b'"reason": "poweroff' in result.stderr


def test_a_reboot_can_start_the_guest_again(tiny_guest: Assemble) -> None:
    with subprocess.Popen(
        command(tiny_guest("putc 'r'\nreboot"), "--on-reboot", "restart"),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment(),
    ) as process:
        assert process.stdout is not None
        assert process.stdout.read(3) == b"rrr"
        process.kill()


def test_without_a_terminal_bytes_are_streamed_and_sigint_ends_it(tiny_guest: Assemble) -> None:
    with subprocess.Popen(
        command(tiny_guest(ECHO)), stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment()
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(b"\x1dhello\x03")
        process.stdin.close()
        assert process.stdout.read(7) == b"\x1dhello\x03"
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        assert process.wait() == 130


@dataclass
class Terminal:
    """A pseudo-terminal; `user` is the end with the keyboard."""

    user: int
    line: int
    before: list[object]

    def read(self, count: int) -> bytes:
        data = b""
        while len(data) < count:
            data += os.read(self.user, count - len(data))
        return data


@pytest.fixture
def terminal() -> Iterator[Terminal]:
    user, line = pty.openpty()
    yield Terminal(user, line, termios.tcgetattr(line))
    os.close(user)
    os.close(line)


def attached(kernel: Path, terminal: Terminal) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        command(kernel, "--stop-grace-s", "0"),
        stdin=terminal.line,
        stdout=terminal.line,
        stderr=subprocess.PIPE,
        env=environment(),
        start_new_session=True,
    )


def test_the_escape_key_ends_the_guest_and_the_terminal_is_as_before(
    tiny_guest: Assemble, terminal: Terminal
) -> None:
    with attached(tiny_guest("putc '>'" + ECHO), terminal) as process:
        assert terminal.read(1) == b">"
        assert not termios.tcgetattr(terminal.line)[3] & (termios.ICANON | termios.ECHO)
        os.write(terminal.user, b"typed\x03")
        assert terminal.read(6) == b"typed\x03"
        os.write(terminal.user, b"\x1d")
        assert process.wait() == 130
    assert termios.tcgetattr(terminal.line) == terminal.before


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_restore_the_terminal(
    tiny_guest: Assemble, terminal: Terminal, number: signal.Signals
) -> None:
    with attached(tiny_guest("putc '>'" + ECHO), terminal) as process:
        assert terminal.read(1) == b">"
        process.send_signal(number)
        assert process.wait() == (130 if number == signal.SIGINT else 1)
    assert termios.tcgetattr(terminal.line) == terminal.before


def test_poweroff_restores_the_terminal(tiny_guest: Assemble, terminal: Terminal) -> None:
    with attached(tiny_guest("putc '>'\npoweroff"), terminal) as process:
        assert terminal.read(1) == b">"
        assert process.wait() == 0
    assert termios.tcgetattr(terminal.line) == terminal.before
