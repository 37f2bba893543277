"""virtio-blk: what was acknowledged is in the file, and on the disk when it was flushed."""

from __future__ import annotations

import errno
import fcntl
import os
import random
import signal
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from avmm.units import KIB, MIB
from avmm.virtio import features
from avmm.virtio.devices.blk import Disk, build
from fakes.blk_driver import FLUSH, OK, OUT, BlkDriver
from fakes.flushing_disk import BLOCK_BYTES, BLOCKS, generations
from fakes.virtio_rig import virtio_rig

SIZE_BYTES = MIB
_FS_IOC_FIEMAP = 0xC020660B
_FIEMAP = struct.Struct("<QQIIII")
_EXTENT = struct.Struct("<QQQ16xI12x")
_EXTENTS = 64
_NOT_ON_DISK = 0x2 | 0x4 | 0x800
"""FIEMAP_EXTENT_UNKNOWN, _DELALLOC, _UNWRITTEN."""

SEEDS = 40 if os.environ.get("AVMM_VARIANTS") else 2

ENGINES = pytest.mark.parametrize("engine", ["io_uring", "threads"])
HOMES = pytest.mark.parametrize("io_threads", [0, 1], ids=["loop", "thread"])


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    with path.open("wb") as file:
        file.truncate(SIZE_BYTES)
    return path


def start(module: str, *arguments: object) -> subprocess.Popen[str]:
    """A program of tests/fakes."""
    return subprocess.Popen(
        [sys.executable, "-m", module, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )


def extents(image: Path) -> list[tuple[int, int]]:
    """(bytes, flags) of each; skips the test where the file system does not tell."""
    request = bytearray(_FIEMAP.size + _EXTENTS * _EXTENT.size)
    _FIEMAP.pack_into(request, 0, 0, 2**64 - 1, 0, 0, _EXTENTS, 0)
    with image.open("rb") as file:
        try:
            fcntl.ioctl(file, _FS_IOC_FIEMAP, request)
        except OSError as e:
            if e.errno != errno.EOPNOTSUPP:
                raise
            pytest.skip("this file system does not tell what is on the disk")
    count = _FIEMAP.unpack_from(request)[3]
    found = [_EXTENT.unpack_from(request, _FIEMAP.size + i * _EXTENT.size) for i in range(count)]
    return [(extent[2], extent[3]) for extent in found]


@pytest.mark.slow
@ENGINES
@HOMES
@pytest.mark.parametrize("seed", range(SEEDS))
def test_a_killed_process_loses_nothing_that_it_flushed(
    image: Path, engine: str, io_threads: int, seed: int
) -> None:
    """Killed while it writes, while it flushes, or after; at a random moment of its life."""
    moment = random.Random(f"{seed} {engine} {io_threads}")
    last = f"{moment.choice(('write', 'flush', 'done'))} {moment.randint(2, 40)}\n"
    with image.open("r+b") as file:
        file.truncate(BLOCKS * BLOCK_BYTES)
    with start("fakes.flushing_disk", image, engine, io_threads) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        what, generation = "", "0"
        for line in process.stdout:
            if line == last:
                process.kill()
            what, generation = line.split()
        assert int(generation) >= 2, process.stderr.read()
    assert process.returncode == -signal.SIGKILL
    # The device has what comes next a moment before the line says so.
    began = {"write": -1, "flush": 0, "done": 0}[what] + int(generation)
    ended = {"write": 0, "flush": 0, "done": 1}[what] + int(generation)
    assert {began, ended} >= set(generations(image)), f"{last}: {what} {generation}"


@pytest.mark.spec("5.2.6.2", "commit all completed writes before a flush completes")
@ENGINES
async def test_a_flush_is_on_the_disk_when_it_is_acknowledged(image: Path, engine: str) -> None:
    async with virtio_rig(lambda context: build(Disk(str(image), engine=engine), context)) as rig:
        await rig.driver.start()
        blk = BlkDriver(rig)
        assert (await blk.request(OUT, 0, os.urandom(32 * KIB)))[0] == OK
        assert (await blk.request(FLUSH))[0] == OK
        found = extents(image)
        assert sum(size for size, _ in found) == 32 * KIB
        assert not any(flags & _NOT_ON_DISK for _, flags in found)


@pytest.mark.spec(
    "5.2.6.2",
    "commit a write before it completes, where neither CONFIG_WCE nor FLUSH are negotiated or "
    "writeback is 0",
)
@ENGINES
async def test_without_a_cache_a_write_is_on_the_disk_when_it_is_acknowledged(
    image: Path, engine: str
) -> None:
    async with virtio_rig(lambda context: build(Disk(str(image), engine=engine), context)) as rig:
        await rig.driver.start(features.VERSION_1)
        blk = BlkDriver(rig)
        assert (await blk.request(OUT, 0, os.urandom(32 * KIB)))[0] == OK
        found = extents(image)
        assert sum(size for size, _ in found) == 32 * KIB
        assert not any(flags & _NOT_ON_DISK for _, flags in found)


@pytest.mark.slow
@HOMES
@pytest.mark.parametrize("number", [errno.EIO, errno.EBUSY], ids=["EIO", "EBUSY"])
def test_requests_that_the_kernel_does_not_start_fail_and_nothing_is_stuck(
    image: Path, number: int, io_threads: int
) -> None:
    with start("fakes.refusing_kernel", image, number, io_threads) as process:
        _, errors = process.communicate(timeout=60)
    if process.returncode and "disk-engine" in errors:
        pytest.skip("no io_uring here")
    assert process.returncode == 0, errors
