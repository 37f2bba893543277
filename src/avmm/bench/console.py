"""Rows of suite embed: bytes of a console and of a port at native speed, with no VM.

Device and streams are those of a microVM, and the program reads or writes its end of them. The
guest is the C driver on the device's rings, in turns on the same loop; chains are as Linux makes
them: it writes up to 32 KiB at a time and offers pages to be filled.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import TypeVar

from avmm.bench.front_end import RingPlace
from avmm.bench.record import OWN, Case
from avmm.bench.suite import Options
from avmm.errors import BugError
from avmm.loop import run as run_loop
from avmm.mem.guest import GuestMemory
from avmm.native import CData, ffi, lib
from avmm.units import KIB, MIB
from avmm.virtio import features
from avmm.virtio.device import VirtioDevice
from avmm.virtio.devices import console, ports
from avmm.virtio.devtype import DeviceContext
from avmm.virtio.home import Homes
from avmm.virtio.interrupt import Interrupts
from avmm.virtio.queue import Queue
from avmm.virtio.state import ACKNOWLEDGE, DRIVER, DRIVER_OK, FEATURES_OK

WRITE_BYTES = 32 * KIB
PAGE_BYTES = 4 * KIB
_PIECE_BYTES = 256 * KIB
_MEMORY_BYTES = 32 * MIB
_QUEUE_BYTES = 4 * MIB
_DATA_AT = 1 * MIB
_FEATURES = (
    features.VERSION_1
    | features.RING_INDIRECT_DESC
    | features.RING_EVENT_IDX
    | features.RING_PACKED
    | features.CONSOLE_MULTIPORT
)
_PORT_RX, _PORT_TX = 4, 5

D = TypeVar("D", bound=VirtioDevice)


class Guest:
    """The driver of one queue of a device. chain_bytes: of each chain; writable: the device fills
    it."""

    def __init__(
        self, memory: GuestMemory, queue: Queue, negotiated: int, chain_bytes: int, writable: bool
    ) -> None:
        base = _QUEUE_BYTES
        place = RingPlace.at(base, queue.max_size)
        queue.desc_gpa, queue.driver_gpa = place.desc_gpa, place.driver_gpa
        queue.device_gpa = place.device_gpa
        setup = ffi.new("struct av_vdriver_setup *")
        setup.mem = memory.native
        setup.desc_gpa, setup.driver_gpa = place.desc_gpa, place.driver_gpa
        setup.device_gpa, setup.table_gpa = place.device_gpa, place.table_gpa
        setup.features, setup.size = negotiated, queue.max_size
        setup.kick_fd, setup.call_fd = queue.kick_fd, -1
        self._data_gpa = base + _DATA_AT
        self._chain_bytes, self._writable = chain_bytes, writable
        self._size = queue.max_size
        self._setup = setup
        self._driver: CData = ffi.NULL
        self._token, self._written = ffi.new("uint32_t *"), ffi.new("uint32_t *")
        self._segment = ffi.new("struct av_vdriver_segment *")

    def open(self) -> None:
        """Once the driver's features are accepted."""
        error = ffi.new("int *")
        self._driver = lib.av_vdriver_create(self._setup, error)
        if not self._driver:
            raise BugError("bench", f"the driver of a queue: {error[0]}")
        lib.av_vdriver_interrupts_off(self._driver)

    def close(self) -> None:
        """Before the memory is gone."""
        if self._driver:
            lib.av_vdriver_destroy(self._driver)

    async def run(self) -> None:
        """Offer every chain again as soon as it came back; for ever."""
        for token in range(self._size):
            self._add(token)
        while True:
            lib.av_vdriver_publish(self._driver)
            await asyncio.sleep(0)
            while lib.av_vdriver_take(self._driver, self._token, self._written) > 0:
                self._add(int(self._token[0]))

    def _add(self, token: int) -> None:
        self._segment.gpa = self._data_gpa + token * self._chain_bytes
        self._segment.size_bytes = self._chain_bytes
        readable = 0 if self._writable else 1
        lib.av_vdriver_add(self._driver, self._segment, readable, 1 - readable, token)


