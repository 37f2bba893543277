"""What a driver asked to receive, for the native datapath (virtio 1.3 section 5.1.6.5.1 to 3)."""

from __future__ import annotations

from avmm.native import CData, ffi
from avmm.virtio import features
from avmm.virtio.devices.net_control import MacTable, RxFlag, RxMode, Vlan

TABLE_MAX = 64


class ReceiveFilter:
    """Begins as after a reset: all is received, but for tagged frames once CTRL_VLAN is there.

    A MAC table too large for the datapath is taken for ALLUNI or ALLMULTI, as 5.1.6.5.2 allows.
    """

    def __init__(self, negotiated: int = 0) -> None:
        self._active = bool(negotiated & (features.NET_CTRL_RX | features.NET_CTRL_VLAN))
        self._by_vlan = bool(negotiated & features.NET_CTRL_VLAN)
        self._flags = {RxFlag.PROMISC}
        self._table = MacTable((), ())
        self._vlans: set[int] = set()

    def apply(self, command: RxMode | MacTable | Vlan) -> None:
        """Take a command of the driver's."""
        if isinstance(command, MacTable):
            self._table = command
        elif isinstance(command, RxMode):
            (self._flags.add if command.on else self._flags.discard)(command.flag)
        else:
            (self._vlans.add if command.add else self._vlans.discard)(command.number)

    def native(self, mac: bytes) -> CData:
        """A `struct av_net_filter *` for a guest with that address; NULL when all passes."""
        if not self._active:
            return ffi.NULL
        native = ffi.new("struct av_net_filter *")
        native.mac = mac
        flags = set(self._flags)
        table: list[bytes] = []
        for addresses, overflow in (
            (self._table.unicast, RxFlag.ALLUNI),
            (self._table.multicast, RxFlag.ALLMULTI),
        ):
            if len(table) + len(addresses) <= TABLE_MAX:
                table += addresses
            else:
                flags.add(overflow)
        for flag in flags:
            setattr(native, flag.name.lower(), 1)
        native.addresses = len(table)
        for index, address in enumerate(table):
            native.address[index] = address
        native.by_vlan = self._by_vlan
        for number in self._vlans:
            native.vlan[number // 64] |= 1 << number % 64
        return native
