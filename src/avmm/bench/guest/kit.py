"""The kernels, initramfs and tools that scripts/assets makes, found by its own rule."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from avmm.errors import HostError


@dataclass(frozen=True, slots=True)
class Kit:
    """Paths under the folder of scripts/assets."""

    folder: Path

    @classmethod
    def find(cls) -> Self:
        """HostError("bench-assets") when something is not there."""
        cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
        kit = cls(Path(os.environ.get("AVMM_CACHE") or Path(cache) / "avmm"))
        for path in (kit.kernel, kit.initrd, kit.bench_initrd):
            if not path.exists():
                raise HostError(
                    "bench-assets",
                    op=f"{path} is missing",
                    remedy="run scripts/assets cloud bench, or scripts/bench",
                )
        return kit

    @property
    def kernel(self) -> Path:
        """Debian's kernel for clouds, as a bzImage."""
        return self.folder / "kernels/cloud/vmlinuz"

    @property
    def initrd(self) -> Path:
        """Its modules and a busybox."""
        return self.folder / "guest/cloud/initrd.img"

    @property
    def bench_initrd(self) -> Path:
        """The same with fio, iperf3, pps and vsock in /bench."""
        return self.folder / "bench/initrd.img"

    def iperf3(self, *arguments: str) -> list[str]:
        """The guest's iperf3, with the guest's libraries, as a command of the host."""
        return [str(self.folder / "bench/bin/iperf3"), *arguments]

    def pps(self, *arguments: str) -> list[str]:
        """The counter of small packets, as a command of the host."""
        return [str(self.folder / "bench/tools/pps"), *arguments]

    def vsock(self, *arguments: str) -> list[str]:
        """The guest's program for vsock, as a command of the host."""
        return [str(self.folder / "bench/tools/vsock"), *arguments]
