"""The base of all devices, through the smallest device there can be."""

from __future__ import annotations

import errno
import os
from collections.abc import AsyncIterator

import pytest

from avmm.errors import BugError, GuestFault, HostError
from avmm.log import LINES_AT_ONCE
from avmm.virtio.device import VirtioDevice
from avmm.virtio.devtype import DeviceContext, DeviceType
from avmm.virtio.state import DEVICE_NEEDS_RESET
from avmm.virtio.transport import mmio
from fakes.mmio_driver import settle
from fakes.virtio_rig import Rig, virtio_rig


class Bell(VirtioDevice):
    """Does nothing but count its kicks; `more` says that there is more to do, `error` fails."""

    def __init__(self, context: DeviceContext) -> None:
        super().__init__(BELL, context, offered=0, queue_sizes=(8,))
        self.rung = 0
        self.more = 0
        self.error: Exception | None = None

    def kick(self, index: int) -> bool:
        self.queues[index].take_kick()
        self.rung += 1
        if self.error is not None:
            raise self.error
        self.more = max(0, self.more - 1)
        return self.more > 0


async def build(context: DeviceContext) -> Bell:
    return Bell(context)


BELL = DeviceType(
    name="bell",
    virtio_id=63,
    flag="--bell",
    summary="rings",
    build=lambda config, context: build(context),
)


@pytest.fixture
async def rig() -> AsyncIterator[Rig[Bell]]:
    async with virtio_rig(build) as rig:
        await rig.driver.start()
        await settle()
        rig.device.rung = 0
        yield rig


async def test_a_device_is_kicked_once_for_each_kick(rig: Rig[Bell]) -> None:
    rig.driver.kick(0)
    await settle()
    rig.driver.kick(0)
    await settle()
    assert rig.device.rung == 2


async def test_a_device_that_has_more_to_do_is_called_again(rig: Rig[Bell]) -> None:
    rig.device.more = 5
    rig.driver.kick(0)
    await settle()
    assert rig.device.rung == 5


async def test_a_guests_fault_ends_the_work_and_nothing_else(rig: Rig[Bell]) -> None:
    rig.device.error = GuestFault("request")
    rig.driver.kick(0)
    await settle()
    rig.driver.kick(0)
    await settle()
    assert rig.device.rung == 1
    assert rig.driver.read(mmio.STATUS) & DEVICE_NEEDS_RESET
    assert rig.errors == []


async def test_a_device_that_fails_is_reported_to_the_machine(
    rig: Rig[Bell], caplog: pytest.LogCaptureFixture
) -> None:
    rig.device.error = KeyError("lost")
    rig.driver.kick(0)
    await settle()
    (error,) = rig.errors
    assert isinstance(error, BugError)
    assert "test0: KeyError" in str(error)
    assert isinstance(error.__cause__, KeyError)
    assert rig.driver.read(mmio.STATUS) & DEVICE_NEEDS_RESET
    assert "KeyError" in caplog.text


async def test_a_hosts_refusal_is_reported_as_it_is(rig: Rig[Bell]) -> None:
    rig.device.error = refusal = HostError("bell", op="ring", errno=5)
    rig.driver.kick(0)
    await settle()
    assert rig.errors == [refusal]


async def test_a_guest_that_faults_for_ever_does_not_fill_the_log(
    rig: Rig[Bell], caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(1000):
        rig.device.fault(GuestFault("request"))
    assert rig.device.statistics().faults == 1000
    assert len(caplog.records) == LINES_AT_ONCE
    assert rig.device.context.guest_log.left_out == 1000 - LINES_AT_ONCE


async def test_a_fault_interrupts_once_until_the_reset(rig: Rig[Bell]) -> None:
    before = rig.device.statistics().interrupts
    for _ in range(3):
        rig.device.fault(GuestFault("request"))
    assert rig.device.statistics().interrupts == before + 1


async def test_a_broken_ring_stays_the_guests_doing_when_it_is_set_up_again(
    rig: Rig[Bell],
) -> None:
    assert isinstance(rig.device.failure(-errno.EPROTO, "ring"), GuestFault)
    assert isinstance(rig.device.failure(-errno.EIO, "ring"), HostError)


async def test_statistics_outlive_the_device() -> None:
    async with virtio_rig(build) as rig:
        await rig.driver.start()
        rig.device.set_config(b"\x01")
        before = rig.device.statistics()
    assert rig.device.statistics() == before
    assert before.interrupts == 1
    rig.device.set_config(b"\x02")  # nobody to tell any more
    assert rig.device.statistics() == before


async def test_descriptors_are_as_many_as_before() -> None:
    before = set(os.listdir("/proc/self/fd"))
    async with virtio_rig(build) as rig:
        await rig.driver.start()
    assert set(os.listdir("/proc/self/fd")) == before
