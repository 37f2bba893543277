"""Suite vsock-native: streams of this process and a guest made of a thread in C.

The guest works on the device's rings as Linux does; there is no VM, so what counts is what the
device and asyncio cost. The loop is uvloop's.
"""

from __future__ import annotations

import asyncio
import os
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass

from avmm.bench.front_end import MEMORY_GPA, RingPlace
from avmm.bench.record import GOAL, OWN, Aim, Case
from avmm.bench.suite import Options
from avmm.errors import HostError
from avmm.loop import run as run_loop
from avmm.mem.guest import GuestMemory
from avmm.native import CData, ffi, lib
from avmm.units import MIB
from avmm.virtio.devices.vsock import RX, TX, Vsock, VsockDevice, build
from avmm.virtio.devtype import DeviceContext
from avmm.virtio.features import IN_ORDER
from avmm.virtio.home import Homes
from avmm.virtio.interrupt import Interrupts
from avmm.virtio.state import ACKNOWLEDGE, DRIVER, DRIVER_OK, FEATURES_OK

SUITE = "vsock-native"
GOAL_BYTES_PER_S = 1e9
PORT = 1024
AT_ONCE = 16

_BYTES_PER_S = 10**9
_CONNECTIONS_PER_S = 10_000
"""About what is measured in the time that the options give."""
_CHUNK_BYTES = 64 * 1024
_MEMORY_BYTES = 16 * MIB
_TIMEOUT_NS = 5 * 10**9


