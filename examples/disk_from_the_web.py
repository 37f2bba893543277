"""A guest whose disk is a file on a web server: read as it is needed, and never written.

Usage: python examples/disk_from_the_web.py KERNEL INITRD http://images.example/root.ext4

What the guest writes is kept in memory, by the disk of this file's own making.
"""

from __future__ import annotations

import asyncio
import sys

import avmm
from avmm.block.objects import HttpDisk

PAGE_BYTES = 4096


class KeepsWrites:
    """A disk over another that is only read: pages that were written are here."""

    def __init__(self, base: HttpDisk) -> None:
        self.base = base
        self.size = base.size
        self.pages: dict[int, bytearray] = {}
        self.copying = asyncio.Lock()

    async def read(self, offset: int, size: int) -> bytes:
        """The base's bytes, with what was written in their place."""
        data = bytearray(await self.base.read(offset, size))
        for number, begin, end in pages(offset, size):
            if page := self.pages.get(number):
                at = number * PAGE_BYTES + begin - offset
                data[at : at + end - begin] = page[begin:end]
        return bytes(data)

    async def write(self, offset: int, data: bytes) -> None:
        """Into pages of our own, each copied from the base at first."""
        for number, begin, end in pages(offset, len(data)):
            async with self.copying:  # two writes to a page must not both copy it
                if number not in self.pages:
                    first = number * PAGE_BYTES
                    room = min(PAGE_BYTES, self.size - first)
                    self.pages[number] = bytearray(await self.base.read(first, room))
            at = number * PAGE_BYTES + begin - offset
            self.pages[number][begin:end] = data[at : at + end - begin]


def pages(offset: int, size: int) -> list[tuple[int, int, int]]:
    """(number, begin, end) of each page's part of a range."""
    numbers = range(offset // PAGE_BYTES, (offset + size - 1) // PAGE_BYTES + 1)
    starts = [(number, number * PAGE_BYTES) for number in numbers]
    return [
        (number, max(offset - at, 0), min(offset + size - at, PAGE_BYTES)) for number, at in starts
    ]


async def main(kernel: str, initrd: str | None, url: str, cmdline: str = "") -> avmm.ExitReason:
    """Run the guest to its end; what it has on its console comes here."""
    async with HttpDisk(url) as base:
        disk = KeepsWrites(base)
        config = avmm.Config(
            kernel=kernel,
            initrd=initrd,
            cmdline=cmdline or "console=ttyS0 root=/dev/vda",
            disks=[avmm.AsyncDisk(disk)],
        )
        async with avmm.MicroVM(config) as vm:
            reader, _ = vm.console.open()
            while data := await reader.read(4096):
                print(data.decode(errors="replace"), end="", flush=True)
            reason = await vm.wait()
        print(f"\n{reason}; {base.statistics()}; {len(disk.pages)} pages written")
        return reason


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
