"""What a built machine is made of, and what MicroVM asks of it, wherever it runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from avmm.console.console import Console
from avmm.errors import ConfigError, GuestFault
from avmm.frozen import FrozenDict
from avmm.legacy.acpi_pm import AcpiPm
from avmm.legacy.serial16550 import Serial16550
from avmm.log import GuestLog
from avmm.machine.reason import ExitReason
from avmm.machine.statistics import MachineStatistics
from avmm.machine.vcpu.thread import VcpuThread
from avmm.machine.vcpu.wake import Gate
from avmm.virtio.device import VirtioDevice
from avmm.virtio.devices.blk import BlkDevice
from avmm.virtio.devices.console import ConsoleDevice
from avmm.virtio.devices.net import NetDevice
from avmm.virtio.devices.port import GuestPort
from avmm.virtio.devices.ports import PortsDevice
from avmm.virtio.devices.vsock import VsockDevice
from avmm.virtio.home import Homes
from avmm.virtio.limit import RateLimit
from avmm.vsock.host import VsockHost

End = Callable[[ExitReason], None]


@dataclass(frozen=True, slots=True)
class Reports:
    """Whom the parts tell what happens; all are called on the loop.

    end: whenever the machine has to end, maybe many times. fault, ready, link: of a device, by its
    id: what the guest did wrong, whether its driver is set up, whether its cable is in.
    """

    end: End
    fault: Callable[[str, GuestFault], None]
    ready: Callable[[str, bool], None]
    link: Callable[[str, bool], None]
    console_closed: Callable[[], None]


class Machine(Protocol):
    """A built machine, owned by the exit stack it was built on. Loop.

    What a microVM's configuration has not got is asked for all the same: ConfigError then.
    """

    @property
    def serial_console(self) -> Console:
        """On the serial port."""
        ...

    @property
    def console(self) -> Console:
        """On virtio where there is that, else serial_console."""
        ...

    def port(self, name: str) -> GuestPort:
        """A port, by its name."""
        ...

    @property
    def vsock(self) -> VsockHost:
        """The host's side of its vsock."""
        ...

    def go(self) -> None:
        """The first guest instruction."""
        ...

    def stop(self) -> None:
        """The last one: the exit stack will be closed soon. Idempotent."""
        ...

    async def finish(self) -> None:
        """After stop(): wait until what statistics() say is final."""
        ...

    async def pause(self, check: Callable[[], None]) -> None:
        """Bring vCPUs and devices to rest. check: raises when that is not wanted any more."""
        ...

    async def resume(self, alive: Callable[[], bool]) -> None:
        """Let all go on, also what a pause that was cut short has brought to rest. alive: whether
        that is still wanted."""
        ...

    def press_power_button(self) -> None:
        """Once."""
        ...

    def set_link(self, id: str, up: bool) -> None:
        """As MicroVM's."""
        ...

    def set_disk_limit(self, id: str, limit: RateLimit | None) -> None:
        """As MicroVM's."""
        ...

    def set_nic_limits(self, id: str, rx: RateLimit | None, tx: RateLimit | None) -> None:
        """As MicroVM's."""
        ...

    def statistics(self, state: str, start_s: float) -> MachineStatistics:
        """As far as they are known here."""
        ...


def no_vsock() -> ConfigError:
    """For a microVM without."""
    return ConfigError("vsock", "vsock: this microVM has none; use Config(vsock=Vsock())")


@dataclass(frozen=True, slots=True)
class Parts:
    """The machine of this process."""

    gate: Gate
    serial_console: Console
    serial: Serial16550
    power: AcpiPm
    threads: tuple[VcpuThread, ...]
    devices: dict[str, VirtioDevice]
    homes: Homes
    guest_log: GuestLog

    @property
    def console(self) -> Console:
        """See Machine, here and below."""
        for device in self.devices.values():
            if isinstance(device, ConsoleDevice):
                return device.console
        return self.serial_console

    def port(self, name: str) -> GuestPort:
        known: list[str] = []
        for device in self.devices.values():
            if isinstance(device, PortsDevice):
                if name in device.ports:
                    return device.ports[name]
                known += device.ports
        there = f"there are {', '.join(known)}" if known else "use Config(ports=Ports([...]))"
        raise ConfigError("port", f"port: this microVM has no port {name!r}; {there}")

    @property
    def vsock(self) -> VsockHost:
        for device in self.devices.values():
            if isinstance(device, VsockDevice):
                return device.host
        raise no_vsock()

    def go(self) -> None:
        self.gate.resume()

    def stop(self) -> None:
        self.gate.stop()

    async def finish(self) -> None:
        """Nothing is missing here."""

    async def pause(self, check: Callable[[], None]) -> None:
        await self.gate.pause()
        for device in self.devices.values():
            check()
            await device.quiesce()

    async def resume(self, alive: Callable[[], bool]) -> None:
        for device in self.devices.values():
            if not alive():
                return
            await device.resume()
        self.gate.resume()

    def press_power_button(self) -> None:
        self.power.press_power_button()

    def set_link(self, id: str, up: bool) -> None:
        device = self.devices.get(id)
        if not isinstance(device, NetDevice):
            raise ConfigError("device", f"set_link: this microVM has no NIC {id!r}")
        device.set_link(up)

    def set_disk_limit(self, id: str, limit: RateLimit | None) -> None:
        device = self.devices.get(id)
        if not isinstance(device, BlkDevice):
            raise ConfigError("device", f"set_disk_limit: this microVM has no disk {id!r}")
        device.set_limit(limit)

    def set_nic_limits(self, id: str, rx: RateLimit | None, tx: RateLimit | None) -> None:
        device = self.devices.get(id)
        if not isinstance(device, NetDevice):
            raise ConfigError("device", f"set_nic_limits: this microVM has no NIC {id!r}")
        device.set_limits(rx=rx, tx=tx)

    def statistics(self, state: str, start_s: float) -> MachineStatistics:
        return MachineStatistics(
            state=state,
            start_s=start_s,
            vcpus=tuple(thread.statistics() for thread in self.threads),
            console=self.serial.statistics(),
            devices=FrozenDict((name, dev.statistics()) for name, dev in self.devices.items()),
            homes=self.homes.statistics(),
            log_lines_left_out=self.guest_log.left_out,
        )
