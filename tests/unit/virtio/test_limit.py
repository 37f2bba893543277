"""Rate limits of devices. No test relies on time: a rate is so low that nothing more comes within
the test, or whatever waits gets through in the end."""

from __future__ import annotations

import dataclasses
import functools
import os
import random
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from avmm.block.objects import RamDisk
from avmm.errors import ConfigError
from avmm.mem.guest import GuestMemory
from avmm.units import KIB, MIB
from avmm.virtio.devices import blk_source
from avmm.virtio.devices.blk import BlkDevice, Disk, build
from avmm.virtio.devices.blk_source import AsyncDisk
from avmm.virtio.devices.net import Tap
from avmm.virtio.devices.nic import Nic
from avmm.virtio.devtype import DeviceContext
from avmm.virtio.interrupt import Interrupts
from avmm.virtio.limit import RateLimit
from avmm.virtio.transport.mmio import MmioTransport
from fakes.blk_driver import (
    FLUSH,
    GET_ID,
    IN,
    IOERR,
    OK,
    OUT,
    UNSUPP,
    WRITE_ZEROES,
    BlkDriver,
)
from fakes.mmio_driver import MmioDriver, eventually, settle
from fakes.net_rig import HEADER, FakeTap, Plugged, net_rig, nic_rig
from fakes.virtio_rig import MEMORY_BYTES, Rig, virtio_rig

NEVER = 1
"""A second: what is owed at this rate is not paid within a test."""


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(4 * MIB))
    return path


@pytest.fixture(params=[0, 1], ids=["loop", "thread"])
def io_threads(request: pytest.FixtureRequest) -> int:
    return int(request.param)


@asynccontextmanager
async def disk_rig(
    image: Path, io_threads: int, limit: RateLimit | None, **options: object
) -> AsyncIterator[tuple[Rig[BlkDevice], BlkDriver]]:
    config = Disk(str(image), engine="threads", limit=limit, **options)  # type: ignore[arg-type]
    async with virtio_rig(lambda context: build(config, context), io_threads=io_threads) as rig:
        await rig.driver.start()
        yield rig, BlkDriver(rig)
        assert rig.errors == []


def throttled(rig: Rig[BlkDevice]) -> int:
    return rig.device.counters()["throttled"]


async def waits(rig: Rig[BlkDevice], times: int = 1) -> None:
    await eventually(lambda: throttled(rig) >= times)


async def test_only_a_burst_of_requests_passes_until_the_limit_is_lifted(
    image: Path, io_threads: int
) -> None:
    limit = RateLimit(ops=NEVER, ops_burst=3, bps="1T")
    async with disk_rig(image, io_threads, limit) as (rig, blk):
        slots = [blk.submit(OUT, 8 * at, b"x" * 512) for at in range(8)]
        blk.kick()
        await rig.driver.used(0, 3)
        await waits(rig)
        blk.kick()
        await settle()
        assert [blk.status(slot) for slot in slots] == [OK] * 3 + [0xFF] * 5
        assert (throttled(rig), rig.device.counters()["writes"]) == (1, 3)
        rig.device.set_limit(None)
        await rig.driver.used(0, 5)
        assert {blk.status(slot) for slot in slots} == {OK}
        assert throttled(rig) == 1


async def test_a_request_larger_than_the_burst_passes_and_the_next_one_waits(
    image: Path, io_threads: int
) -> None:
    limit = RateLimit(bps=NEVER, bps_burst=1)
    async with disk_rig(image, io_threads, limit) as (rig, blk):
        assert await blk.request(IN, read_bytes=16 * KIB) == (OK, bytes(16 * KIB))
        slot = blk.submit(FLUSH)
        blk.kick()
        await waits(rig)
        assert blk.status(slot) == 0xFF
        rig.device.set_limit(RateLimit(bps="1G"))
        await rig.driver.used(0)
        assert blk.status(slot) == OK


