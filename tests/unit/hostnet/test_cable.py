"""Cables in memory: what passes, what is lost, and who waits."""

from __future__ import annotations

import asyncio
import gc
import os
import random
import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from avmm.errors import ConfigError
from avmm.hostnet.cable import (
    FRAME_MAX_BYTES,
    QUEUE_MIN_BYTES,
    CableEnd,
    FrameStream,
    LinkStatistics,
    make_cable,
)
from avmm.native import ffi, lib
from fakes.frames import frame


class Stream(FrameStream):
    """An end that is open until it is closed."""

    def __init__(self, end: CableEnd) -> None:
        super().__init__(end, "Stream")
        self.open = True
        end.set_up(True)

    def close(self) -> None:
        self.open = False
        self._no_longer_kept()

    def _is_over(self) -> bool:
        return not self.open

    def _keeps_waker(self) -> bool:
        return self.open

    def _check(self) -> None:
        pass


class Pair:
    """Two streams at the ends of one cable."""

    def __init__(self, queue_bytes: int = QUEUE_MIN_BYTES) -> None:
        ends = make_cable(queue_bytes)
        self.ends = ends
        self.one, self.other = Stream(ends[0]), Stream(ends[1])

    def __enter__(self) -> Pair:
        return self

    def __exit__(self, *_: object) -> None:
        self.one.close()
        self.other.close()


async def turns(count: int = 10) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


async def test_frames_go_both_ways_in_order() -> None:
    with Pair() as pair:
        for n in range(600):
            await pair.one.send(frame(payload=b"%d" % n))
        await pair.other.send(frame(payload=b"back"))
        assert [await pair.other.receive() for _ in range(600)] == [
            frame(payload=b"%d" % n) for n in range(600)
        ]
        assert await pair.one.receive() == frame(payload=b"back")


async def test_a_receiver_is_woken() -> None:
    with Pair() as pair:
        receiving = asyncio.create_task(pair.other.receive())
        await turns()
        assert not receiving.done()
        assert pair.one.send_nowait(frame())
        assert await receiving == frame()


async def test_receive_many_takes_what_is_there() -> None:
    with Pair() as pair:
        await pair.one.send_many([frame(payload=b"%d" % n) for n in range(5)])
        assert len(await pair.other.receive_many(3)) == 3
        assert len(await pair.other.receive_many()) == 2
        receiving = asyncio.create_task(pair.other.receive_many())
        await turns()
        pair.other.close()
        assert await receiving == []


async def test_an_iteration_ends_with_its_end_and_loses_nothing() -> None:
    with Pair() as pair:
        await pair.one.send_many([frame(payload=b"%d" % n) for n in range(3)])
        pair.other.close()
        assert [f async for f in pair.other] == [frame(payload=b"%d" % n) for n in range(3)]
        assert await pair.other.receive() == b""


async def test_each_of_several_receivers_gets_other_frames() -> None:
    with Pair() as pair:
        tasks = [asyncio.create_task(pair.other.receive()) for _ in range(3)]
        await turns()
        sent = [frame(payload=b"%d" % n) for n in range(3)]
        await pair.one.send_many(sent)
        assert sorted(await asyncio.gather(*tasks)) == sent


async def test_a_cancelled_receive_loses_no_frame() -> None:
    with Pair() as pair:
        receiving = asyncio.create_task(pair.other.receive())
        await turns()
        pair.one.send_nowait(frame())
        receiving.cancel()
        await asyncio.gather(receiving, return_exceptions=True)
        assert await pair.other.receive() == frame()


async def test_who_sends_waits_for_room() -> None:
    with Pair() as pair:
        big = frame(payload=bytes(60_000))
        sent = 0
        while pair.one.send_nowait(big):
            sent += 1
        assert sent * len(big) <= QUEUE_MIN_BYTES
        sending = asyncio.create_task(pair.one.send(big))
        await turns()
        assert not sending.done()
        for _ in range(sent):
            assert await pair.other.receive() == big
        await sending
        assert await pair.other.receive() == big
        assert pair.one.statistics().lost_full == 0


async def test_send_many_waits_and_goes_on_where_it_was() -> None:
    with Pair() as pair:
        frames = [frame(payload=os.urandom(random.Random(n).randrange(9000))) for n in range(300)]
        sending = asyncio.create_task(pair.one.send_many(frames))
        received = []
        while len(received) < len(frames):
            received += await pair.other.receive_many(7)
        await sending
        assert received == frames


async def test_a_sender_is_let_go_when_the_other_end_goes_down() -> None:
    with Pair() as pair:
        big = frame(payload=bytes(60_000))
        while pair.one.send_nowait(big):
            pass
        sending = asyncio.create_task(pair.one.send(big))
        await turns()
        pair.ends[1].set_up(False)
        await sending
        assert pair.one.statistics().lost_down == 1
        assert not pair.one.is_up


async def test_nothing_is_kept_for_an_end_that_was_down() -> None:
    with Pair() as pair:
        await pair.one.send(frame())
        pair.ends[1].set_up(False)
        await pair.one.send(frame())
        pair.ends[1].set_up(True)
        assert pair.other.receive_nowait() is None
        assert pair.one.is_up


