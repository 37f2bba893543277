"""A program whose kernel refuses to start I/O, while a disk is in use.

python -m fakes.refusing_kernel IMAGE ERRNO IO_THREADS: fails when a request that could not be
started ends otherwise than with an error, or keeps the device from coming to rest.
"""

from __future__ import annotations

import asyncio
import ctypes
import platform
import struct
import sys

from avmm.virtio.devices.blk import Disk, build
from fakes.blk_driver import FLUSH, IOERR, OK, OUT, BlkDriver
from fakes.virtio_rig import virtio_rig

_IO_URING_ENTER = 426
_SECCOMP = {"x86_64": 317, "aarch64": 277}
_SET_MODE_FILTER, _TSYNC = 1, 1
_NO_NEW_PRIVS = 38
_LOAD, _JUMP_IF_EQUAL, _RETURN = 0x20, 0x15, 0x06
_ALLOW, _ERRNO = 0x7FFF0000, 0x00050000
ALL = 16


def refuse(errno: int) -> None:
    """From now on io_uring_enter() fails with `errno`, in every thread of this process."""
    steps = [
        (_LOAD, 0, 0, 0),  # the system call's number
        (_JUMP_IF_EQUAL, 0, 1, _IO_URING_ENTER),
        (_RETURN, 0, 0, _ERRNO | errno),
        (_RETURN, 0, 0, _ALLOW),
    ]
    code = ctypes.create_string_buffer(b"".join(struct.pack("<HBBI", *step) for step in steps))
    program = ctypes.create_string_buffer(struct.pack("<H6xQ", len(steps), ctypes.addressof(code)))
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.prctl(_NO_NEW_PRIVS, 1, 0, 0, 0) == 0
    number = _SECCOMP[platform.machine()]
    assert libc.syscall(number, _SET_MODE_FILTER, _TSYNC, program) == 0, ctypes.get_errno()


async def _serve(image: str, errno: int, io_threads: int) -> None:
    disk = Disk(image, engine="io_uring")
    async with virtio_rig(lambda context: build(disk, context), io_threads=io_threads) as rig:
        await rig.driver.start()
        blk = BlkDriver(rig)
        assert (await blk.request(FLUSH))[0] == OK
        refuse(errno)
        for _ in range(3):
            slots = [blk.submit(FLUSH) for _ in range(ALL)]
            blk.kick()
            await rig.driver.used(0, ALL)
            assert {blk.status(slot) for slot in slots} == {IOERR}
        await rig.device.quiesce()
        await rig.device.resume()
        await rig.driver.start()
        assert (await blk.request(FLUSH))[0] == IOERR
        # Something that needs no engine at all still works.
        assert (await blk.request(OUT, 2**60, b"x" * 512))[0] == IOERR
        assert rig.errors == []


if __name__ == "__main__":
    asyncio.run(_serve(sys.argv[1], int(sys.argv[2]), int(sys.argv[3])))
