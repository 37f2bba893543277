"""The configuration of a microVM: one schema for Python, option strings, TOML and JSON."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, Self

import msgspec

from avmm.agent.program import RDINIT, check_program
from avmm.boot.cmdline import guest_address, network_address, with_rdinit
from avmm.config import Checked, convert, parse_option, read_file
from avmm.console.console import SCROLLBACK_BYTES, check_scrollback
from avmm.errors import ConfigError
from avmm.mem.layout import CPUS_MAX
from avmm.mem.region import HUGE_PAGE_BYTES
from avmm.units import MIB, PAGE_BYTES, format_size, parse_size
from avmm.virtio.devices.blk import Disk
from avmm.virtio.devices.blk_source import AsyncDisk
from avmm.virtio.devices.console import VirtioConsole
from avmm.virtio.devices.net import Tap
from avmm.virtio.devices.nic import Nic
from avmm.virtio.devices.ports import Ports
from avmm.virtio.devices.rng import Rng
from avmm.virtio.devices.vsock import Vsock
from avmm.virtio.features import RING_DEFAULT, RingLayout
from avmm.virtio.python_device import PythonDevice, check_device

_MEMORY_MIN_BYTES = 2 * MIB
_IO_THREADS_MAX = 64
_IO_POLL_MAX_US = 1_000_000
EXIT_SHARE_MIN = 0.001

DeviceConfig = Disk | AsyncDisk | Tap | Nic | Rng | Vsock | VirtioConsole | Ports | PythonDevice

DEVICE_STRUCTS: dict[str, type[Disk | Tap | Rng | Vsock | VirtioConsole | Ports]] = {
    "disks": Disk,
    "nets": Tap,
    "rng": Rng,
    "vsock": Vsock,
    "console": VirtioConsole,
    "ports": Ports,
}
"""The fields of Config that hold devices. A new kind of device is one more field and entry."""


def _meta(description: str) -> msgspec.Meta:
    return msgspec.Meta(description=description)


class Config(Checked, frozen=True, kw_only=True):
    """All that a microVM is made of. Checked when it is made: raises ConfigError."""

    kernel: Annotated[str, _meta("bzImage or ELF vmlinux")]
    initrd: Annotated[str | None, _meta("initial RAM disk")] = None
    cmdline: Annotated[str, _meta("kernel command line")] = "console=ttyS0"
    kernel_format: Annotated[
        Literal["auto", "bzimage", "pvh", "elf64"],
        _meta("how the kernel is entered: auto, bzimage (it unpacks itself), pvh or elf64"),
    ] = "auto"
    cpus: Annotated[int, _meta("number of vCPUs")] = 1
    memory: Annotated[str | int, _meta("RAM, in bytes or like 512M or 2G")] = "256M"
    hugepages: Annotated[bool, _meta("back the RAM with huge pages of 2M")] = False
    disks: Annotated[list[Disk | AsyncDisk], _meta("disks, in the order of /dev/vda, vdb, ...")] = (
        msgspec.field(default_factory=list)
    )
    nets: Annotated[
        list[Tap | Nic],
        _meta("network interfaces, each on a TAP of the host or in Python"),
    ] = msgspec.field(default_factory=list)
    rng: Annotated[bool | Rng, _meta("give the guest a source of random bytes")] = False
    vsock: Annotated[
        bool | Vsock | None, _meta("sockets between programs of the guest and of the host")
    ] = None
    devices: Annotated[
        list[PythonDevice],
        msgspec.Meta(description="devices written in Python", extra={"python_only": True}),
    ] = msgspec.field(default_factory=list)
    console: Annotated[
        bool | VirtioConsole, _meta("give the guest a console on virtio, /dev/hvc0")
    ] = False
    ports: Annotated[Ports | None, _meta("byte streams to programs in the guest")] = None
    agent: Annotated[
        bool,
        _meta(
            "add the guest agent to the initrd, for exec and cp; without an initrd the guest "
            "has to start one itself"
        ),
    ] = False
    transport: Annotated[
        Literal["pci", "mmio"],
        _meta("how devices are attached: pci (fast, up to 31) or mmio (small, up to 15)"),
    ] = "pci"
    ring: Annotated[
        RingLayout,
        _meta("rings that devices offer: packed (the guest may still choose split), or split only"),
    ] = RING_DEFAULT
    io_threads: Annotated[int, _meta("native threads that serve devices; 0: the event loop")] = 0
    io_poll_us: Annotated[
        int,
        _meta("microseconds, at most, that an I/O thread looks for work before it sleeps"),
    ] = 50
    exit_share: Annotated[
        float,
        _meta(
            "the most that exits answered in Python may take of a processor's time, from 0.001 "
            "to 1; a guest that wants more is slowed down, but by 1 never"
        ),
    ] = 0.2
    scrollback: Annotated[
        str | int, _meta("how much of its serial console's output is kept, in bytes or like 256K")
    ] = SCROLLBACK_BYTES
    on_reboot: Annotated[
        Literal["stop", "restart"], _meta("what a reboot of the guest does: stop or restart")
    ] = "stop"
    stop_grace_s: Annotated[
        float, _meta("seconds between the power button and the end of a guest that ignores it")
    ] = 10.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_cpus()
        self._check_memory()
        if self.agent and self.initrd:
            check_program()
        if not self.stop_grace_s >= 0:
            raise ConfigError("grace", f"stop_grace_s: {self.stop_grace_s} is negative or no time")
        if not EXIT_SHARE_MIN <= self.exit_share <= 1:
            raise ConfigError(
                "share", f"exit_share: {self.exit_share} is not in {EXIT_SHARE_MIN} to 1"
            )
        check_scrollback(self.scrollback, "scrollback")
        check_io(self.io_threads, self.io_poll_us, self.all_devices())
        self._check_devices()

    @classmethod
    def from_values(cls, values: Mapping[str, Any], what: str) -> Self:
        """From plain values, as a config file holds them; `what` begins an error's message."""
        return convert(_with_structs(values, what), cls, f"{what}: ")

    @classmethod
    def from_file(cls, path: str) -> Self:
        """From a .toml or .json file with this class's field names."""
        return cls.from_values(read_file(path), f"Config file {path}")

    @property
    def memory_bytes(self) -> int:
        """RAM in bytes."""
        return parse_size(self.memory, "memory")

    @property
    def scrollback_bytes(self) -> int:
        """What is kept of the serial console's output."""
        return parse_size(self.scrollback, "scrollback")

    # What follows is for the machine.

    def all_devices(self) -> list[tuple[str, DeviceConfig]]:
        """(id, config struct) of each device, in the order of their slots."""
        found: list[tuple[str, DeviceConfig]] = []
        rng = [self.rng if isinstance(self.rng, Rng) else Rng()] if self.rng else []
        wanted = self.vsock or self.agent
        vsock = [self.vsock if isinstance(self.vsock, Vsock) else Vsock()] if wanted else []
        groups: tuple[Sequence[DeviceConfig], ...] = (
            *(self.disks, self.nets, rng, vsock, self._consoles()),
            [self.ports] if self.ports is not None else [],
            self.devices,
        )
        for group in groups:
            for index, device in enumerate(group):
                found.append((device.id or f"{device.device_type.name}{index}", device))
        return found

    def _consoles(self) -> list[VirtioConsole]:
        if isinstance(self.console, VirtioConsole):
            return [self.console]
        return [VirtioConsole()] if self.console else []

    def full_cmdline(self) -> str:
        """The command line, with ip= for NICs that ask for an address, console=hvc0 for a console
        on virtio, and the agent's rdinit=."""
        words = [self.cmdline]
        if self.console and "console=hvc" not in self.cmdline:
            words.append("console=hvc0")
        for index, net in enumerate(self.nets):
            if net.guest is None:
                continue
            if isinstance(net, Nic):
                words.append(network_address(net.guest, net.gateway, f"eth{index}"))
            elif net.host is not None:
                words.append(guest_address(net.guest, net.host, f"eth{index}"))
        line = " ".join(word for word in words if word)
        return with_rdinit(line, RDINIT)[0] if self.agent and self.initrd else line

    def next_init(self) -> str:
        """The initrd's own first program, before which the agent is started."""
        return with_rdinit(self.cmdline, RDINIT)[1]

    def check_host(self, total_bytes: int | None = None) -> None:
        """Raises ConfigError("memory") when this host has less RAM than the guest wants.

        total_bytes: the host's RAM; asked of the host by default.
        """
        if total_bytes is None:
            total_bytes = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        if self.memory_bytes > total_bytes:
            raise ConfigError(
                "memory",
                f"memory: {format_size(self.memory_bytes)} is more than the "
                f"{total_bytes // MIB}M of this host",
            )

    def _check_cpus(self) -> None:
        if not 1 <= self.cpus <= CPUS_MAX:
            raise ConfigError("cpus", f"cpus: {self.cpus} is not in 1 to {CPUS_MAX}")

    def _check_memory(self) -> None:
        size_bytes, page = self.memory_bytes, HUGE_PAGE_BYTES if self.hugepages else PAGE_BYTES
        if size_bytes < _MEMORY_MIN_BYTES:
            raise ConfigError(
                "memory",
                f"memory: {self.memory} is too small; no guest runs in less than "
                f"{format_size(_MEMORY_MIN_BYTES)} (a bare number means bytes)",
            )
        if size_bytes % page:
            raise ConfigError(
                "memory", f"memory: {self.memory} is not a multiple of {format_size(page)}"
            )

    def _check_devices(self) -> None:
        for index, device in enumerate(self.devices):
            check_device(device, f"devices[{index}]")
        _refuse_twice("id", [id for id, _ in self.all_devices()], "device id")
        _refuse_twice("tap", [net.name for net in self.nets if isinstance(net, Tap)], "TAP")
        _refuse_twice("nic", [repr(net) for net in self.nets if isinstance(net, Nic)], "NIC")
        files = [disk for disk in self.disks if isinstance(disk, Disk)]
        writers = {os.path.realpath(d.path) for d in files if not d.read_only}
        paths = [os.path.realpath(d.path) for d in files]
        _refuse_twice("disk", [p for p in paths if p in writers], "disk")


