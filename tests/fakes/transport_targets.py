"""Targets for the registers of virtio's transports, as parser_targets.py has those for parsers: a
guest's accesses in any order, with memory and kicks among them. Whatever it did, a driver that
begins anew finds a device that works.

An input is how the disk is used, then records of 16 bytes, see `_Record`.
"""

from __future__ import annotations

import asyncio
import logging
import os
import struct
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from typing import Literal

from avmm.pci import function as header
from avmm.units import MIB, SECTOR_BYTES
from avmm.virtio.devices.blk import BlkDevice, Disk, build
from avmm.virtio.devtype import DeviceContext
from avmm.virtio.state import (
    ACKNOWLEDGE,
    DEVICE_NEEDS_RESET,
    DRIVER,
    DRIVER_OK,
    FAILED,
    FEATURES_OK,
)
from avmm.virtio.transport import mmio
from fakes.blk_driver import IN, OK, OUT, BlkDriver
from fakes.mmio_driver import settle
from fakes.pci_driver import PciRig, pci_rig
from fakes.virtio_rig import Rig, virtio_rig

_STATUS = ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK | DEVICE_NEEDS_RESET | FAILED
_MMIO_BYTES = mmio.CONFIG + 0x100
_CPUS = 2
_RECORD = struct.Struct("<HBBIQ")
_RINGS_GPA, _RINGS_MASK = 0x10000, 0xFFFF
_RECORDS_MAX = 128
_SHORT_OF_PATIENCE_S = 60

_ENTRIES = 16


@dataclass(frozen=True)
class _Record:
    """what: of _follow(). at: an offset. size: 1, 2, 4 or 8 bytes."""

    what: int
    at: int
    size: int
    gpa: int
    value: int

    @property
    def fitting(self) -> int:
        return self.value & (1 << 8 * self.size) - 1


def _records(data: bytes) -> Iterator[_Record]:
    for i in range(0, min(len(data), _RECORDS_MAX * _RECORD.size) - _RECORD.size + 1, _RECORD.size):
        at, what, size, gpa, value = _RECORD.unpack_from(data, i)
        yield _Record(what, at, 1 << (size & 3), gpa, value)


class _OnMmio:
    """A guest of a disk on virtio-mmio."""

    def __init__(self, rig: Rig[BlkDevice]) -> None:
        self.rig = rig

    def kick(self, queue: int) -> None:
        self.rig.driver.kick(queue)

    async def access(self, record: _Record) -> None:
        """A register, or none."""
        offset = record.at % _MMIO_BYTES
        if record.what & 16:
            await self.rig.driver.write(offset, record.fitting, record.size)
        else:
            assert 0 <= self.rig.driver.read(offset, record.size) < 1 << 8 * record.size

    async def begin_anew(self) -> None:
        """A new driver."""
        await self.rig.driver.start(size=_ENTRIES)


class _OnPci:
    """Of one on virtio-pci, before its BAR is moved."""

    def __init__(self, rig: PciRig[BlkDevice]) -> None:
        self.rig = rig
        self._bar = rig.driver.config_read(header.BAR0, 8)
        self._places = [
            (rig.driver.space, 0x100),
            (self._bar & ~0xF, rig.transport.function.bars[0].size_bytes),
        ]

    async def find(self) -> None:
        """What its capabilities point at."""
        driver = self.rig.driver
        await driver.probe()
        self._places += [*driver.parts.values(), (driver.table, 16 * driver.vectors)]

    def kick(self, queue: int) -> None:
        """Where a notification is an eventfd of KVM's now."""
        notifications = self.rig.notifications.at
        if (gpa := self.rig.driver.notify_gpa(queue)) in notifications:
            os.eventfd_write(notifications[gpa], 1)

    async def access(self, record: _Record) -> None:
        """Configuration space, the BAR, or one of its parts."""
        base, length = self._places[(record.gpa & 0xFF) % len(self._places)]
        gpa = base + record.at % max(length - record.size + 1, 1)
        if record.what & 16:
            await self.rig.cpu.write(gpa, record.size, record.fitting)
        else:
            assert 0 <= self.rig.cpu.read(gpa, record.size) < 1 << 8 * record.size

    async def begin_anew(self) -> None:
        """As firmware and a driver do: the BAR to its place first."""
        driver = self.rig.driver
        await driver.config_write(header.BAR0, 4, self._bar & 0xFFFF_FFFF)
        await driver.config_write(header.BAR0 + 4, 4, self._bar >> 32)
        await driver.start(size=_ENTRIES)


async def _follow(guest: _OnMmio | _OnPci, data: bytes) -> None:
    """What a guest does, and what its device must be like after each step."""
    rig = guest.rig
    for record in _records(data):
        match record.what & 7:
            case 0 if rig.driver.queues:
                guest.kick(record.value % len(rig.driver.queues))
            case 1:
                gpa = _RINGS_GPA + (record.gpa & _RINGS_MASK)
                rig.memory.write(gpa, record.value.to_bytes(8, "little"))
            case 2:
                await rig.driver.set_status(record.value & 0xFF)
            case 3 if record.at & 1:
                await guest.begin_anew()
            case _:
                await guest.access(record)
        if record.what & 8:
            await settle()
        status = rig.device.state.status
        assert status & ~_STATUS == 0, f"status {status:#x}"
        assert not status & DRIVER_OK or status & FEATURES_OK, f"status {status:#x}"


async def _works(guest: _OnMmio | _OnPci) -> None:
    """On each queue, for a driver that is new."""
    await guest.begin_anew()
    blk = BlkDriver(guest.rig)
    for queue in range(len(guest.rig.driver.queues)):
        data = os.urandom(SECTOR_BYTES)
        assert await blk.request(OUT, queue, data, queue=queue) == (OK, b"")
        assert await blk.request(IN, queue, read_bytes=len(data), queue=queue) == (OK, data)
    assert guest.rig.errors == []


def _building(how: int, image: int) -> Callable[[DeviceContext], Awaitable[BlkDevice]]:
    engine: Literal["io_uring", "threads"] = "threads" if how & 1 else "io_uring"
    return lambda context: build(Disk(f"/proc/self/fd/{image}", engine=engine), context)


async def _use_mmio(data: bytes, image: int) -> None:
    async with virtio_rig(_building(data[0], image), cpus=_CPUS) as rig:
        guest = _OnMmio(rig)
        await _follow(guest, data[1:])
        await _works(guest)


async def _use_pci(data: bytes, image: int) -> None:
    async with pci_rig(_building(data[0], image), cpus=_CPUS) as rig:
        guest = _OnPci(rig)
        await guest.find()
        await _follow(guest, data[1:])
        await _works(guest)


def _run(use: Callable[[bytes, int], Awaitable[None]], data: bytes) -> None:
    if not data:
        return
    logging.disable(logging.WARNING)  # a guest's faults, each as it should be
    image = os.memfd_create("image")
    try:
        os.ftruncate(image, MIB)

        async def bounded() -> None:
            async with asyncio.timeout(_SHORT_OF_PATIENCE_S):
                await use(data, image)

        with asyncio.Runner() as runner:
            runner.run(bounded())
    finally:
        os.close(image)
        logging.disable(logging.NOTSET)


def virtio_mmio(data: bytes) -> None:
    """A disk behind virtio-mmio's registers."""
    _run(_use_mmio, data)


def virtio_pci(data: bytes) -> None:
    """A disk behind configuration space, BAR and MSI-X."""
    _run(_use_pci, data)
