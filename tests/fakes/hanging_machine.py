"""A program whose guest works on a disk that hangs, beside one whose disk does not.

python -m fakes.hanging_machine FOLDER ENGINE IO_THREADS: in a mount namespace of its own. What goes
wrong ends it with a traceback.
"""

from __future__ import annotations

import asyncio
import sys
import threading
from pathlib import Path

import pytest

import avmm
from avmm.bench.attacker import MEMORY_BYTES, PROGRAM, command_line
from avmm.loop import run
from avmm.units import KIB
from avmm.virtio.devices import blk
from fakes.hanging_fs import hanging_fs
from fakes.mmio_driver import eventually
from kvm.test_machine import held

SHORT_S = 0.2
"""For what never ends."""


def config(disk: Path, engine: str, io_threads: int) -> avmm.Config:
    return avmm.Config(
        kernel=str(PROGRAM),
        memory=MEMORY_BYTES,
        cmdline=command_line("behave", kind="blk", transport="pci"),
        disks=[avmm.Disk(str(disk), engine=engine)],  # type: ignore[arg-type]
        io_threads=io_threads,
    )


async def works(vm: avmm.MicroVM) -> None:
    reader, _ = vm.console.open(scrollback=False)
    assert await reader.readexactly(2) == b".."


async def main(folder: Path, engine: str, io_threads: int) -> None:
    blk.HANG_S = SHORT_S
    sound = folder.with_name("sound")
    sound.write_bytes(bytes(32 * KIB))
    with hanging_fs(folder, 32 * KIB) as fs:
        async with avmm.MicroVM(config(sound, "auto", 0)) as neighbour:
            before = held()
            vm = avmm.MicroVM(config(fs.disk, engine, io_threads))
            await vm.start()
            await works(vm)
            fs.hang()
            await works(neighbour)
            for _ in range(2):
                with pytest.raises(TimeoutError):
                    async with asyncio.timeout(SHORT_S):
                        await vm.pause()
                assert vm.state is avmm.State.RUNNING
            with pytest.raises(avmm.HostError, match=str(fs.disk)) as caught:
                await vm.kill()
            assert caught.value.kind == "disk-hangs"
            assert vm.state is avmm.State.STOPPED
            await works(neighbour)
            (late,) = [thread for thread in threading.enumerate() if thread.name == "avmm-late"]
            fs.go()
            late.join()
            await eventually(lambda: held() == before)
            await works(neighbour)
    print("done")


if __name__ == "__main__":
    run(main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])))
