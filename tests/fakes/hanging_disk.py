"""A program that serves a disk on a file system that hangs, and looks at what becomes of it.

python -m fakes.hanging_disk FOLDER ENGINE IO_THREADS: in a mount namespace of its own. What goes
wrong ends it with a traceback.
"""

from __future__ import annotations

import asyncio
import os
import sys
import threading
from pathlib import Path

import pytest

from avmm.block.raw import RawDisk
from avmm.errors import ConfigError, HostError
from avmm.units import KIB, MIB
from avmm.virtio.devices import blk
from avmm.virtio.devices.blk import BlkDevice, Disk, build
from fakes.blk_driver import FLUSH, IN, OK, OUT, BlkDriver
from fakes.hanging_fs import HangingFs, hanging_fs
from fakes.mmio_driver import eventually, settle
from fakes.virtio_rig import Rig, virtio_rig
from linux.holdings import Holdings

HANG_AT = 64 * KIB
PENDING = 0xFF
SHORT_S = 0.05
"""For what never ends."""


async def hang(rig: Rig[BlkDevice], fs: HangingFs) -> list[int]:
    """Requests that are not answered, and others that are."""
    driver = BlkDriver(rig)
    fs.hang(HANG_AT)
    sector = HANG_AT // 512
    slots = [driver.submit(IN, sector, read_bytes=4096)]
    driver.kick()
    for turn in range(20):
        assert await driver.request(OUT, 8, bytes([turn]) * 512) == (OK, b"")
    assert (await driver.request(FLUSH))[0] == OK
    # Writes of one file exclude each other on many file systems, so this is the last.
    slots.append(driver.submit(OUT, sector, b"h" * 4096))
    driver.kick()
    assert (await driver.request(IN, 8, read_bytes=512))[0] == OK
    assert [driver.status(slot) for slot in slots] == [PENDING] * 2
    return slots


async def others_go_on_and_a_rest_can_be_given_up(
    disk: Disk, fs: HangingFs, io_threads: int
) -> None:
    async with virtio_rig(lambda context: build(disk, context), io_threads=io_threads) as rig:
        await rig.driver.start()
        slots = await hang(rig, fs)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(SHORT_S):
                await rig.device.quiesce()
        await rig.device.resume()
        fs.go()
        await rig.driver.used(0, 2)
        driver = BlkDriver(rig)
        assert [driver.status(slot) for slot in slots] == [OK, OK]
        assert (await driver.request(FLUSH))[0] == OK
        await rig.device.quiesce()


async def an_end_leaves_it_to_itself(disk: Disk, fs: HangingFs, io_threads: int) -> None:
    before, tasks = Holdings.now(), len(os.listdir("/proc/self/task"))

    async def serve() -> None:
        async with virtio_rig(lambda context: build(disk, context), io_threads=io_threads) as rig:
            await rig.driver.start()
            await hang(rig, fs)

    with pytest.raises(HostError, match=str(fs.disk)) as caught:
        await serve()
    assert caught.value.kind == "disk-hangs"
    held = Holdings.now().beyond(before)
    assert held["KiB of guest memory"] > 0
    assert held["thread avmm-late"] == 1
    with pytest.raises(ConfigError, match="in use"):
        RawDisk.open(disk.path, read_only=False, direct=False)
    (late,) = [thread for thread in threading.enumerate() if thread.name == "avmm-late"]
    fs.go()
    late.join()
    assert not Holdings.now().beyond(before)
    await eventually(lambda: _tasks() <= tasks)
    async with virtio_rig(lambda context: build(disk, context), io_threads=io_threads) as rig:
        await rig.driver.start()
        assert (await BlkDriver(rig).request(IN, 0, read_bytes=512))[0] == OK


def _tasks() -> int:
    """Threads, but for io_uring's."""
    count = 0
    for task in Path("/proc/self/task").iterdir():
        try:
            count += not (task / "comm").read_text().startswith("iou-")
        except OSError:
            continue
    return count


async def main(folder: str, engine: str, io_threads: int) -> None:
    blk.HANG_S = SHORT_S
    with hanging_fs(Path(folder), MIB) as fs:
        disk = Disk(str(fs.disk), engine=engine)  # type: ignore[arg-type]
        for case in (others_go_on_and_a_rest_can_be_given_up, an_end_leaves_it_to_itself):
            await case(disk, fs, io_threads)
            await settle()
            print(case.__name__)


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], sys.argv[2], int(sys.argv[3])))