async def test_of_a_request_that_fails_its_checks_no_bytes_are_charged(
    image: Path, io_threads: int
) -> None:
    limit = RateLimit(bps=NEVER, bps_burst=1)
    async with disk_rig(image, io_threads, limit) as (rig, blk):
        assert (await blk.request(IN, 1 << 40, read_bytes=16 * KIB))[0] == IOERR
        assert (await blk.request(OUT, 0, bytes(1000)))[0] == IOERR
        assert (await blk.request(99, 0, bytes(512)))[0] == UNSUPP
        assert (await blk.request(GET_ID, read_bytes=16 * KIB))[0] == OK
        assert (await blk.request(FLUSH, 0, bytes(16 * KIB)))[0] == OK
        assert throttled(rig) == 0
        assert (await blk.request(IN, read_bytes=512))[0] == OK
        blk.submit(99)
        blk.kick()
        await waits(rig)


async def test_but_it_is_an_operation(image: Path, io_threads: int) -> None:
    limit = RateLimit(ops=NEVER, ops_burst=3)
    async with disk_rig(image, io_threads, limit) as (rig, blk):
        slots = [blk.submit(99) for _ in range(8)]
        blk.kick()
        await rig.driver.used(0, 3)
        await waits(rig)
        assert [blk.status(slot) for slot in slots] == [UNSUPP] * 3 + [0xFF] * 5


async def test_what_waits_goes_on_by_itself(image: Path, io_threads: int) -> None:
    limit = RateLimit(ops=2000, ops_burst=1, bps="100M", bps_burst=1)
    async with disk_rig(image, io_threads, limit) as (rig, blk):
        for _ in range(2):
            slots = [blk.submit(IN, 8 * at, read_bytes=4 * KIB) for at in range(12)]
            blk.kick()
            await rig.driver.used(0, 12)
            assert {blk.status(slot) for slot in slots} == {OK}
        assert throttled(rig) >= 12


async def test_a_limit_is_set_on_a_device_at_work(image: Path, io_threads: int) -> None:
    async with disk_rig(image, io_threads, None) as (rig, blk):
        assert await blk.request(IN, read_bytes=512) == (OK, bytes(512))
        assert rig.device.limit is None
        limit = RateLimit(ops=NEVER, ops_burst=1)
        rig.device.set_limit(limit)
        assert rig.device.limit == limit
        assert await blk.request(IN, read_bytes=512) == (OK, bytes(512))
        slot = blk.submit(IN, read_bytes=512)
        blk.kick()
        await waits(rig)
        assert blk.status(slot) == 0xFF


async def test_a_reset_does_not_wait_and_forgives_nothing(image: Path, io_threads: int) -> None:
    limit = RateLimit(bps=NEVER, bps_burst=1)
    async with disk_rig(image, io_threads, limit) as (rig, blk):
        assert await blk.request(OUT, 0, b"x" * 512) == (OK, b"")
        for times in (1, 2):
            slot = blk.submit(OUT, 0, b"y" * 512)
            blk.kick()
            await waits(rig, times)
            await rig.driver.start()
            assert blk.status(slot) == 0xFF
        slot = blk.submit(IN, read_bytes=512)
        blk.kick()
        await waits(rig, 3)
        rig.device.set_limit(None)
        await rig.driver.used(0)
        assert rig.memory.read(slot + 0x1000, 512) == b"x" * 512


async def test_a_pause_does_not_wait_and_what_waited_goes_on_after_it(
    image: Path, io_threads: int
) -> None:
    limit = RateLimit(ops=NEVER, ops_burst=1)
    async with disk_rig(image, io_threads, limit) as (rig, blk):
        slots = [blk.submit(OUT, 0, b"x" * 512) for _ in range(4)]
        blk.kick()
        await waits(rig)
        for times in (2, 3):
            await rig.device.quiesce()
            await rig.device.resume()
            await waits(rig, times)
        await rig.device.quiesce()
        rig.device.set_limit(None)
        await settle()
        assert [blk.status(slot) for slot in slots] == [OK] + [0xFF] * 3
        await rig.device.resume()
        await rig.driver.used(0, 4)
        assert {blk.status(slot) for slot in slots} == {OK}


async def test_queues_of_a_disk_share_its_limit(image: Path) -> None:
    limit = RateLimit(ops=2000, ops_burst=1)
    async with disk_rig(image, 1, limit, queues=2) as (rig, blk):
        slots = [blk.submit(IN, read_bytes=512) for _ in range(12)]
        other = blk.submit(IN, read_bytes=512, queue=1)
        blk.kick(0)
        blk.kick(1)
        await eventually(lambda: blk.status(other) == OK)
        await rig.driver.used(0, 12)
        used = [queue.statistics().used for queue in rig.device.queues]
        assert used == [12, 1]
        assert {blk.status(slot) for slot in slots} == {OK}


