"""avmm attach: this terminal as one more console of a microVM that runs elsewhere."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import signal
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path

from avmm.cli import instance
from avmm.cli.main import EXIT_ERROR
from avmm.cli.terminal import ESCAPE_NAME, Input, Output, is_terminal, raw_mode, watched_size
from avmm.console.wire import LOST, PAYLOAD_MAX_BYTES, SIZE, VERSION, Kind, frame, read_frame
from avmm.errors import HostError
from avmm.loop import run as run_loop
from avmm.machine.reason import ExitKind

_EPILOG = f"""\
Shows the console's last output and then what comes, and sends what is typed; {ESCAPE_NAME}
detaches, and the guest goes on. Several may be attached at once. A reboot ends it too.

Exit status: 0 detached, or the guest ended by poweroff or reboot; 1 it ended otherwise, or the
connection was lost; 2 there is no such microVM.
"""
_START_S = 5.0
_RETRY_S = 0.05
_WELL = tuple(kind.value for kind in (ExitKind.POWEROFF, ExitKind.REBOOT, ExitKind.STOPPED))


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of `avmm attach`."""
    parser.epilog = _EPILOG
    parser.add_argument(
        "name", metavar="NAME", help="of avmm run --name, or the path of a console's socket"
    )
    parser.add_argument(
        "--serial", action="store_true", help="its serial port, when it has a console on virtio too"
    )
    parser.set_defaults(command=run)


def run(options: argparse.Namespace) -> int:
    """Stay attached until the user or the guest ends it."""
    if "/" in options.name:
        path = Path(options.name)
    else:
        found = instance.find(options.name)
        path = (
            found.serial_path
            if options.serial and found.serial_path.exists()
            else (found.console_path)
        )
    return run_loop(_attach(path, options.name))


async def _attach(path: Path, name: str) -> int:
    reader, writer = await _connect(path)
    try:
        if await read_frame(reader) != (Kind.HELLO, VERSION):
            raise HostError("attach", op=f"Console {path}", remedy="another version of avmm")
        return await _Attachment(name, reader, writer).run()
    finally:
        writer.close()


async def _connect(path: Path) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A microVM that has just got its name needs a moment until it listens."""
    loop = asyncio.get_running_loop()
    until = loop.time() + _START_S
    while True:
        try:
            return await asyncio.open_unix_connection(path, limit=2 * PAYLOAD_MAX_BYTES)
        except OSError as e:
            waits = isinstance(e, FileNotFoundError | ConnectionRefusedError)
            if not waits or not path.parent.exists() or loop.time() > until:
                raise HostError(
                    "attach",
                    op="Connecting to the console",
                    errno=e.errno,
                    path=str(path),
                    remedy="it may be about to start, or to end",
                ) from e
        await asyncio.sleep(_RETRY_S)


class _Attachment:
    """From HELLO to the end."""

    def __init__(
        self, name: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self._name = name
        self._reader = reader
        self._writer = writer
        self._detached = asyncio.Event()

    async def run(self) -> int:
        """The exit status."""
        terminal = is_terminal()
        if terminal:
            self._say(f"attached to {self._name}; {ESCAPE_NAME} detaches")
        source = Input(sys.stdin.fileno(), self._send, self._detached.set if terminal else None)
        with contextlib.ExitStack() as stack:
            if terminal:
                stack.enter_context(raw_mode(sys.stdin.fileno()))
                stack.enter_context(watched_size(self._send_size))
            output = stack.enter_context(Output(sys.stdout.fileno(), self._detached.set))
            loop = asyncio.get_running_loop()
            for number in (signal.SIGINT, signal.SIGTERM):  # the terminal has to be restored
                loop.add_signal_handler(number, self._detached.set)
                stack.callback(loop.remove_signal_handler, number)
            typing = asyncio.create_task(source.forward())
            showing = asyncio.create_task(self._show(output.write))
            detaching = asyncio.create_task(self._detached.wait())
            try:
                await asyncio.wait((showing, detaching), return_when=asyncio.FIRST_COMPLETED)
                with contextlib.suppress(ConnectionError):
                    await self._writer.drain()  # what was typed before the escape key
            finally:
                for task in (typing, showing, detaching):
                    task.cancel()
                await asyncio.gather(typing, showing, detaching, return_exceptions=True)
        return self._conclude(showing)

    def _conclude(self, showing: asyncio.Task[str | None]) -> int:
        if showing.cancelled():
            self._say(f"detached from {self._name}")
            return 0
        reason = showing.result()
        self._say(f"{self._name}: {reason or 'the connection was lost'}")
        return 0 if reason is not None and reason.split(":")[0] in _WELL else EXIT_ERROR

    async def _show(self, write: Callable[[bytes], Awaitable[None]]) -> str | None:
        """Until the guest's end; its reason, None when the connection just ended."""
        while (found := await read_frame(self._reader)) is not None:
            kind, payload = found
            if kind == Kind.DATA:
                await write(payload)
            elif kind == Kind.LOST:
                self._say(f"{LOST.unpack(payload)[0]} bytes were lost: this terminal is too slow")
            elif kind == Kind.END:
                return payload.decode(errors="replace")
        return None

    async def _send(self, data: bytes) -> None:
        self._writer.write(frame(Kind.DATA, data))
        await self._writer.drain()

    def _send_size(self, columns: int, rows: int) -> None:
        self._writer.write(frame(Kind.SIZE, SIZE.pack(columns, rows)))

    def _say(self, text: str) -> None:
        # In raw mode a line's end needs both.
        print(f"avmm: {text}", end="\r\n" if sys.stderr.isatty() else "\n", file=sys.stderr)
