"""What a worker is handed, since it can open nothing: the files of a configuration."""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from contextlib import AsyncExitStack, ExitStack
from typing import Any

import msgspec

from avmm.agent.program import PROGRAM, open_program
from avmm.block.raw import image_flags, open_image
from avmm.boot.load import open_boot_file
from avmm.errors import ConfigError
from avmm.hostnet.tap import HostTap, TapSettings, handed_tap, open_tap
from avmm.kvm.system import KVM_PATH, Kvm
from avmm.machine.config import Config
from avmm.machine.isolation.messages import HandedTap
from avmm.virtio.devices.blk import Disk
from avmm.virtio.devices.net import Tap, tap_settings
from avmm.virtio.devices.vsock import Vsock

_NOT_YET = {
    "ports": "their streams are in the program",
    "devices": "they are objects of the program",
}


def check_isolation(config: Config) -> None:
    """Raises ConfigError("isolation") for what a worker process cannot have, by its field."""
    for name, why in _NOT_YET.items():
        if getattr(config, name):
            raise _refused(name, why)
    for index, net in enumerate(config.nets):
        if not isinstance(net, Tap):
            raise _refused(f"nets[{index}]", "it is an object of the program")
        if net.vhost:
            raise _refused(f"nets[{index}].vhost", "the kernel asks for more than a TAP then")
    for index, disk in enumerate(config.disks):
        if not isinstance(disk, Disk):
            raise _refused(f"disks[{index}]", "it is an object of the program")


def _refused(field: str, why: str) -> ConfigError:
    return ConfigError(
        "isolation", f"{field}: not with isolation by process, since {why}; leave one of them out"
    )


def disks_of(config: Config) -> dict[str, Disk]:
    """The disks, by their ids."""
    return {id: device for id, device in config.all_devices() if isinstance(device, Disk)}


def nics_of(config: Config) -> dict[str, Tap]:
    """The NICs, by their ids."""
    return {id: device for id, device in config.all_devices() if isinstance(device, Tap)}


async def open_taps(config: Config, stack: AsyncExitStack) -> list[HostTap]:
    """All TAPs, in their order; `stack` closes and undoes them. Raises ConfigError, HostError."""
    taps: list[HostTap] = []
    for net in nics_of(config).values():
        tap = await open_tap(tap_settings(net, config.cpus, config.io_threads))
        stack.push_async_callback(tap.close)
        taps.append(tap)
    return taps


def config_values(config: Config) -> dict[str, Any]:
    """The configuration as plain values, for Config.from_values()."""
    values: dict[str, Any] = msgspec.to_builtins(config)
    for name in _NOT_YET:
        del values[name]
    if isinstance(config.vsock, Vsock):
        values["vsock"]["uds"] = None  # the program listens, and connects
    return values


def open_files(config: Config, stack: ExitStack) -> list[tuple[str, int, int]]:
    """Path, flags and descriptor of each, checked and locked; `stack` closes them.

    Raises ConfigError, HostError, as a start in this process does.
    """
    opened: list[tuple[str, int, int]] = []

    def add(path: str, flags: int, fd: int) -> None:
        stack.callback(os.close, fd)
        opened.append((path, flags, fd))

    kvm = Kvm.open()
    add(KVM_PATH, os.O_RDWR, kvm.fd)
    add(config.kernel, os.O_RDONLY, open_boot_file(config.kernel, "kernel"))
    if config.initrd is not None:
        add(config.initrd, os.O_RDONLY, open_boot_file(config.initrd, "initrd"))
    if config.agent and config.initrd is not None:
        add(str(PROGRAM), os.O_RDONLY, open_program())
    for disk in disks_of(config).values():
        flags = image_flags(read_only=disk.read_only, direct=disk.direct)
        fd = open_image(disk.path, read_only=disk.read_only, direct=disk.direct)
        add(disk.path, flags, fd)
    return opened


class Handed:
    """An opener that gives what was handed in, each descriptor once. fds: of the files, then of
    the TAPs."""

    def __init__(
        self,
        files: Sequence[tuple[str, int]],
        fds: Sequence[int],
        taps: Sequence[HandedTap] = (),
    ) -> None:
        left = iter(fds)
        self._left = [(path, flags, next(left)) for path, flags in files]
        self._taps = {tap.name: (tap, [next(left) for _ in range(tap.queues)]) for tap in taps}

    async def open_tap(self, settings: TapSettings) -> HostTap:
        """The TAP of that name."""
        tap, fds = self._taps.pop(settings.name)
        return handed_tap(settings, fds, mtu=tap.mtu, uso=tap.uso)

    def __call__(self, path: str, flags: int) -> int:
        for index, (has_path, has_flags, fd) in enumerate(self._left):
            if (path, flags) == (has_path, has_flags):
                del self._left[index]
                return fd
        raise OSError(errno.ENOENT, os.strerror(errno.ENOENT), path)