async def test_a_queue_that_stops_waiting_leaves_its_turn_to_others(image: Path) -> None:
    limit = RateLimit(ops=NEVER, ops_burst=1)
    async with disk_rig(image, 1, limit, queues=2) as (rig, blk):
        blk.submit(IN, read_bytes=512)
        blk.submit(IN, read_bytes=512)
        blk.kick(0)
        await waits(rig, 1)
        slot = blk.submit(IN, read_bytes=512, queue=1)
        blk.kick(1)
        await waits(rig, 2)
        await rig.device.set_queue_ready(rig.device.queues[0], False)
        rig.device.set_limit(RateLimit(ops=1000, ops_burst=1))
        await eventually(lambda: blk.status(slot) == OK)


@pytest.mark.parametrize("homes", [1, 2])
async def test_limits_that_change_at_any_moment_leave_nobody_waiting(
    image: Path, homes: int
) -> None:
    rng = random.Random(homes)
    async with disk_rig(image, homes, None, queues=2) as (rig, blk):
        for _ in range(40):
            for queue in (0, 1):
                for _ in range(8):
                    blk.submit(IN, read_bytes=rng.choice((512, 8 * KIB)), queue=queue)
                blk.kick(queue)
            for _ in range(rng.randrange(4)):
                limit = RateLimit(
                    ops=rng.choice((None, 1, 10_000)),
                    bps=rng.choice((None, 1, "10M", "1G")),
                )
                rig.device.set_limit(rng.choice((None, limit)))
                await settle()
            if paused := rng.random() < 0.5:
                await rig.device.quiesce()
            rig.device.set_limit(None)
            if paused:
                await rig.device.resume()
            done = [0, 0]
            while done != [8, 8]:
                await settle()
                for queue in (0, 1):
                    done[queue] += len(rig.driver.queues[queue].take_used())


@asynccontextmanager
async def neighbours(
    image: Path, other: Path, io_threads: int
) -> AsyncIterator[tuple[Rig[BlkDevice], Rig[BlkDevice]]]:
    """Two disks on one home; the first is limited."""
    limit = RateLimit(ops=NEVER, ops_burst=1)
    contexts: list[DeviceContext] = []

    async def both(context: DeviceContext) -> BlkDevice:
        contexts.append(context)
        return await build(Disk(str(image), engine="threads", limit=limit), context)

    async with virtio_rig(both, io_threads=io_threads) as first:
        (context,) = contexts
        irq_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        context.stack.callback(os.close, irq_fd)
        memory = GuestMemory.create(MEMORY_BYTES)
        context.stack.callback(memory.close)
        interrupts = Interrupts(irq_fd)
        context.stack.callback(interrupts.close)
        own = dataclasses.replace(context, id="test1", memory=memory, interrupts=interrupts)
        device = await build(Disk(str(other), engine="threads"), own)
        transport = MmioTransport(device)
        second = Rig(device, transport, MmioDriver(transport, memory, irq_fd), memory)
        await first.driver.start()
        await second.driver.start()
        try:
            yield first, second
        finally:
            await device.end()


async def test_a_disk_that_waits_does_not_delay_its_neighbour_on_the_same_home(
    image: Path, tmp_path: Path, io_threads: int
) -> None:
    other = tmp_path / "other.img"
    other.write_bytes(b"z" * MIB)
    async with neighbours(image, other, io_threads) as (first, second):
        limited, free = BlkDriver(first), BlkDriver(second)
        for _ in range(8):
            limited.submit(IN, read_bytes=512)
        limited.kick()
        await waits(first)
        for at in range(50):
            assert await free.request(IN, at, read_bytes=512) == (OK, b"z" * 512)
        assert (throttled(first), throttled(second)) == (1, 0)
        assert first.device.queues[0].statistics().used == 1


