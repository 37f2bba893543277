"""A console's streams: positions, scrollback, flow control both ways, ends."""

from __future__ import annotations

import asyncio
import gc
import re

import pytest

from avmm.console.console import Console, check_scrollback
from avmm.errors import ConfigError, HostError
from fakes.mmio_driver import settle

SCROLLBACK = 1000


class Guest:
    """At the other end of a console; `room_bytes` is what it takes of input."""

    def __init__(self, room_bytes: int = 0, *, can_wait: bool = False) -> None:
        self.room_bytes = room_bytes
        self.taken = b""
        self.sizes: list[tuple[int, int]] = []
        self.releases = 0
        self.console = Console(
            "console",
            self._put,
            scrollback_bytes=SCROLLBACK,
            resize=lambda *size: self.sizes.append(size),
            release=self._release if can_wait else None,
        )

    def take(self, count_bytes: int) -> None:
        """Read that much more."""
        self.room_bytes += count_bytes
        self.console.feed()

    def _put(self, data: memoryview) -> int:
        count = min(len(data), self.room_bytes)
        self.taken += data[:count]
        self.room_bytes -= count
        return count

    def _release(self) -> None:
        self.releases += 1


async def test_a_pair_is_of_asyncios_own_kind() -> None:
    reader, writer = Guest().console.open()
    assert isinstance(reader, asyncio.StreamReader)
    assert isinstance(writer, asyncio.StreamWriter)
    assert writer.get_extra_info("name") == "console"
    assert not writer.can_write_eof()
    writer.close()
    await writer.wait_closed()


async def test_every_reader_has_its_own_position() -> None:
    guest = Guest()
    first, _ = guest.console.open()
    guest.console.receive(b"one\ntwo\n")
    late, _ = guest.console.open()
    fresh, _ = guest.console.open(scrollback=False)
    assert await first.readline() == b"one\n"
    guest.console.receive(b"three\n")
    assert await late.readuntil(b"two\n") == b"one\ntwo\n"
    assert await fresh.readline() == b"three\n"
    assert await first.readline() == b"two\n"
    guest.console.close()
    assert await asyncio.gather(first.read(), late.read(), fresh.read()) == [
        b"three\n",
        b"three\n",
        b"",
    ]


async def test_expect_goes_on_behind_its_last_match_whatever_readers_read() -> None:
    guest = Guest()
    reader, _ = guest.console.open()
    waiting = asyncio.create_task(guest.console.expect(rb"log(\w)n:"))
    guest.console.receive(b"boot: lo")
    await settle()
    assert not waiting.done()
    guest.console.receive(b"gin: ok ok")
    match = await waiting
    assert (match[0], match[1]) == (b"login:", b"i")
    assert await reader.readexactly(6) == b"boot: "
    await guest.console.expect(b"ok")
    await guest.console.expect(re.compile(b"ok"))
    with pytest.raises(TimeoutError, match="the console ends with b'boot: login: ok ok'"):
        await guest.console.expect(b"ok", timeout=0)


async def test_a_match_outlives_the_scrollback() -> None:
    guest = Guest()
    guest.console.receive(b"needle")
    match = await guest.console.expect(b"needle")
    guest.console.receive(b"x" * 3000)
    assert match[0] == b"needle"
    assert guest.console.end == 3006


async def test_the_scrollback_keeps_the_last_bytes() -> None:
    guest = Guest()
    guest.console.receive(bytes(range(256)) * 10)
    assert guest.console.scrollback == (bytes(range(256)) * 10)[-SCROLLBACK:]
    reader, _ = guest.console.open()
    assert await reader.read(5000) == guest.console.scrollback
    assert reader.lost_bytes == 0


async def test_a_reader_that_never_reads_loses_the_oldest_and_is_told() -> None:
    guest = Guest()
    idle, _ = guest.console.open(limit=100)
    busy, _ = guest.console.open(limit=100)
    seen = 0
    for _ in range(100):
        guest.console.receive(b"y" * 100)
        seen += len(await busy.read(1000))
    assert seen == 10_000
    assert guest.console.statistics().lost_bytes == 0  # it is counted when the reader goes on
    guest.console.receive(b"end")
    guest.console.close()
    got = await idle.read()
    assert got.endswith(b"yend")
    assert len(got) <= 300 + SCROLLBACK  # what it held, and the scrollback
    assert idle.lost_bytes == 10_003 - len(got)
    assert busy.lost_bytes == 0
    assert guest.console.statistics().lost_bytes == idle.lost_bytes


async def test_a_slow_reader_that_keeps_up_with_the_scrollback_loses_nothing() -> None:
    guest = Guest()
    reader, _ = guest.console.open(limit=10)
    data = bytes(range(250)) * 4
    guest.console.receive(data)
    got = b""
    while len(got) < len(data):
        got += await reader.read(7)
    assert got == data
    assert reader.lost_bytes == 0


async def test_the_guest_waits_for_a_reader_that_holds_it() -> None:
    guest = Guest(can_wait=True)
    reader, writer = guest.console.open(hold=True, limit=100)
    while not guest.console.held:
        guest.console.receive(b"z" * 100)
    size = guest.console.end
    assert size <= 400
    assert len(await reader.readexactly(size)) == size
    await settle()
    assert not guest.console.held
    assert guest.releases == 1
    guest.console.receive(b"z" * 300)
    assert guest.console.held
    writer.close()
    assert not guest.console.held
    assert guest.releases == 2


