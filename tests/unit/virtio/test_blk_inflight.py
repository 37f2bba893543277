"""virtio-blk with a write that takes as long as the test wants: what waits for it."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

import pytest

from avmm.errors import HostError
from avmm.units import KIB, MIB
from avmm.virtio.devices.blk import BlkDevice, Disk
from avmm.virtio.devtype import DeviceContext
from avmm.virtio.transport import mmio
from fakes.blk_driver import OK, OUT, BlkDriver
from fakes.mmio_driver import eventually, perform, settle
from fakes.pipe_disk import PipeDisk
from fakes.virtio_rig import Rig, virtio_rig


@dataclass(frozen=True)
class Pipe:
    """The disk writes to write_fd; io_threads: on which home."""

    read_fd: int
    write_fd: int
    io_threads: int


@asynccontextmanager
async def on_a_pipe(pipe: Pipe) -> AsyncIterator[tuple[Rig[BlkDevice], BlkDriver]]:
    """A started disk that writes to a pipe, by io_uring, which lets writes to pipes wait."""

    async def build_on_pipe(context: DeviceContext) -> BlkDevice:
        return BlkDevice(Disk("pipe", engine="io_uring"), PipeDisk(pipe.write_fd), context)

    try:
        async with virtio_rig(build_on_pipe, io_threads=pipe.io_threads) as rig:
            await rig.driver.start()
            try:
                yield rig, BlkDriver(rig)
            finally:
                # A test that failed must not leave the exit's quiesce() waiting.
                os.set_blocking(pipe.read_fd, False)
                with contextlib.suppress(BlockingIOError):
                    os.read(pipe.read_fd, MIB)
    except HostError as e:
        if e.kind == "disk-engine":
            pytest.skip(f"no io_uring here: {e}")
        raise


@pytest.fixture(params=[0, 1], ids=["loop", "thread"])
def pipe(request: pytest.FixtureRequest) -> Iterator[Pipe]:
    read_fd, write_fd = os.pipe()
    yield Pipe(read_fd, write_fd, request.param)
    os.close(read_fd)
    os.close(write_fd)


async def stuck_write(rig: Rig[BlkDevice], blk: BlkDriver, write_fd: int) -> tuple[int, int]:
    """A write in flight that waits for room in the pipe: its slot, and the bytes before it."""
    os.set_blocking(write_fd, False)
    filled = 0
    with contextlib.suppress(BlockingIOError):
        while True:
            filled += os.write(write_fd, bytes(4 * KIB))
    os.set_blocking(write_fd, True)
    slot = blk.submit(OUT, 0, b"x" * 512)
    blk.kick()
    await eventually(lambda: rig.device.statistics().counters["batches"] > 0)
    assert blk.status(slot) == 0xFF
    return slot, filled


async def test_reset_waits_for_inflight_writes(pipe: Pipe) -> None:
    async with on_a_pipe(pipe) as (rig, blk):
        slot, filled = await stuck_write(rig, blk, pipe.write_fd)
        reset = asyncio.ensure_future(perform(rig.transport.write(mmio.STATUS, 4, 0)))
        await settle()
        assert not reset.done()
        assert rig.driver.read(mmio.STATUS) != 0
        os.read(pipe.read_fd, filled)
        await reset
        assert rig.driver.read(mmio.STATUS) == 0
        assert blk.status(slot) == OK
        assert os.read(pipe.read_fd, KIB) == b"x" * 512


async def test_two_resets_at_once_both_end(pipe: Pipe) -> None:
    async with on_a_pipe(pipe) as (rig, blk):
        _, filled = await stuck_write(rig, blk, pipe.write_fd)
        resets = [
            asyncio.ensure_future(perform(rig.transport.write(mmio.STATUS, 4, 0))) for _ in range(2)
        ]
        await settle()
        assert not any(reset.done() for reset in resets)
        os.read(pipe.read_fd, filled)
        await asyncio.gather(*resets)


async def test_a_fault_leaves_what_is_in_flight_to_the_reset(pipe: Pipe) -> None:
    async with on_a_pipe(pipe) as (rig, blk):
        slot, filled = await stuck_write(rig, blk, pipe.write_fd)
        kind = rig.driver.queues[0].offer_broken()
        blk.kick()
        await eventually(lambda: rig.device.statistics().last_fault == kind)
        os.read(pipe.read_fd, filled)
        await rig.driver.write(mmio.STATUS, 0)
        assert blk.status(slot) == OK


async def test_a_reset_that_is_cancelled_does_not_keep_the_device_from_coming_to_rest(
    pipe: Pipe,
) -> None:
    async with on_a_pipe(pipe) as (rig, blk):
        slot, filled = await stuck_write(rig, blk, pipe.write_fd)
        reset = asyncio.ensure_future(perform(rig.transport.write(mmio.STATUS, 4, 0)))
        await settle()
        reset.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reset
        rest = asyncio.ensure_future(rig.device.quiesce())
        await settle()
        assert not rest.done()
        os.read(pipe.read_fd, filled)
        await rest
        assert blk.status(slot) == OK