@pytest.mark.parametrize("size_bytes", [0, 13, FRAME_MAX_BYTES + 1])
async def test_what_is_no_frame_is_refused(size_bytes: int) -> None:
    with Pair() as pair:
        for attempt in (
            pair.one.send(bytes(size_bytes)),
            pair.one.send_many([frame(), bytes(size_bytes)]),
        ):
            with pytest.raises(ConfigError, match="14 to 65557 bytes") as caught:
                await attempt
            assert caught.value.kind == "frame"
        assert pair.other.receive_nowait() is None


async def test_the_largest_frame_passes() -> None:
    with Pair() as pair:
        await pair.one.send(bytes(FRAME_MAX_BYTES))
        assert len(await pair.other.receive()) == FRAME_MAX_BYTES


async def test_any_bytes_may_be_sent() -> None:
    with Pair() as pair:
        await pair.one.send(bytearray(frame()))
        await pair.one.send_many([memoryview(frame()), frame()])
        assert await pair.other.receive_many() == [frame()] * 3


async def test_statistics_tell_both_ends() -> None:
    with Pair() as pair:
        await pair.one.send_many([frame(), frame()])
        await pair.other.receive()
        sender, receiver = pair.one.statistics(), pair.other.statistics()
        assert (sender.sent_frames, sender.sent_bytes) == (2, 2 * len(frame()))
        assert (receiver.received_frames, receiver.queued_frames) == (2, 0)
        await pair.one.send(frame())
        assert pair.other.statistics().queued_frames == 1
        assert isinstance(sender, LinkStatistics)


async def test_descriptors_go_with_the_last_who_waits() -> None:
    before = len(os.listdir("/proc/self/fd"))
    pair = Pair()
    receiving = asyncio.create_task(pair.other.receive())
    await turns()
    assert len(os.listdir("/proc/self/fd")) == before + 1
    pair.other.close()
    assert await receiving == b""
    assert len(os.listdir("/proc/self/fd")) == before


def test_two_loops_in_two_threads_share_a_cable() -> None:
    pair = Pair()
    frames = [frame(payload=b"%d" % n + bytes(1000)) for n in range(2000)]

    async def echo() -> None:
        async for each in pair.other:
            await pair.other.send(each)

    async def talk() -> list[bytes]:
        received: list[bytes] = []

        async def receive() -> None:
            while len(received) < len(frames):
                received.extend(await pair.one.receive_many())

        async with asyncio.TaskGroup() as group:
            group.create_task(receive())
            group.create_task(pair.one.send_many(frames))
        pair.other.close()
        pair.one.close()
        return received

    thread = threading.Thread(target=asyncio.run, args=(echo(),))
    thread.start()
    received = asyncio.run(talk())
    thread.join()
    assert received == frames


async def test_another_loop_is_told() -> None:
    with Pair() as pair:
        receiving = asyncio.create_task(pair.other.receive())
        await turns()

        def elsewhere() -> None:
            with pytest.raises(ConfigError, match="another event loop"):
                asyncio.run(pair.other.receive())

        await asyncio.to_thread(elsewhere)
        receiving.cancel()


@pytest.mark.parametrize("queue_bytes", [0, QUEUE_MIN_BYTES - 1, 1 << 40])
def test_a_queue_has_a_sensible_size(queue_bytes: int) -> None:
    with pytest.raises(ConfigError, match="queue_bytes"):
        make_cable(queue_bytes)


def test_a_cable_lives_as_long_as_an_end() -> None:
    one, other = make_cable()
    one.set_up(True)
    other.set_up(True)
    del other
    gc.collect()
    lengths = ffi.new("uint32_t[1]", [20])
    assert lib.av_cable_send(one.native, ffi.NULL, bytes(20), lengths, 1) == 1


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(st.booleans(), st.integers(14, 70) | st.integers(14, FRAME_MAX_BYTES)),
        max_size=300,
    )
)
def test_the_queue_gives_back_what_it_took(steps: list[tuple[bool, int]]) -> None:
    """Against a list: whatever the sizes, and wherever its end is."""
    one, other = make_cable(QUEUE_MIN_BYTES)
    one.set_up(True)
    other.set_up(True)
    model: list[bytes] = []
    room = ffi.new("uint8_t[]", FRAME_MAX_BYTES)
    lengths = ffi.new("uint32_t[1]")
    for number, (is_send, size) in enumerate(steps):
        if is_send:
            data = number.to_bytes(4, "little") * (size // 4 + 1)
            lengths[0] = size
            if lib.av_cable_send(one.native, ffi.NULL, data, lengths, 1):
                model.append(data[:size])
            else:
                assert sum(map(len, model)) + 2 * FRAME_MAX_BYTES > QUEUE_MIN_BYTES // 2
        else:
            count = lib.av_cable_take(other.native, room, FRAME_MAX_BYTES, lengths, 1)
            assert count == bool(model)
            if model:
                assert ffi.buffer(room, lengths[0])[:] == model.pop(0)
    assert other.statistics().queued_frames == len(model)
