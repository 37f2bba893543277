"""Boots one stock kernel with a shell script to run, and tells what it did."""

from __future__ import annotations

import asyncio
import base64
import os
import re
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Self

import avmm

BASE_CMDLINE = "console=ttyS0 quiet panic=-1"
CMDLINE_MAX = 2047  # x86 COMMAND_LINE_SIZE without its NUL
BOOT_LIMIT_S = 300.0  # far beyond a slow boot: only a guest that hangs meets it


def emulated_cpu() -> bool:
    """Whether this machine's CPU is made in software (the testbed), where an exit costs 40 us."""
    return "QEMU TCG" in Path("/proc/cpuinfo").read_text()


def emulated_in_threads() -> bool:
    """Whether several threads emulate CPUs, as in a testbed of several: QEMU 7.2 is not faithful
    then, and a guest of several vCPUs at full load may end by a triple fault, whoever the VMM."""
    return emulated_cpu() and (os.cpu_count() or 1) > 1


@dataclass(frozen=True)
class Assets:
    """Files made by scripts/assets."""

    folder: Path

    @classmethod
    def locate(cls) -> Self:
        """By the same rule as scripts/lib.sh."""
        xdg = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
        return cls(Path(os.environ.get("AVMM_CACHE") or Path(xdg) / "avmm"))

    @property
    def root(self) -> Path:
        """A root file system for root=/dev/vda; to be copied, never written."""
        return self.folder / "guest/root.ext4"

    @property
    def busybox(self) -> Path:
        """Static tools for the host's side."""
        return self.folder / "busybox"

    def kernel(self, flavour: str, image: str) -> Path:
        """flavour: cloud, generic, rt; image: vmlinuz (bzImage) or vmlinux (ELF)."""
        return self.folder / "kernels" / flavour / image

    def initrd(self, flavour: str) -> Path:
        """The initramfs with the modules of this flavour."""
        return self.folder / "guest" / flavour / "initrd.img"

    def version(self, flavour: str) -> str:
        """What `uname -r` says in this kernel."""
        return (self.folder / "kernels" / flavour / "version").read_text().strip()

    def missing(self) -> list[Path]:
        """The files that are needed and not there."""
        needed = [self.root, self.busybox]
        for flavour in ("cloud", "generic", "rt"):
            needed += [self.kernel(flavour, "vmlinuz"), self.kernel(flavour, "vmlinux")]
            needed += [self.initrd(flavour)]
        return [path for path in needed if not path.exists()]


@dataclass
class Running:
    """A guest at work, and in the end what came of it."""

    vm: avmm.MicroVM
    began: float
    output: bytearray = field(default_factory=bytearray)
    reason: avmm.ExitReason | None = None
    seconds: float = 0.0
    "From start() to the end."

    @property
    def text(self) -> str:
        """All the guest wrote, with plain line ends."""
        return self.output.decode(errors="replace").replace("\r", "")

    @property
    def status(self) -> int | None:
        """The script's exit status; None when it did not come to its end."""
        found = re.search(r"^AVMM-EXIT: (\d+)$", self.text, re.MULTILINE)
        return int(found[1]) if found else None

    @property
    def kind(self) -> avmm.ExitKind:
        """Why it ended; only after the end."""
        assert self.reason is not None
        return self.reason.kind

    def facts(self, key: str) -> list[str]:
        """The values of all lines `FACT key value` the script printed."""
        return re.findall(rf"^FACT {re.escape(key)} ?(.*)$", self.text, re.MULTILINE)

    def fact(self, key: str) -> str:
        """The value of the one line `FACT key value`."""
        values = self.facts(key)
        assert len(values) == 1, f"{len(values)} lines 'FACT {key}' on the console"
        return values[0]

    async def listen(self) -> None:
        """Keep what the guest writes, to its end."""
        reader, _ = self.vm.serial.open(hold=True)
        while data := await reader.read(65536):
            self.output += data

    async def says(self, text: str, limit_s: float = BOOT_LIMIT_S) -> None:
        """Wait until the guest wrote this line."""
        await self.vm.serial.expect(rf"(?m)^{re.escape(text)}\r?\n".encode(), timeout=limit_s)

    async def ended(self) -> avmm.ExitReason:
        """Wait for the guest's own end."""
        async with asyncio.timeout(BOOT_LIMIT_S):
            return await self.vm.wait()

    def show(self) -> None:
        """Print for pytest, which keeps it for tests that fail."""
        print(f"--- guest: {self.reason}, {self.seconds:.1f} s, {self.vm.config}")
        print(self.text[-20000:])
        print("--- end of the guest's console")


class Guests:
    """Starts guests from the assets."""

    def __init__(self, assets: Assets) -> None:
        self.assets = assets

    def config(
        self,
        script: str = "",
        *,
        flavour: str = "cloud",
        image: str = "vmlinux",
        end: str = "poweroff",
        append: str = "",
        **options: Any,
    ) -> avmm.Config:
        """A configuration whose guest runs `script`, then ends as told.

        end: poweroff, reboot, crash or hang, see scripts/guest/init; append: more kernel command
        line; options: further fields of avmm.Config.
        """
        words = [BASE_CMDLINE, append, f"avmm.end={end}"]
        words.append("avmm.cmd=" + base64.b64encode((script or "true").encode()).decode())
        cmdline = " ".join(word for word in words if word)
        assert len(cmdline) < CMDLINE_MAX - 200, "the script is too long for a command line"
        defaults = {
            "memory": "256M",
            "transport": os.environ.get("AVMM_TRANSPORT", "pci"),
            "ring": os.environ.get("AVMM_RING", "packed"),
            "io_threads": int(os.environ.get("AVMM_IO_THREADS", "0")),
        }
        options = defaults | options
        return avmm.Config(
            kernel=str(self.assets.kernel(flavour, image)),
            initrd=str(self.assets.initrd(flavour)),
            cmdline=cmdline,
            **options,
        )

    @asynccontextmanager
    async def running(
        self, script: str = "", *, isolation: Literal["process"] | None = None, **options: Any
    ) -> AsyncIterator[Running]:
        """A started guest; killed on the way out if it still runs."""
        vm = avmm.MicroVM(self.config(script, **options), isolation=isolation)
        guest = Running(vm, time.monotonic())
        listening: asyncio.Task[None] | None = None
        try:
            async with vm:
                listening = asyncio.create_task(guest.listen())
                yield guest
            guest.reason = await vm.wait()
        finally:
            if listening is not None:
                await listening
            guest.seconds = time.monotonic() - guest.began
            guest.show()

    async def boot(self, script: str = "", **options: Any) -> Running:
        """Run a guest to its own end; its script has to end with status 0."""
        async with self.running(script, **options) as guest:
            await guest.ended()
        assert guest.status == 0, f"the guest's script: status {guest.status}"
        return guest