async def test_a_disk_in_python_is_limited_alike() -> None:
    config = AsyncDisk(RamDisk(1 * MIB), limit=RateLimit(bps=NEVER, bps_burst="8K"))
    build_source = functools.partial(blk_source.build, config)
    async with virtio_rig(build_source) as rig:
        await rig.driver.start()
        blk = BlkDriver(rig)
        for _ in range(2):
            assert await blk.request(OUT, 0, bytes(4 * KIB)) == (OK, b"")
        slot = blk.submit(IN, read_bytes=512)
        blk.kick()
        await waits(rig)
        await rig.driver.start()
        assert blk.status(slot) == 0xFF


class NoZeroes(RamDisk):
    """It has no discard, so zeroes have to be written."""

    discard = None  # type: ignore[assignment]


async def test_zeroes_that_are_written_count_as_bytes() -> None:
    config = AsyncDisk(NoZeroes(1 * MIB), limit=RateLimit(bps=NEVER, bps_burst="8K"))
    async with virtio_rig(functools.partial(blk_source.build, config)) as rig:
        await rig.driver.start()
        blk = BlkDriver(rig)
        zeroes = (0).to_bytes(8, "little") + (128).to_bytes(4, "little") + bytes(4)
        assert await blk.request(WRITE_ZEROES, 0, zeroes) == (OK, b"")
        slot = blk.submit(IN, read_bytes=512)
        blk.kick()
        await waits(rig)
        assert blk.status(slot) == 0xFF


# --- NICs ---------------------------------------------------------------------------------


@pytest.fixture
def plugged(io_threads: int) -> Plugged:
    return functools.partial(net_rig, io_threads)


async def test_packets_sent_wait_in_their_ring_and_receiving_goes_on(plugged: Plugged) -> None:
    limit = RateLimit(ops=NEVER, ops_burst=2)
    async with plugged(tx_limit=limit) as net:
        for at in range(5):
            net.send(b"frame %d" % at, at)
        for at in range(2):
            assert await net.tap.sent() == b"frame %d" % at
        await eventually(lambda: net.counter("tx_throttled") == 1)
        net.offer_rx(8)
        for _ in range(8):
            net.tap.wire.send(HEADER + b"for the guest")
            assert await net.received() == b"for the guest"
        assert (net.counter("tx_packets"), net.counter("rx_throttled")) == (2, 0)
        net.rig.device.set_limits(rx=None, tx=None)
        for at in range(2, 5):
            assert await net.tap.sent() == b"frame %d" % at


async def test_packets_received_wait_in_the_tap_and_sending_goes_on(plugged: Plugged) -> None:
    limit = RateLimit(bps=NEVER, bps_burst=1)
    async with plugged(rx_limit=limit) as net:
        net.offer_rx(4)
        net.tap.wire.send(HEADER + b"a" * 100)
        assert await net.received() == b"a" * 100
        net.tap.wire.send(HEADER + b"b" * 100)
        await eventually(lambda: net.counter("rx_throttled") == 1)
        for at in range(8):
            net.send(b"frame", at)
            assert await net.tap.sent() == b"frame"
        assert net.counter("rx_packets") == 1
        net.rig.device.set_limits(rx=RateLimit(bps="1M"), tx=None)
        assert await net.received() == b"b" * 100


async def test_both_directions_go_on_by_themselves(plugged: Plugged) -> None:
    limit = RateLimit(ops=2000, ops_burst=1)
    async with plugged(rx_limit=limit, tx_limit=limit) as net:
        net.offer_rx(10)
        for at in range(10):
            net.send(b"out %d" % at, at)
            net.tap.wire.send(HEADER + b"in %d" % at)
        for at in range(10):
            assert await net.tap.sent() == b"out %d" % at
            assert await net.received() == b"in %d" % at
        assert net.counter("rx_throttled") > 0
        assert net.counter("tx_throttled") > 0


async def test_pairs_share_a_nics_limits(plugged: Plugged) -> None:
    limit = RateLimit(ops=NEVER, ops_burst=1)
    async with plugged(pairs=2, tx_limit=limit) as net:
        await net.control(b"\x04\x00\x02\x00")
        net.send(b"first")
        assert await net.tap.sent() == b"first"
        net.send(b"second", pair=1)
        await eventually(lambda: net.counter("tx_throttled") == 1)
        assert net.counter("tx_packets") == 1
        net.rig.device.set_limits(rx=None, tx=None)
        assert await net.tap.sent(1) == b"second"


