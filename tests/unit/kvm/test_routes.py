"""The table of interrupts that KVM is given."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import pytest

from avmm.errors import HostError
from avmm.kvm import abi
from avmm.kvm.routes import MsiRoutes
from avmm.kvm.vm import Vm


class FakeVm:
    """Keeps the last table; refuses when told to."""

    def __init__(self) -> None:
        self.tables: list[list[tuple[int, ...]]] = []
        self.refuse = False

    def set_gsi_routing(self, entries: Sequence[bytes]) -> None:
        if self.refuse:
            raise HostError("ioctl", op="KVM_SET_GSI_ROUTING", errno=22)
        assert {len(entry) for entry in entries} == {48}
        self.tables.append([abi.IRQ_ROUTING_MSI.unpack(entry) for entry in entries])


@pytest.fixture
def vm() -> FakeVm:
    return FakeVm()


@pytest.fixture
def routes(vm: FakeVm) -> MsiRoutes:
    return MsiRoutes(cast(Vm, vm), 24)


def messages(table: list[tuple[int, ...]]) -> list[tuple[int, ...]]:
    return [entry for entry in table if entry[1] == abi.IRQ_ROUTING_MSI_TYPE]


def test_the_pins_stay_as_kvm_makes_them(vm: FakeVm, routes: MsiRoutes) -> None:
    routes.route(routes.new_gsi(), 0xFEE0_0000, 1)
    pins = [(e[0], e[4], e[5]) for e in vm.tables[0] if e[1] == abi.IRQ_ROUTING_IRQCHIP]
    ioapic = [(gsi, abi.IRQCHIP_IOAPIC, gsi) for gsi in range(24)]
    master = [(gsi, abi.IRQCHIP_PIC_MASTER, gsi) for gsi in range(8)]
    slave = [(gsi, abi.IRQCHIP_PIC_SLAVE, gsi - 8) for gsi in range(8, 16)]
    assert sorted(pins) == sorted(ioapic + master + slave)


def test_messages_come_behind_the_pins(vm: FakeVm, routes: MsiRoutes) -> None:
    first, second = routes.new_gsi(), routes.new_gsi()
    assert (first, second) == (24, 25)
    routes.route(second, 0x1_FEE0_1000, 0x41)
    routes.route(first, 0xFEE0_0000, 0x40)
    routes.route(second, 0xFEE0_2000, 0x42)
    assert messages(vm.tables[0]) == [(25, 2, 0, 0, 0xFEE0_1000, 1, 0x41, 0)]
    assert sorted(messages(vm.tables[-1])) == [
        (24, 2, 0, 0, 0xFEE0_0000, 0, 0x40, 0),
        (25, 2, 0, 0, 0xFEE0_2000, 0, 0x42, 0),
    ]


def test_the_same_message_again_is_no_call(vm: FakeVm, routes: MsiRoutes) -> None:
    gsi = routes.new_gsi()
    routes.route(gsi, 0xFEE0_0000, 0x40)
    routes.route(gsi, 0xFEE0_0000, 0x40)
    assert len(vm.tables) == 1


def test_a_message_that_is_refused_is_not_kept(vm: FakeVm, routes: MsiRoutes) -> None:
    first, second = routes.new_gsi(), routes.new_gsi()
    vm.refuse = True
    with pytest.raises(HostError):
        routes.route(first, 0xFEE0_0000, 0x40)
    vm.refuse = False
    routes.route(second, 0xFEE0_0000, 0x41)
    assert [message[0] for message in messages(vm.tables[0])] == [second]
