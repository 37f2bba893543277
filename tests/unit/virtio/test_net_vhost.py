"""A NIC whose rings the kernel serves: what it is told, and when."""

from __future__ import annotations

import functools
import os
import socket
import struct

import pytest

from avmm.errors import HostError
from avmm.hostnet import vhost
from avmm.virtio import features
from avmm.virtio.devices import net_vhost
from avmm.virtio.devices.net import NetDevice, Tap
from avmm.virtio.devtype import DeviceContext
from avmm.virtio.interrupt import CONFIG_CHANGE, NO_FD, USED_BUFFER
from avmm.virtio.state import DEVICE_NEEDS_RESET
from avmm.virtio.transport import mmio, pci_common, pci_vectors
from fakes.mmio_driver import settle
from fakes.net_rig import FakeTap, Net, net_rig
from fakes.pci_driver import pci_rig
from fakes.vhost import FEATURES, FakeVhost

OK = 0


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[FakeVhost]:
    """The device's, in order of its pairs."""
    made: list[FakeVhost] = []
    monkeypatch.setattr(net_vhost, "VhostNet", functools.partial(FakeVhost, made))
    return made


plugged = functools.partial(net_rig, 0, vhost=True)


def hva(net: Net, gpa: int) -> int:
    (region,) = net.rig.memory.regions
    return region.hva + gpa - region.gpa


async def test_a_drivers_rings_are_handed_to_the_kernel(made: list[FakeVhost]) -> None:
    async with plugged() as net:
        (kernel,) = made
        (region,) = net.rig.memory.regions
        assert kernel.memory == [(region.gpa, region.size_bytes, region.hva)]
        assert kernel.agreed == FEATURES
        assert sorted(kernel.rings) == [0, 1]
        for index in (0, 1):
            ring, tap_fd = kernel.rings[index]
            queue = net.rig.driver.queues[index]
            assert (ring.size, ring.base) == (queue.size, 0)
            assert ring.desc_hva == hva(net, queue.desc_gpa)
            assert ring.driver_hva == hva(net, queue.driver_gpa)
            assert ring.device_hva == hva(net, queue.device_gpa)
            assert ring.kick_fd == net.rig.device.queues[index].kick_fd
            assert tap_fd == net.tap.fds[0]
    assert kernel.closed


async def test_only_what_the_kernel_can_do_is_offered(made: list[FakeVhost]) -> None:
    async with plugged() as net:
        offered = await net.rig.driver.read_features()
        assert not offered & (features.RING_PACKED | features.IN_ORDER)
        assert not offered & (features.NET_CTRL_RX | features.NET_CTRL_VLAN)
        assert offered & features.NET_CTRL_GUEST_OFFLOADS
        assert offered & features.NET_HOST_TSO4


async def test_a_kick_is_the_kernels(made: list[FakeVhost]) -> None:
    async with plugged() as net:
        net.rig.driver.kick(0)
        await settle()
        assert os.eventfd_read(net.rig.device.queues[0].kick_fd) > 0


async def test_at_rest_the_kernel_has_no_ring_and_goes_on_where_it_was(
    made: list[FakeVhost],
) -> None:
    async with plugged() as net:
        (kernel,) = made
        kernel.base = 17
        await net.rig.device.quiesce()
        assert kernel.rings == {}
        await net.rig.device.resume()
        assert {ring.base for ring, _ in kernel.rings.values()} == {17}
        assert [queue.base for queue in net.rig.device.queues[:2]] == [17, 17]


async def test_after_a_reset_rings_begin_anew(made: list[FakeVhost]) -> None:
    async with plugged() as net:
        (kernel,) = made
        kernel.base = 17
        await net.rig.driver.write(mmio.STATUS, 0)
        assert kernel.rings == {}
        await net.rig.driver.start()
        assert {ring.base for ring, _ in kernel.rings.values()} == {0}


