"""avmm exec: a command in the guest of a named microVM, as if it ran here."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import signal
import sys
from collections.abc import Iterator

from avmm.agent.client import READY_TIMEOUT_S
from avmm.agent.process import PIPE, ExecOptions, Process
from avmm.cli.guest import agent_of
from avmm.cli.terminal import Input, Output, is_terminal, raw_mode, watched_size
from avmm.errors import ConfigError
from avmm.loop import run as run_loop

EXIT_NOT_EXECUTABLE = 126
EXIT_NOT_FOUND = 127

_EPILOG = """\
Options stand before NAME. Exit status: the command's own; 128+N when signal N ended it; 126 and
127 when it cannot be started or is not there; 1 and 2 as for every command of avmm.
"""


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of `avmm exec`."""
    parser.epilog = _EPILOG
    parser.add_argument("-t", "--tty", action="store_true", help="give the command a terminal")
    parser.add_argument(
        "-e", "--env", action="append", default=[], metavar="NAME=VALUE",
        help="a variable for its environment",
    )  # fmt: skip
    parser.add_argument("-w", "--cwd", metavar="DIR", help="the folder to run in; / by default")
    parser.add_argument(
        "-u", "--user", metavar="USER[:GROUP]", help="names or numbers to run as; root by default"
    )
    parser.add_argument(
        "--timeout", type=float, default=READY_TIMEOUT_S, metavar="S",
        help="seconds to wait for a guest that boots (%(default)g)",
    )  # fmt: skip
    parser.add_argument("name", metavar="NAME", help="of avmm run --name NAME")
    parser.add_argument("argv", metavar="-- CMD", nargs=argparse.REMAINDER, help="the command")
    parser.set_defaults(command=run)


def run(options: argparse.Namespace) -> int:
    """Run the command; its exit status."""
    argv = options.argv[1:] if options.argv[:1] == ["--"] else options.argv
    if not argv:
        raise ConfigError("exec", "avmm exec: give a command, behind NAME and --")
    wanted = _wanted(options)
    try:
        return run_loop(_run(options.name, options.timeout, argv, wanted))
    except OSError as e:
        print(f"avmm: {e.filename or argv[0]}: {e.strerror}", file=sys.stderr)
        return EXIT_NOT_FOUND if isinstance(e, FileNotFoundError) else EXIT_NOT_EXECUTABLE


def _wanted(options: argparse.Namespace) -> ExecOptions:
    """Raises ConfigError for a variable without a value."""
    wanted: ExecOptions = {"stdin": PIPE, "tty": options.tty, "cwd": options.cwd}
    for item in options.env:
        if "=" not in item:
            raise ConfigError("exec", f"--env {item}: NAME=VALUE is needed")
    wanted["env_extra"] = dict(item.split("=", 1) for item in options.env)
    if options.user is not None:
        user, _, group = options.user.partition(":")
        wanted["user"] = int(user) if user.isdecimal() else user
        if group:
            wanted["group"] = int(group) if group.isdecimal() else group
    return wanted


async def _run(name: str, timeout_s: float, argv: list[str], wanted: ExecOptions) -> int:
    terminal = bool(wanted["tty"]) and is_terminal()
    async with agent_of(name, timeout_s) as agent, await agent.exec(argv, **wanted) as process:
        with _raw_terminal(process) if terminal else _forwarded_signals(process):
            return await _attend(process)


async def _attend(process: Process) -> int:
    """Carry bytes until the command has ended and all it wrote is shown; the exit status."""
    assert process.stdin is not None
    assert process.stdout is not None
    stdin = asyncio.create_task(_forward(process.stdin))
    try:
        await asyncio.gather(
            _show(sys.stdout.fileno(), process.stdout, process),
            _show(sys.stderr.fileno(), process.stderr, process),
        )
        code = await process.wait()
    finally:
        stdin.cancel()
        await asyncio.gather(stdin, return_exceptions=True)
    return code if code >= 0 else 128 - code


async def _show(fd: int, reader: asyncio.StreamReader | None, process: Process) -> None:
    if reader is not None:
        with Output(fd, process.close) as output:
            await output.show(reader)


async def _forward(stdin: asyncio.StreamWriter) -> None:
    async def send(data: bytes) -> None:
        stdin.write(data)
        await stdin.drain()

    await Input(sys.stdin.fileno(), send, None).forward()
    with contextlib.suppress(ConnectionError):
        stdin.write_eof()


@contextlib.contextmanager
def _raw_terminal(process: Process) -> Iterator[None]:
    """Every key goes to the guest's terminal, which also follows this one's size."""

    def resize(columns: int, rows: int) -> None:
        process.resize(rows, columns)

    with raw_mode(sys.stdin.fileno()), watched_size(resize):
        yield


@contextlib.contextmanager
def _forwarded_signals(process: Process) -> Iterator[None]:
    """The command gets what would end this one, were it run here."""
    loop = asyncio.get_running_loop()

    def forward(number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            process.signal_group(number)

    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
    for number in numbers:
        loop.add_signal_handler(number, forward, number)
    try:
        yield
    finally:
        for number in numbers:
            loop.remove_signal_handler(number)