def check_io(threads: int, poll_us: int, devices: Sequence[tuple[str, DeviceConfig]]) -> None:
    """Raises ConfigError("io") for numbers out of range and for threads that are not there."""
    if not 0 <= threads <= _IO_THREADS_MAX:
        raise ConfigError("io", f"io_threads: {threads} is not in 0 to {_IO_THREADS_MAX}")
    if not 0 <= poll_us <= _IO_POLL_MAX_US:
        raise ConfigError("io", f"io_poll_us: {poll_us} is not in 0 to {_IO_POLL_MAX_US}")
    for id, device in devices:
        if getattr(device, "home", "loop") == "thread" and threads == 0:
            raise ConfigError("io", f"{id}: home=thread needs io_threads of 1 or more")


def _refuse_twice(kind: str, names: list[str], what: str) -> None:
    for name, count in Counter(names).items():
        if count > 1:
            raise ConfigError(kind, f"{what} {name!r} is given {count} times; each may come once")


def _with_structs(values: Mapping[str, Any], what: str) -> dict[str, Any]:
    """Device entries as structs: tables are checked by their own schema, strings are options."""
    result = dict(values)
    for name, struct in DEVICE_STRUCTS.items():
        entry = result.get(name)
        if isinstance(entry, list):
            places = (f"{what}: {name}[{at}]" for at in range(len(entry)))
            result[name] = [_device(e, struct, at) for e, at in zip(entry, places, strict=True)]
        elif isinstance(entry, dict | str):
            result[name] = _device(entry, struct, f"{what}: {name}")
    return result


def _device(entry: Any, struct: type[msgspec.Struct], what: str) -> Any:
    if isinstance(entry, str):
        return parse_option(entry, struct, what)
    return convert(entry, struct, f"{what}.") if isinstance(entry, dict) else entry
