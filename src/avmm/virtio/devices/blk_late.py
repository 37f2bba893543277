"""What becomes of disk requests that the host has not answered when their machine is gone.

The kernel cannot be made to forget them, not by io_uring's cancellation either once a file system
has them: it goes on to read from, or write to, the memory that they name. So that, the descriptor
and the lock of the disk are kept until the storage answers, or for ever.
"""

from __future__ import annotations

import ctypes
import logging
import threading
from collections.abc import Sequence

from avmm.block.raw import RawDisk
from avmm.mem.guest import GuestMemory
from avmm.mem.region import Region
from avmm.native import CData, lib

log = logging.getLogger(__name__)


Held = Sequence[tuple[Region, memoryview]]


def hold(memory: GuestMemory) -> Held:
    """Keep the memory mapped, whoever closes it, for wait_late()."""
    return [(region, memoryview(region.map)) for region in memory.regions]


def wait_late(natives: Sequence[CData], disk: RawDisk, held: Held) -> None:
    """Give back these native disks, the disk and the guest's memory when nothing is in flight any
    more, on a thread that no end of a program waits for. Takes all of them over."""
    thread = threading.Thread(
        target=_wait, args=(natives, disk, held), name="avmm-late", daemon=True
    )
    try:
        thread.start()
    except RuntimeError as e:
        log.error("Disk %s: %s: what hangs is never given back", disk.path, e)
        # Nothing may let go of it: a reference that nobody has.
        ctypes.pythonapi.Py_IncRef(ctypes.py_object((natives, disk, held)))


def _wait(natives: Sequence[CData], disk: RawDisk, held: Held) -> None:
    for native in natives:
        lib.av_blk_wait(native)
        lib.av_blk_destroy(native)
    disk.close()
    for region, view in held:
        view.release()
        region.close()
    log.warning("Disk %s: its storage has answered; all is given back", disk.path)
