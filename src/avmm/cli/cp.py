"""avmm cp: files between this host and the guest of a named microVM."""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import AsyncIterator

from avmm.agent.client import READY_TIMEOUT_S
from avmm.agent.files import Files
from avmm.cli.guest import agent_of
from avmm.cli.main import EXIT_ERROR
from avmm.errors import ConfigError
from avmm.loop import on_thread
from avmm.loop import run as run_loop

_REMOTE = re.compile(r"([A-Za-z0-9_][A-Za-z0-9_.-]*):(.*)", re.DOTALL)
_CHUNK_BYTES = 1 << 20
_STDIO = "-"

_EPILOG = """\
One of FROM and TO is NAME:PATH, a file of the guest of `avmm run --name NAME`; the other one a file
of the host, or - for stdin or stdout. A path that is a folder or ends in / gets the file's name.
The new file takes its place only when all of it is there.
"""


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of `avmm cp`."""
    parser.epilog = _EPILOG
    parser.add_argument(
        "--timeout", type=float, default=READY_TIMEOUT_S, metavar="S",
        help="seconds to wait for a guest that boots (%(default)g)",
    )  # fmt: skip
    parser.add_argument("source", metavar="FROM")
    parser.add_argument("target", metavar="TO")
    parser.set_defaults(command=run)


def run(options: argparse.Namespace) -> int:
    """Copy one file."""
    source, target = _REMOTE.fullmatch(options.source), _REMOTE.fullmatch(options.target)
    if (source is None) == (target is None):
        raise ConfigError("cp", "avmm cp: one of FROM and TO has to be NAME:PATH")
    try:
        if target is not None:
            work = _up(options.source, target[1], target[2], options.timeout)
        else:
            assert source is not None
            work = _down(source[1], source[2], options.target, options.timeout)
        run_loop(work)
    except OSError as e:
        print(f"avmm: {e.filename or 'cp'}: {e.strerror or e}", file=sys.stderr)
        return EXIT_ERROR
    return 0


async def _up(source: str, name: str, path: str, timeout_s: float) -> None:
    async with agent_of(name, timeout_s) as agent:
        if source == _STDIO:
            await agent.files.write(path, _stdin())
            return
        if path.endswith("/") or path == "" or await _is_dir(agent.files, path):
            path = f"{path.rstrip('/')}/{_basename(source)}"
        await agent.files.upload(source, path)


async def _down(name: str, path: str, target: str, timeout_s: float) -> None:
    async with agent_of(name, timeout_s) as agent:
        if target == _STDIO:
            async for data in agent.files.chunks(path):
                await on_thread(_write_stdout, data)
            return
        await agent.files.download(path, _inside(target, path))


async def _is_dir(files: Files, path: str) -> bool:
    try:
        return (await files.stat(path)).is_dir
    except FileNotFoundError:
        return False


def _basename(path: str) -> str:
    return os.path.basename(os.path.normpath(path))


def _inside(target: str, path: str) -> str:
    if target.endswith("/") or os.path.isdir(target):
        return os.path.join(target, _basename(path))
    return target


def _write_stdout(data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(sys.stdout.fileno(), view) :]


async def _stdin() -> AsyncIterator[bytes]:
    while data := await on_thread(os.read, sys.stdin.fileno(), _CHUNK_BYTES):
        yield data
