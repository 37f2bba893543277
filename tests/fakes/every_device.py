"""One device of each kind, with all the features it can offer."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Awaitable, Callable

from avmm.units import MIB
from avmm.virtio.device import VirtioDevice
from avmm.virtio.devices import blk, blk_source, console, net, ports, rng, vsock
from avmm.virtio.devtype import DeviceContext
from avmm.virtio.python_device import PythonDevice
from avmm.virtio.python_device import build as build_python
from fakes.net_rig import FakeTap
from fakes.vsock_guest import CID

Build = Callable[[DeviceContext], Awaitable[VirtioDevice]]


class RamDisk:
    """Bytes in memory."""

    def __init__(self, size: int = MIB) -> None:
        self.size = size
        self.data = bytearray(size)

    async def read(self, offset: int, size: int) -> bytes:
        return bytes(self.data[offset : offset + size])

    async def write(self, offset: int, data: bytes) -> None:
        self.data[offset : offset + len(data)] = data

    async def flush(self) -> None:
        """They are where they will stay."""

    async def discard(self, offset: int, size: int) -> None:
        self.data[offset : offset + size] = bytes(size)


class Told(PythonDevice):
    """A device of nobody's, with a configuration."""

    virtio_id = 50
    config = bytes(range(1, 14))


async def _blk(context: DeviceContext) -> VirtioDevice:
    fd, path = tempfile.mkstemp()
    context.stack.callback(os.unlink, path)
    os.truncate(fd, MIB)
    os.close(fd)
    return await blk.build(blk.Disk(path, engine="threads", queues=2), context)


async def _blk_source(context: DeviceContext) -> VirtioDevice:
    return await blk_source.build(blk_source.AsyncDisk(RamDisk()), context)


async def _net(context: DeviceContext) -> VirtioDevice:
    tap = FakeTap(2, uso=True)
    for wire in tap.wires:
        context.stack.callback(wire.close)
    context.stack.push_async_callback(tap.close)
    return net.NetDevice(net.Tap("avtest0", mtu=1400), tap, context)


async def _console(context: DeviceContext) -> VirtioDevice:
    return await console.build(console.VirtioConsole(), context)


async def _ports(context: DeviceContext) -> VirtioDevice:
    return await ports.build(ports.Ports(names=["one", "two"]), context)


async def _rng(context: DeviceContext) -> VirtioDevice:
    return await rng.build(rng.Rng(), context)


async def _vsock(context: DeviceContext) -> VirtioDevice:
    return await vsock.build(vsock.Vsock(CID), context)


async def _python(context: DeviceContext) -> VirtioDevice:
    return await build_python(Told(), context)


EVERY: dict[str, Build] = {
    "blk": _blk,
    "blk of an object": _blk_source,
    "net": _net,
    "console": _console,
    "ports": _ports,
    "rng": _rng,
    "vsock": _vsock,
    "python": _python,
}