async def test_one_ring_is_taken_away_and_the_other_goes_on(made: list[FakeVhost]) -> None:
    async with plugged() as net:
        (kernel,) = made
        kernel.base = 9
        await net.rig.driver.write(mmio.QUEUE_SEL, 1)
        await net.rig.driver.write(mmio.QUEUE_READY, 0)
        assert {index: ring.base for index, (ring, _) in kernel.rings.items()} == {0: 9}


async def test_on_mmio_an_interrupt_of_the_kernels_has_a_status(made: list[FakeVhost]) -> None:
    async with net_rig(1, vhost=True) as net:
        (kernel,) = made
        os.eventfd_write(kernel.rings[0][0].call_fd, 1)
        assert await net.rig.driver.interrupted() == USED_BUFFER


async def test_on_pci_the_kernel_raises_the_queues_own_vectors(made: list[FakeVhost]) -> None:
    tap = FakeTap()

    async def build(context: DeviceContext) -> NetDevice:
        context.stack.callback(tap.wire.close)
        context.stack.push_async_callback(tap.close)
        return NetDevice(Tap("avtest0", vhost=True), tap, context)

    async with pci_rig(build) as rig:
        await rig.driver.start()
        (kernel,) = made
        for index in (0, 1):
            assert kernel.rings[index][0].call_fd == rig.transport.msix.fd(index + 1)
        await rig.driver.write(pci_common.QUEUE_SELECT, 2, 1)
        await rig.driver.write(pci_common.QUEUE_MSIX_VECTOR, 2, pci_vectors.NO_VECTOR)
        assert kernel.rings[1][0].call_fd == NO_FD
        await rig.driver.write(pci_common.QUEUE_MSIX_VECTOR, 2, 1)
        assert kernel.rings[1][0].call_fd == rig.transport.msix.fd(1)
        assert ("stop", 1) not in kernel.calls


async def test_a_broken_ring_is_the_guests_fault(made: list[FakeVhost]) -> None:
    async with plugged() as net:
        (kernel,) = made
        os.eventfd_write(kernel.rings[0][0].error_fd, 1)
        assert await net.rig.driver.interrupted() == CONFIG_CHANGE
        assert net.rig.driver.read(mmio.STATUS) & DEVICE_NEEDS_RESET
        assert net.rig.device.statistics().last_fault == "vhost"
        assert kernel.rings == {}


async def test_without_a_cable_the_kernel_has_no_ring(made: list[FakeVhost]) -> None:
    async with plugged() as net:
        (kernel,) = made
        net.rig.device.set_link(False)
        assert kernel.rings == {}
        await net.rig.device.quiesce()
        await net.rig.device.resume()
        assert kernel.rings == {}
        net.rig.device.set_link(True)
        assert sorted(kernel.rings) == [0, 1]


async def test_a_tap_that_is_taken_away_costs_the_carrier(
    made: list[FakeVhost], caplog: pytest.LogCaptureFixture
) -> None:
    async with plugged() as net:
        # What a TAP that somebody deleted shows is an error; a socket hangs up instead.
        net.tap.wire.shutdown(socket.SHUT_RDWR)
        assert await net.rig.driver.interrupted() == CONFIG_CHANGE
        assert not net.rig.device.link_up
        assert made[0].rings == {}
    assert "avtest0" in caplog.text


async def test_pairs_are_handed_over_as_the_driver_uses_them(made: list[FakeVhost]) -> None:
    async with plugged(pairs=2, size=16) as net:
        assert [sorted(kernel.rings) for kernel in made] == [[0, 1], []]
        assert await net.control(bytes([4, 0]) + struct.pack("<H", 2)) == OK
        assert [sorted(kernel.rings) for kernel in made] == [[0, 1], [0, 1]]
        assert made[1].rings[0][1] == net.tap.fds[1]


async def test_without_vhost_net_nothing_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    missing = functools.partial(vhost.VhostNet, "/dev/there-is-no-vhost-net")
    monkeypatch.setattr(net_vhost, "VhostNet", missing)
    before = set(os.listdir("/proc/self/fd"))
    with pytest.raises(HostError, match="modprobe vhost_net"):
        async with plugged():
            pass
    assert set(os.listdir("/proc/self/fd")) == before