def cases(options: Options) -> Iterator[Case]:
    """See the suite protocol."""
    size = max(_CHUNK_BYTES, int(_BYTES_PER_S * options.seconds) // _CHUNK_BYTES * _CHUNK_BYTES)
    for name, stream in STREAMS:
        rates = [run_loop(stream(size)) for _ in range(options.runs)]
        series = {OWN: rates, GOAL: [GOAL_BYTES_PER_S]}
        yield Case(SUITE, f"stream, {name}", "B/s", "higher", series, [Aim(GOAL, 1.0)])
    count = max(AT_ONCE, int(_CONNECTIONS_PER_S * options.seconds))
    for at_once in (1, AT_ONCE):
        rates = [run_loop(connections(count, at_once)) for _ in range(options.runs)]
        name = f"connections of the guest's, {at_once} at once"
        yield Case(SUITE, name, "connections/s", "higher", {OWN: rates})
    rates = [run_loop(unix_connections(count, AT_ONCE)) for _ in range(options.runs)]
    name = f"connections of the guest's to a unix socket, {AT_ONCE} at once"
    yield Case(SUITE, name, "connections/s", "higher", {OWN: rates})


@dataclass(frozen=True, slots=True)
class Guest:
    """The device, and the guest's ends of its queues."""

    device: VsockDevice
    memory: GuestMemory
    rx: CData
    tx: CData
    data_gpa: int
    cid: int

    async def run(self, *, sends: int = 0, connections: int = 0, at_once: int = 1) -> CData:
        """One load, see native/load.h; its struct av_load_result. Raises HostError("load")."""
        load, out = ffi.new("struct av_load_vsock *"), ffi.new("struct av_load_result *")
        load.cid, load.host_port, load.timeout_ns = self.cid, PORT, _TIMEOUT_NS
        load.sends, load.connections, load.at_once = sends, connections, at_once
        error = await asyncio.to_thread(
            lib.av_load_vsock_run, self.rx, self.tx, self.memory.native, self.data_gpa, load, out
        )
        if error:
            raise HostError("load", op="Load on vsock", errno=-error)
        return out


@asynccontextmanager
async def vsock_guest(config: Vsock | None = None) -> AsyncIterator[Guest]:
    """A started device. Raises HostError."""
    config = config or Vsock()
    loop = asyncio.get_running_loop()
    errors: list[BaseException] = []
    async with AsyncExitStack() as stack:
        memory = GuestMemory.create(_MEMORY_BYTES)
        stack.callback(memory.close)
        interrupts = Interrupts()
        stack.callback(interrupts.close)
        homes = Homes.create(loop)
        stack.callback(homes.close)
        device = await build(
            config, DeviceContext("vsock0", memory, interrupts, homes, loop, stack, errors.append)
        )
        stack.push_async_callback(device.quiesce)
        await device.set_status(ACKNOWLEDGE | DRIVER)
        device.state.accept_features(device.state.offered & ~IN_ORDER)  # not the driver's
        status = ACKNOWLEDGE | DRIVER | FEATURES_OK
        await device.set_status(status)
        call_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        stack.callback(os.close, call_fd)
        gpa, drivers = MEMORY_GPA, []
        for queue in device.queues:
            place = RingPlace.at(gpa, queue.size)
            gpa = place.end_gpa
            queue.interrupt.set_fd(call_fd)
            queue.desc_gpa, queue.driver_gpa = place.desc_gpa, place.driver_gpa
            queue.device_gpa = place.device_gpa
            await device.set_queue_ready(queue, True)
            drivers.append(_driver(stack, device, place, queue.size, queue.kick_fd, call_fd))
        await device.set_status(status | DRIVER_OK)
        yield Guest(device, memory, drivers[RX], drivers[TX], gpa, config.cid)
        if errors:
            raise errors[0]


def _driver(
    stack: AsyncExitStack,
    device: VsockDevice,
    place: RingPlace,
    size: int,
    kick_fd: int,
    call_fd: int,
) -> CData:
    setup, error = ffi.new("struct av_vdriver_setup *"), ffi.new("int *")
    setup.mem = device.context.memory.native
    setup.desc_gpa, setup.driver_gpa = place.desc_gpa, place.driver_gpa
    setup.device_gpa, setup.table_gpa = place.device_gpa, place.table_gpa
    setup.features, setup.size = device.state.features, size
    setup.kick_fd, setup.call_fd = kick_fd, call_fd
    driver = lib.av_vdriver_create(setup, error)
    if not driver:
        raise HostError("load", op=f"Ring of {size}", errno=-error[0])
    stack.callback(lib.av_vdriver_destroy, driver)
    return driver


async def to_host(count: int) -> float:
    """Bytes a second of a stream to a StreamReader."""
    async with vsock_guest() as guest:

        async def take(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            while await reader.read(_CHUNK_BYTES):
                pass
            writer.close()

        await guest.device.host.serve(PORT, take, limit=_CHUNK_BYTES)
        out = await guest.run(sends=count)
    return float(out.requests / (out.elapsed_ns / 1e9))


async def to_guest(count: int) -> float:
    """Bytes a second of a StreamWriter's stream."""
    async with vsock_guest() as guest:

        async def give(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            chunk = bytes(_CHUNK_BYTES)
            for _ in range(count // _CHUNK_BYTES):
                writer.write(chunk)
                await writer.drain()
            writer.close()

        await guest.device.host.serve(PORT, give)
        out = await guest.run()
    return float(out.requests / (out.elapsed_ns / 1e9))


async def unix_to_host(count: int) -> float:
    """Bytes a second of a stream to a process at a unix socket."""
    return await _unix(sends=count)


async def unix_to_guest(count: int) -> float:
    """Bytes a second of a process's stream, by a unix socket."""
    return await _unix(gives=count)


async def unix_connections(count: int, at_once: int) -> float:
    """Connections a second that the guest makes to a process at a unix socket, and closes."""
    return await _unix(connections=count, at_once=at_once)


STREAMS = (
    ("guest to host", to_host),
    ("host to guest", to_guest),
    ("guest to a unix socket", unix_to_host),
    ("unix socket to guest", unix_to_guest),
)

_PROGRAM = """
import socket, sys
server = socket.socket(socket.AF_UNIX)
server.bind(sys.argv[1])
server.listen(64)
print(flush=True)
data = bytearray(65536)
left = int(sys.argv[2])
while True:
    client, _ = server.accept()
    for _ in range(left // len(data)):
        client.sendall(data)
    while left == 0 and client.recv_into(data):
        pass
    client.close()
"""
"""Takes one connection after the other: gives so many bytes, or takes what comes."""


async def _unix(*, gives: int = 0, **load: int) -> float:
    with tempfile.TemporaryDirectory(prefix="avmm-bench.") as folder:
        path = f"{folder}/v"
        program = await asyncio.create_subprocess_exec(
            sys.executable,
            *("-c", _PROGRAM, f"{path}_{PORT}", str(gives)),
            stdout=asyncio.subprocess.PIPE,
        )
        try:
            assert program.stdout is not None
            await program.stdout.readline()  # it listens
            async with vsock_guest(Vsock(uds=path)) as guest:
                out = await guest.run(**load)
        finally:
            program.kill()
            await program.wait()
    return float(out.requests / (out.elapsed_ns / 1e9))


async def connections(count: int, at_once: int) -> float:
    """Connections a second that the guest makes, each with its task, and closes."""
    async with vsock_guest() as guest:

        async def take(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.read()
            writer.close()

        await guest.device.host.serve(PORT, take)
        out = await guest.run(connections=count, at_once=at_once)
    return float(out.requests / (out.elapsed_ns / 1e9))
