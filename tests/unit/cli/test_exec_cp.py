"""avmm exec and avmm cp, run as a user would, against the agent's own program."""

from __future__ import annotations

import asyncio
import os
import pty
import signal
import sys
import termios
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import pytest_asyncio

from avmm.cli import instance
from avmm.cli.main import main
from avmm.cli.run import _link_socket, placed
from avmm.machine.config import Config
from avmm.virtio.devices.vsock import Vsock
from fakes.agent_program import running

NAME = "box"


@dataclass
class Done:
    code: int
    out: bytes
    err: bytes


class Shell:
    """Runs avmm where an instance NAME has the sockets of a microVM with an agent."""

    def __init__(self, folder: Path) -> None:
        self.env = {**os.environ, "XDG_RUNTIME_DIR": str(folder)}

    async def start(self, *arguments: str, **streams: int) -> asyncio.subprocess.Process:
        pipe = asyncio.subprocess.PIPE
        streams = {"stdin": pipe, "stdout": pipe, "stderr": pipe, **streams}
        return await asyncio.create_subprocess_exec(
            sys.executable, "-m", "avmm", *arguments, env=self.env, **streams
        )

    async def __call__(self, *arguments: str, input: bytes = b"") -> Done:
        process = await self.start(*arguments)
        out, err = await process.communicate(input)
        assert process.returncode is not None
        return Done(process.returncode, out, err)


@pytest_asyncio.fixture
async def avmm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Shell]:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    with running(tmp_path / "agent.sock") as program, instance.claimed(NAME) as box:
        relays: set[asyncio.Task[None]] = set()

        async def relay(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            task = asyncio.current_task()
            assert task is not None
            relays.add(task)
            assert await reader.readline() == b"CONNECT 1024\n"
            other_reader, other_writer = await asyncio.open_unix_connection(program.path)
            writer.write(b"OK 5\n")
            await asyncio.gather(_copy(reader, other_writer), _copy(other_reader, writer))

        server = await asyncio.start_unix_server(relay, box.vsock_path)
        yield Shell(tmp_path)
        server.close()
        await asyncio.gather(*relays, return_exceptions=True)
        await server.wait_closed()


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
    except ConnectionError:
        pass
    finally:
        writer.close()


async def test_a_command_runs_as_if_it_were_here(avmm: Shell) -> None:
    done = await avmm(
        *("exec", "-e", "A=1", "-w", "/proc", NAME, "--"),
        *("sh", "-c", "cat; echo $A; pwd >&2; exit 3"),
        input=b"given ",
    )
    assert (done.code, done.out, done.err) == (3, b"given 1\n", b"/proc\n")


async def test_the_dashes_may_be_left_out(avmm: Shell) -> None:
    assert (await avmm("exec", NAME, "echo", "-n", "x")).out == b"x"


async def test_what_ends_badly_says_how(avmm: Shell) -> None:
    assert (await avmm("exec", NAME, "--", "sh", "-c", "kill -9 $$")).code == 128 + 9
    missing = await avmm("exec", NAME, "--", "no-such-command")
    assert (missing.code, missing.out) == (127, b"")
    assert missing.err == b"avmm: no-such-command: No such file or directory\n"
    assert (await avmm("exec", NAME, "--", "/etc/passwd")).code == 126


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("exec", NAME), "give a command"),
        (("exec", "other", "--", "ls"), "running are box"),
        (("exec", "-e", "A", NAME, "ls"), "NAME=VALUE"),
        (("exec", NAME, "ls"), "start it with --agent"),
        (("cp", "a", "b"), "NAME:PATH"),
        (("cp", f"{NAME}:a", f"{NAME}:b"), "NAME:PATH"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: tuple[str, ...],
    message: str,
) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    with instance.claimed(NAME):
        assert main(arguments) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1


async def test_a_signal_here_reaches_the_command_there(avmm: Shell) -> None:
    process = await avmm.start("exec", NAME, "--", "sh", "-c", "echo up; exec sleep 1000")
    assert process.stdout is not None
    assert await process.stdout.readline() == b"up\n"
    process.send_signal(signal.SIGTERM)
    await process.communicate()
    assert process.returncode == 128 + signal.SIGTERM


async def test_a_terminal_here_is_one_there(avmm: Shell) -> None:
    primary, secondary = pty.openpty()
    termios.tcsetwinsize(secondary, (33, 101))
    before = termios.tcgetattr(secondary)
    loop = asyncio.get_running_loop()
    text, news = bytearray(), asyncio.Event()

    def readable() -> None:
        text.extend(os.read(primary, 65536))
        news.set()

    async def shows(what: bytes) -> None:
        async with asyncio.timeout(20):
            while what not in text:
                news.clear()
                await news.wait()

    loop.add_reader(primary, readable)
    try:
        ends = {"stdin": secondary, "stdout": secondary, "stderr": secondary}
        script = ("sh", "-c", "echo up; read x; stty size; exit 4")
        process = await avmm.start("exec", "-t", NAME, "--", *script, **ends)
        await shows(b"up\r\n")
        os.write(primary, b"\n")
        await shows(b"33 101\r\n")
        assert await process.wait() == 4
        assert termios.tcgetattr(secondary) == before
    finally:
        loop.remove_reader(primary)
        os.close(primary)
        os.close(secondary)


async def test_files_go_both_ways(avmm: Shell, tmp_path: Path) -> None:
    there, here = tmp_path / "there", tmp_path / "here"
    there.mkdir()
    here.mkdir()
    data = os.urandom(700_000)
    (here / "file").write_bytes(data)
    (here / "file").chmod(0o711)
    assert (await avmm("cp", str(here / "file"), f"{NAME}:{there}")).code == 0
    assert (there / "file").read_bytes() == data
    assert (there / "file").stat().st_mode & 0o777 == 0o711
    assert (await avmm("cp", f"{NAME}:{there}/file", f"{here}/")).code == 0
    assert (await avmm("cp", "-", f"{NAME}:{there}/piped", input=data)).code == 0
    assert (there / "piped").read_bytes() == data
    assert (await avmm("cp", f"{NAME}:{there}/piped", "-")).out == data
    missing = await avmm("cp", f"{NAME}:{there}/none", str(here / "none"))
    assert missing.code == 1
    assert missing.err == f"avmm: {there}/none: No such file or directory\n".encode()


def test_a_name_brings_a_socket_for_the_other_commands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    with instance.claimed(NAME) as box:
        with_agent = placed(Config(kernel="k", agent=True), box)
        assert with_agent.vsock == Vsock(uds=str(box.vsock_path))
        _link_socket(with_agent, box)
        assert not box.vsock_path.is_symlink()
        own = Config(kernel="k", agent=True, vsock=Vsock(uds=str(tmp_path / "mine")))
        assert placed(own, box) is own
        _link_socket(own, box)
        assert box.vsock_path.readlink() == tmp_path / "mine"
