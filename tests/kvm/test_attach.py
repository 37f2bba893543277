"""`avmm attach` as a user has it: two terminals on one guest."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys
import termios
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

Assemble = Callable[[str], Path]

ECHO = """
    putc '>'
1:  inb 0x3fd
    test $1, %al
    jz 1b
    inb 0x3f8
    cmp $'q', %al
    je 2f
    mov $0x3f8, %dx
    out %al, %dx
    jmp 1b
2:  poweroff
"""
HANG_S = 60


@pytest.fixture(autouse=True)
def runtime_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(p for p in sys.path if p))
    return tmp_path


@contextmanager
def running(kernel: Path, *more: str) -> Iterator[subprocess.Popen[bytes]]:
    """`avmm run --name echo`, until its guest has said something."""
    command = [sys.executable, "-m", "avmm", "run", "--kernel", str(kernel), "--name", "echo"]
    with subprocess.Popen(
        [*command, "--memory", "4M", "--cmdline", "", *more],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None
        try:
            assert process.stdout.read(1) == b">"
            yield process
        finally:
            process.kill()


class Attached:
    """`avmm attach echo` on a pseudo-terminal, whose messages come there too."""

    def __init__(self) -> None:
        self.user, self.line = pty.openpty()
        self.before = termios.tcgetattr(self.line)
        self.seen = b""
        self.process = subprocess.Popen(
            [sys.executable, "-m", "avmm", "attach", "echo"],
            stdin=self.line,
            stdout=self.line,
            stderr=self.line,
            start_new_session=True,
        )

    def sees(self, text: bytes) -> None:
        """Read until it comes."""
        while text not in self.seen:
            self.seen += os.read(self.user, 1000)
        self.seen = self.seen.split(text, 1)[1]

    def types(self, text: bytes) -> None:
        os.write(self.user, text)

    def ends(self) -> int:
        """The exit status; the terminal is as it was."""
        status = self.process.wait(HANG_S)
        assert termios.tcgetattr(self.line) == self.before
        return status

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.user)
        os.close(self.line)


@pytest.fixture
def terminals() -> Iterator[Callable[[], Attached]]:
    made: list[Attached] = []

    def attach() -> Attached:
        made.append(Attached())
        return made[-1]

    yield attach
    for one in made:
        one.close()


def test_two_terminals_share_a_guest_and_leave_it(
    tiny_guest: Assemble, terminals: Callable[[], Attached], runtime_dir: Path
) -> None:
    with running(tiny_guest(ECHO)) as process:
        one, two = terminals(), terminals()
        for terminal in (one, two):
            terminal.sees(b"Ctrl-] detaches")
            terminal.sees(b">")
        one.types(b"hello\x03")
        two.sees(b"hello\x03")
        one.sees(b"hello\x03")
        one.types(b"bye\x1d")
        one.sees(b"detached from echo")
        assert one.ends() == 0
        two.sees(b"bye")
        assert process.poll() is None
        two.types(b"q")
        two.sees(b"echo: poweroff")
        assert two.ends() == 0
        assert process.wait(HANG_S) == 0
    assert list((runtime_dir / "avmm").iterdir()) == []


def test_the_end_of_avmm_run_is_told_and_is_a_failure(
    tiny_guest: Assemble, terminals: Callable[[], Attached]
) -> None:
    with running(tiny_guest(ECHO), "--stop-grace-s", "0") as process:
        killed = terminals()
        killed.sees(b">")
        process.send_signal(signal.SIGTERM)
        killed.sees(b"echo: killed")
        assert killed.ends() == 1
    with running(tiny_guest(ECHO)) as process:
        lost = terminals()
        lost.sees(b">")
        process.kill()
        lost.sees(b"echo: the connection was lost")
        assert lost.ends() == 1


def test_streams_can_be_attached_and_an_unknown_name_is_bad_input(tiny_guest: Assemble) -> None:
    with running(tiny_guest(ECHO)):
        attach = [sys.executable, "-m", "avmm", "attach"]
        missing = subprocess.run([*attach, "other"], capture_output=True, check=False)
        assert missing.returncode == 2
        assert b"running are echo" in missing.stderr
        piped = subprocess.run([*attach, "echo"], input=b"\x1dq", capture_output=True, check=False)
        assert (piped.returncode, piped.stdout) == (0, b">\x1d")
