"""A console on a socket: what clients are shown, what they send, and how it ends for them."""

from __future__ import annotations

import asyncio
import stat
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from avmm.console import server as server_module
from avmm.console.console import Console
from avmm.console.server import ConsoleServer
from avmm.console.wire import LOST, SIZE, VERSION, Kind, frame, read_frame
from avmm.errors import ConfigError, HostError
from fakes.mmio_driver import eventually


class Guest:
    """At the other end of a console; takes all input while `takes`."""

    def __init__(self) -> None:
        self.typed = b""
        self.takes = True
        self.size: tuple[int, int] | None = None
        self.console = Console("console", self._put, scrollback_bytes=200_000, resize=self._resize)

    def _put(self, data: memoryview) -> int:
        if not self.takes:
            return 0
        self.typed += data
        return len(data)

    def _resize(self, columns: int, rows: int) -> None:
        self.size = columns, rows


class Client:
    """Attached."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    async def sees(self, size: int) -> bytes:
        """So much of the console, in whatever frames it comes."""
        data = b""
        while len(data) < size:
            found = await read_frame(self.reader)
            assert found is not None
            assert found[0] == Kind.DATA
            data += found[1]
        return data

    async def rest(self) -> list[tuple[int, bytes]]:
        found = []
        while (one := await read_frame(self.reader)) is not None:
            found.append(one)
        return found


@asynccontextmanager
async def attached(path: Path) -> AsyncIterator[Client]:
    reader, writer = await asyncio.open_unix_connection(path)
    assert await read_frame(reader) == (Kind.HELLO, VERSION)
    try:
        yield Client(reader, writer)
    finally:
        writer.close()


async def test_every_client_gets_the_scrollback_and_then_what_comes(tmp_path: Path) -> None:
    guest, path = Guest(), tmp_path / "c"
    guest.console.receive(b"before ")
    async with ConsoleServer(guest.console, path):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        async with attached(path) as one, attached(path) as two:
            for client in (one, two):
                assert await client.sees(7) == b"before "
            guest.console.receive(b"after")
            for client in (one, two):
                assert await client.sees(5) == b"after"
    assert not path.exists()


async def test_clients_type_and_tell_their_size(tmp_path: Path) -> None:
    guest, path = Guest(), tmp_path / "c"
    async with ConsoleServer(guest.console, path), attached(path) as client:
        client.writer.write(frame(Kind.SIZE, SIZE.pack(80, 25)) + frame(Kind.DATA, b"ls\n"))
        await eventually(lambda: guest.typed == b"ls\n")
        assert guest.size == (80, 25)


async def test_a_client_that_goes_leaves_the_others(tmp_path: Path) -> None:
    guest, path = Guest(), tmp_path / "c"
    async with ConsoleServer(guest.console, path), attached(path) as stays:
        async with attached(path) as goes:
            goes.writer.write(frame(Kind.DATA, b"typed last"))
        await eventually(lambda: guest.console.statistics().readers == 1)
        assert guest.typed == b"typed last"
        guest.console.receive(b"on")
        assert await stays.sees(2) == b"on"


async def test_the_guests_end_is_told_behind_its_last_words(tmp_path: Path) -> None:
    guest, path = Guest(), tmp_path / "c"
    async with ConsoleServer(guest.console, path), attached(path) as client:
        guest.console.receive(b"last words")
        guest.console.end_reason = "poweroff: done"
        guest.console.close()
        assert await client.sees(10) == b"last words"
        assert await client.rest() == [(Kind.END, b"poweroff: done")]


async def test_clients_are_told_of_the_end_when_the_server_ends_with_it(tmp_path: Path) -> None:
    guest, path = Guest(), tmp_path / "c"
    async with ConsoleServer(guest.console, path):
        reader, writer = await asyncio.open_unix_connection(path)
        await read_frame(reader)
        guest.console.close()
    assert await read_frame(reader) == (Kind.END, b"")
    assert await read_frame(reader) is None
    writer.close()


async def test_the_end_of_the_server_ends_the_connection(tmp_path: Path) -> None:
    guest, path = Guest(), tmp_path / "c"
    async with ConsoleServer(guest.console, path):
        reader, writer = await asyncio.open_unix_connection(path)
        await read_frame(reader)
    assert await read_frame(reader) is None
    writer.close()
    assert guest.console.statistics().readers == 0


async def test_a_client_that_reads_nothing_loses_bytes_and_holds_nobody(tmp_path: Path) -> None:
    guest, path = Guest(), tmp_path / "c"
    async with ConsoleServer(guest.console, path), attached(path) as slow, attached(path) as quick:
        for _ in range(40):
            guest.console.receive(b"x" * 50_000)
            assert len(await quick.sees(50_000)) == 50_000
        guest.console.close()
        frames = await slow.rest()
        seen = sum(len(payload) for kind, payload in frames if kind == Kind.DATA)
        lost = sum(LOST.unpack(payload)[0] for kind, payload in frames if kind == Kind.LOST)
        assert seen + lost == 2_000_000
        assert lost > 0


@pytest.mark.parametrize(
    "data",
    [b"\x02\xff\xff\xff\xff", frame(Kind.SIZE, b"abc"), frame(Kind.END), b"\x63\0\0\0\0", b"\x02"],
    ids=["long", "short size", "not a client's", "unknown", "cut off"],
)
async def test_nonsense_ends_that_client_alone(tmp_path: Path, data: bytes) -> None:
    guest, path = Guest(), tmp_path / "c"
    async with ConsoleServer(guest.console, path), attached(path) as good:
        async with attached(path) as bad:
            bad.writer.write(data)
            bad.writer.write_eof()
            assert await bad.rest() == []
        good.writer.write(frame(Kind.DATA, b"fine"))
        await eventually(lambda: guest.typed == b"fine")


async def test_a_guest_that_reads_nothing_keeps_no_input_of_clients_that_went(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server_module, "_GRACE_S", 0)
    guest, path = Guest(), tmp_path / "c"
    guest.takes = False
    async with ConsoleServer(guest.console, path):
        async with attached(path) as client:
            client.writer.write(frame(Kind.DATA, b"never read"))
            await client.writer.drain()
        await eventually(lambda: guest.console.statistics().readers == 0)
        guest.takes = True
        await guest.console.write(b"x")
    assert guest.typed == b"x"


async def test_more_clients_than_there_may_be_are_told_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server_module, "CLIENTS_MAX", 1)
    guest, path = Guest(), tmp_path / "c"
    async with ConsoleServer(guest.console, path), attached(path):
        reader, writer = await asyncio.open_unix_connection(path)
        assert await read_frame(reader) == (Kind.END, b"too many are attached")
        writer.close()


async def test_a_path_that_cannot_be_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path / "none" / "c", tmp_path / "file"):
        with pytest.raises((ConfigError, HostError), match=r"Socket"):
            async with ConsoleServer(Guest().console, path):
                pass