async def test_a_reader_cannot_hold_a_guest_that_cannot_wait() -> None:
    with pytest.raises(ConfigError, match="cannot wait"):
        Guest().console.open(hold=True)


async def test_drain_waits_until_the_guest_has_taken_all() -> None:
    guest = Guest(room_bytes=3)
    _, writer = guest.console.open()
    writer.write(b"hello")
    draining = asyncio.create_task(writer.drain())
    await settle()
    assert (guest.taken, draining.done()) == (b"hel", False)
    guest.take(1)
    await settle()
    assert not draining.done()
    guest.take(1)
    await draining
    assert guest.taken == b"hello"


async def test_write_buffer_limits_let_a_writer_go_ahead() -> None:
    guest = Guest()
    _, writer = guest.console.open()
    writer.transport.set_write_buffer_limits(high=10, low=2)
    writer.write(b"x" * 10)
    await writer.drain()
    writer.write(b"x")
    draining = asyncio.create_task(writer.drain())
    guest.take(8)
    await settle()
    assert not draining.done()
    guest.take(1)
    await draining
    with pytest.raises(ValueError, match="high"):
        writer.transport.set_write_buffer_limits(high=1, low=2)


async def test_bytes_of_one_write_stay_together() -> None:
    guest = Guest()
    _, one = guest.console.open()
    _, two = guest.console.open()
    one.write(b"a" * 50)
    two.write(b"b" * 50)
    writing = asyncio.create_task(guest.console.write(b"c" * 50))
    await settle()
    for _ in range(15):
        guest.take(10)
    await writing
    await asyncio.gather(one.drain(), two.drain())
    assert guest.taken == b"a" * 50 + b"b" * 50 + b"c" * 50


async def test_closing_a_writer_still_gives_the_guest_its_bytes() -> None:
    guest = Guest()
    reader, writer = guest.console.open()
    writer.write(b"last")
    writer.close()
    closed = asyncio.create_task(writer.wait_closed())
    await settle()
    assert not closed.done()
    guest.console.receive(b"not for this one")
    guest.take(4)
    await closed
    assert guest.taken == b"last"
    assert await reader.read() == b""
    assert guest.console.statistics().readers == 0


async def test_aborting_forgets_them() -> None:
    guest = Guest(room_bytes=2)
    _, writer = guest.console.open()
    writer.write(b"last")
    writer.transport.abort()
    await writer.wait_closed()
    guest.take(10)
    assert guest.taken == b"la"
    with pytest.raises(ConnectionResetError):
        await writer.drain()


async def test_the_guests_end_ends_what_waits() -> None:
    guest = Guest()
    reader, writer = guest.console.open()
    expecting = asyncio.create_task(guest.console.expect(b"never"))
    writing = asyncio.create_task(guest.console.write(b"unread"))
    writer.write(b"unread")
    draining = asyncio.create_task(writer.drain())
    reading = asyncio.create_task(reader.read())
    await settle()
    guest.console.receive(b"last words")
    guest.console.close()
    assert await reading == b"last words"
    with pytest.raises(HostError, match="last words"):
        await expecting
    with pytest.raises(HostError, match="ended"):
        await writing
    with pytest.raises(ConnectionResetError, match="before it took"):
        await draining
    with pytest.raises(ConnectionResetError):
        await writer.drain()
    await writer.wait_closed()


async def test_after_the_guests_end_there_is_what_it_wrote() -> None:
    guest = Guest()
    guest.console.receive(b"last words")
    guest.console.close()
    reader, writer = guest.console.open()
    assert await reader.read() == b"last words"
    writer.write(b"x")
    with pytest.raises(ConnectionResetError):
        await writer.drain()
    with pytest.raises(HostError, match="last words"):
        await guest.console.write(b"x")
    await guest.console.expect(b"words")


async def test_a_write_that_the_guest_had_taken_is_no_error_at_its_end() -> None:
    guest = Guest(room_bytes=10)
    _, writer = guest.console.open()
    writer.write(b"taken")
    await writer.drain()
    writing = asyncio.create_task(guest.console.write(b"taken"))
    await settle()
    guest.console.close()
    await writing
    assert guest.taken == b"takentaken"


async def test_a_cancelled_write_is_still_sent() -> None:
    guest = Guest()
    writing = asyncio.create_task(guest.console.write(b"whole"))
    await settle()
    writing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await writing
    guest.take(100)
    assert guest.taken == b"whole"


async def test_a_pair_that_was_dropped_is_closed_and_holds_nobody() -> None:
    guest = Guest(can_wait=True)
    reader, writer = guest.console.open(hold=True, limit=10)
    guest.console.receive(b"w" * 500)
    assert guest.console.held
    del reader
    gc.collect()
    await settle()
    assert guest.console.held  # the writer may be of use alone, and has the reader
    del writer
    gc.collect()
    await settle()
    assert not guest.console.held
    assert guest.console.statistics().readers == 0


async def test_sizes_are_passed_on_and_checked() -> None:
    guest = Guest()
    guest.console.resize(80, 25)
    assert guest.sizes == [(80, 25)]
    for size in ((-1, 25), (80, 65536)):
        with pytest.raises(ConfigError, match="no terminal's size"):
            guest.console.resize(*size)


def test_a_scrollback_has_a_size() -> None:
    assert check_scrollback("64K", "scrollback") == 65536
    for size in (0, "2G", "lots"):
        with pytest.raises(ConfigError, match="scrollback"):
            check_scrollback(size, "scrollback")
