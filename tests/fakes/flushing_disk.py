"""A program that serves a disk to a driver of its own, for tests that kill it.

python -m fakes.flushing_disk IMAGE ENGINE IO_THREADS: writes generation after generation of all
blocks, flushes, and prints what it does: "write", "flush" and "done" with the generation's number,
the first two when the device has them to do, the last when it has acknowledged the flush.
"""

from __future__ import annotations

import asyncio
import hashlib
import sys
from pathlib import Path

from avmm.virtio.devices.blk import Disk, build
from fakes.blk_driver import FLUSH, OK, OUT, BlkDriver
from fakes.virtio_rig import virtio_rig

BLOCKS = 16
BLOCK_BYTES = 4096


def block(generation: int, index: int) -> bytes:
    """What a generation writes to a block: its number, then what nobody else would write."""
    seed = generation.to_bytes(8, "little")
    return seed + hashlib.shake_128(seed + bytes([index])).digest(BLOCK_BYTES - len(seed))


def generations(image: Path) -> list[int | None]:
    """Of each block of the image; None for one that no generation has written so."""
    found: list[int | None] = []
    data = image.read_bytes()
    for index in range(BLOCKS):
        content = data[index * BLOCK_BYTES : (index + 1) * BLOCK_BYTES]
        generation = int.from_bytes(content[:8], "little")
        found.append(generation if content == block(generation, index) else None)
    return found


async def _serve(image: str, engine: str, io_threads: int) -> None:
    disk = Disk(image, engine=engine)  # type: ignore[arg-type]
    async with virtio_rig(lambda context: build(disk, context), io_threads=io_threads) as rig:
        await rig.driver.start()
        blk = BlkDriver(rig)
        generation = 0
        while True:
            generation += 1
            sectors = BLOCK_BYTES // 512
            slots = [blk.submit(OUT, i * sectors, block(generation, i)) for i in range(BLOCKS)]
            blk.kick()
            print("write", generation, flush=True)
            await rig.driver.used(0, BLOCKS)
            assert {blk.status(slot) for slot in slots} == {OK}
            slot = blk.submit(FLUSH)
            blk.kick()
            print("flush", generation, flush=True)
            await rig.driver.used(0)
            assert blk.status(slot) == OK
            print("done", generation, flush=True)


if __name__ == "__main__":
    asyncio.run(_serve(sys.argv[1], sys.argv[2], int(sys.argv[3])))