class OneWire(FakeTap):
    """Whose two pairs send by the same wire, so that it shows the order."""

    def __init__(self) -> None:
        super().__init__(2)
        os.close(self.fds[1])
        self.fds[1] = os.dup(self.fds[0])
        with socket.socket(fileno=os.dup(self.fds[0])) as ours:
            ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)


async def test_pairs_take_turns(plugged: Plugged) -> None:
    """Where the first lane of a home would have each token as soon as it comes."""
    limit = RateLimit(ops=NEVER, ops_burst=1)
    async with plugged(tap=OneWire(), tx_limit=limit) as net:
        await net.control(b"\x04\x00\x02\x00")
        for pair, name in enumerate((b"a", b"b")):
            for at in range(4):
                net.send(name, at, pair=pair)
            await eventually(lambda pair=pair: net.counter("tx_throttled") == 1 + pair)  # type: ignore[misc]
        net.rig.device.set_limits(rx=None, tx=RateLimit(ops=2000, ops_burst=1))
        order = b"".join([await net.tap.sent() for _ in range(8)])
        assert order == b"aabababb"


async def test_a_nic_resets_and_pauses_while_it_waits(plugged: Plugged) -> None:
    limit = RateLimit(bps=NEVER, bps_burst=1)
    async with plugged(rx_limit=limit, tx_limit=limit) as net:
        net.offer_rx(2)
        for _ in range(2):
            waited = net.counter("tx_throttled")
            for at in range(2):
                net.send(b"frame", at)
            net.tap.wire.send(HEADER + b"in")
            await eventually(lambda waited=waited: net.counter("tx_throttled") > waited)  # type: ignore[misc]
            await net.rig.device.quiesce()
            await net.rig.device.resume()
            await net.rig.driver.start()
        assert net.counter("tx_packets") == 1


async def test_a_nic_in_python_is_limited_alike(io_threads: int) -> None:
    limit = RateLimit(ops=NEVER, ops_burst=1)
    nic = Nic(rx_limit=limit, tx_limit=limit)
    async with nic_rig(nic, io_threads) as guest:
        guest.offer_rx(4)
        frame = bytes(60)
        guest.send(frame, frame)
        assert await anext(nic) == frame
        await nic.send(frame)
        await nic.send(frame)
        assert len(await guest.received()) == 1
        counters = guest.rig.device.counters
        await eventually(
            lambda: counters()["rx_throttled"] == 1 and counters()["tx_throttled"] == 1
        )
        assert (counters()["rx_packets"], counters()["tx_packets"]) == (1, 1)
        guest.rig.device.set_limits(rx=None, tx=None)
        assert await anext(nic) == frame
        assert len(await guest.received()) == 1


# --- what users say ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bps": 0}, "bps: 0 is not in 1 to 1024T; leave it out"),
        ({"ops": -1}, "ops: -1 is not in 1 to 1024T"),
        ({"bps": "2000T"}, "bps: 2000T is not in"),
        ({"bps": "fast"}, "bps: 'fast' is not a size"),
        ({"ops": "10"}, "ops: '10' is not int or None"),
        ({"bps_burst": "1M"}, "bps_burst: 1M needs a rate, bps"),
        ({"ops": 1, "ops_burst": 0}, "ops_burst: 0 is not in"),
    ],
)
def test_limits_that_make_no_sense_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        RateLimit(**options)  # type: ignore[arg-type]


def test_a_burst_is_a_tenth_of_a_second_by_default() -> None:
    rates = RateLimit(bps="10M", ops=5).native()
    assert (rates.bytes, rates.bytes_burst) == (10 * MIB, MIB)
    assert (rates.ops, rates.ops_burst) == (5, 1)
    rates = RateLimit(ops=7, ops_burst=9).native()
    assert (rates.bytes, rates.bytes_burst, rates.ops, rates.ops_burst) == (0, 0, 7, 9)


def test_the_kernels_vhost_has_no_limits() -> None:
    with pytest.raises(ConfigError, match="Net t0: vhost=on has no rate limits"):
        Tap("t0", vhost=True, tx_limit=RateLimit(ops=1))