def cases(suite: str, options: Options) -> Iterator[Case]:
    """See the suite protocol. Needs no rights."""
    for what, work in (
        ("console, from the guest", _console_out),
        ("console, to the guest", _console_in),
        ("port, from the guest", _port_out),
        ("port, to the guest", _port_in),
    ):
        series = {OWN: [run_loop(work(options.seconds)) for _ in range(options.runs)]}
        yield Case(suite, f"{what}", "MB/s", "higher", series)


async def _console_out(seconds: float) -> float:
    async with _console(console.TX, WRITE_BYTES) as device:
        reader, _ = device.console.open()
        return await _read(reader, seconds)


async def _console_in(seconds: float) -> float:
    async with _console(console.RX, PAGE_BYTES) as device:
        _, writer = device.console.open()
        return await _write(writer, seconds)


async def _port_out(seconds: float) -> float:
    async with _port(_PORT_TX, WRITE_BYTES) as device:
        reader, _ = await device.ports["bench"].open()
        return await _read(reader, seconds)


async def _port_in(seconds: float) -> float:
    async with _port(_PORT_RX, PAGE_BYTES) as device:
        _, writer = await device.ports["bench"].open()
        return await _write(writer, seconds)


async def _read(reader: asyncio.StreamReader, seconds: float) -> float:
    began, count = time.perf_counter(), 0
    while (elapsed := time.perf_counter() - began) < seconds:
        count += len(await reader.read(_PIECE_BYTES))
    return count / elapsed / 1e6


async def _write(writer: asyncio.StreamWriter, seconds: float) -> float:
    piece = bytes(_PIECE_BYTES)
    began, count = time.perf_counter(), 0
    while (elapsed := time.perf_counter() - began) < seconds:
        writer.write(piece)
        await writer.drain()
        count += len(piece)
    return count / elapsed / 1e6


@asynccontextmanager
async def _console(queue: int, chain_bytes: int) -> AsyncIterator[console.ConsoleDevice]:
    async with AsyncExitStack() as stack:
        context = _context(stack)
        device = await console.build(console.VirtioConsole(), context)
        await _drive(device, context, stack, queue, chain_bytes, writable=queue == console.RX)
        yield device


@asynccontextmanager
async def _port(queue: int, chain_bytes: int) -> AsyncIterator[ports.PortsDevice]:
    async with AsyncExitStack() as stack:
        context = _context(stack)
        device = await ports.build(ports.Ports(["bench"]), context)
        await _drive(device, context, stack, queue, chain_bytes, writable=queue == _PORT_RX)
        device.ports["bench"].set_guest_open(True)
        yield device


def _context(stack: AsyncExitStack) -> DeviceContext:
    memory = GuestMemory.create(_MEMORY_BYTES)
    stack.callback(memory.close)
    interrupts = Interrupts()
    stack.callback(interrupts.close)
    loop = asyncio.get_running_loop()
    homes = Homes.create(loop)
    stack.callback(homes.close)

    def on_error(error: BaseException) -> None:
        raise error

    return DeviceContext(
        id="bench",
        memory=memory,
        interrupts=interrupts,
        homes=homes,
        loop=loop,
        stack=stack,
        on_error=on_error,
    )


async def _drive(
    device: VirtioDevice,
    context: DeviceContext,
    stack: AsyncExitStack,
    index: int,
    chain_bytes: int,
    *,
    writable: bool,
) -> None:
    """Set the device up as a driver does, with the queue that matters, and let the guest run."""
    stack.push_async_callback(device.quiesce)
    queue = device.queues[index]
    negotiated = device.state.offered & _FEATURES
    await device.set_status(ACKNOWLEDGE)
    await device.set_status(ACKNOWLEDGE | DRIVER)
    device.state.accept_features(negotiated)
    await device.set_status(ACKNOWLEDGE | DRIVER | FEATURES_OK)
    guest = Guest(context.memory, queue, negotiated, chain_bytes, writable)
    guest.open()
    stack.callback(guest.close)
    await device.set_queue_ready(queue, True)
    await device.set_status(ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK)
    running = asyncio.create_task(guest.run())

    async def stop() -> None:
        running.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await running

    stack.push_async_callback(stop)
