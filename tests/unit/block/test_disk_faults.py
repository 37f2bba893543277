"""virtio-blk on storage that fails: the guest hears of it, others go on, and nothing is stuck."""

from __future__ import annotations

import os
import platform
import resource
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from avmm.errors import ConfigError
from avmm.units import KIB, MIB
from avmm.virtio.devices.blk import BlkDevice, Disk, build
from fakes import failing_host
from fakes.blk_driver import FLUSH, IN, IOERR, OK, OUT, BlkDriver
from fakes.virtio_rig import Rig, virtio_rig

SIZE_BYTES = MIB
ENGINES = pytest.mark.parametrize("engine", ["io_uring", "threads"])
HOMES = pytest.mark.parametrize("io_threads", [0, 1], ids=["loop", "thread"])
INJECTS_SINCE = (6, 10)
"""The Linux whose io_uring can be told what result to give."""


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    with path.open("wb") as file:
        file.truncate(SIZE_BYTES)
    return path


@asynccontextmanager
async def plugged(
    image: Path, engine: str, io_threads: int
) -> AsyncIterator[tuple[Rig[BlkDevice], BlkDriver]]:
    disk = Disk(str(image), engine=engine)  # type: ignore[arg-type]
    async with virtio_rig(lambda context: build(disk, context), io_threads=io_threads) as rig:
        await rig.driver.start()
        yield rig, BlkDriver(rig)
        assert rig.errors == []


def run(command: list[str], environment: dict[str, str]) -> None:
    ended = subprocess.run(command, capture_output=True, text=True, env=environment)
    if "disk-engine" in ended.stderr:
        pytest.skip("no io_uring here")
    assert ended.returncode == 0, ended.stdout + ended.stderr


@pytest.mark.slow
@ENGINES
@HOMES
def test_every_error_of_the_host_becomes_what_it_should(
    image: Path, failing_host_library: Path, engine: str, io_threads: int
) -> None:
    release = tuple(int(part) for part in platform.release().split(".")[:2])
    if engine == "io_uring" and release < INJECTS_SINCE:
        pytest.skip("this kernel's io_uring cannot be made to fail")
    command = [sys.executable, "-m", "fakes.failing_disk", str(image), engine, str(io_threads)]
    run(command, failing_host.environment(failing_host_library))


@pytest.mark.slow
@ENGINES
@HOMES
def test_a_full_file_system(tmp_path: Path, engine: str, io_threads: int) -> None:
    """In namespaces of its own, on a file system smaller than the disk."""
    image = tmp_path / "disk.img"
    enter = ["unshare", "--user", "--map-root-user", "--mount"]
    if subprocess.run([*enter, "true"], capture_output=True).returncode != 0:
        pytest.skip("no namespaces here")
    mount = f"mount -t tmpfs -o size=256k none {tmp_path} && truncate -s 1M {image}"
    program = f"{sys.executable} -m fakes.failing_disk {image} {engine} {io_threads} full"
    run(
        [*enter, "sh", "-ec", f"{mount} && {program}"],
        os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )


@ENGINES
@HOMES
async def test_a_file_that_is_cut_reads_as_errors_beyond_its_end(
    image: Path, engine: str, io_threads: int
) -> None:
    data = os.urandom(16 * KIB)
    async with plugged(image, engine, io_threads) as (rig, blk):
        assert (await blk.request(OUT, 0, data))[0] == OK
        os.truncate(image, 8 * KIB)
        assert await blk.request(IN, 0, read_bytes=8 * KIB) == (OK, data[: 8 * KIB])
        assert (await blk.request(IN, 8, read_bytes=8 * KIB))[0] == IOERR  # half of it is there
        assert (await blk.request(IN, 16, read_bytes=8 * KIB))[0] == IOERR
        assert (await blk.request(FLUSH))[0] == OK
        # A write makes the file longer again.
        assert (await blk.request(OUT, 16, data))[0] == OK
        assert await blk.request(IN, 16, read_bytes=16 * KIB) == (OK, data)
        assert rig.device.resize() == 24 * KIB
        assert (await blk.request(IN, 40, read_bytes=16 * KIB))[0] == IOERR
        os.truncate(image, 100)
        with pytest.raises(ConfigError, match="100 bytes is not a multiple of 512"):
            rig.device.resize()
        assert (await blk.request(IN, 0, read_bytes=512))[0] == IOERR


@ENGINES
@HOMES
async def test_a_file_that_may_not_grow_takes_what_has_room(
    image: Path, engine: str, io_threads: int
) -> None:
    data = os.urandom(8 * KIB)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    async with plugged(image, engine, io_threads) as (_, blk):
        os.truncate(image, 32 * KIB)
        resource.setrlimit(resource.RLIMIT_FSIZE, (32 * KIB, limits[1]))
        try:
            assert (await blk.request(OUT, 64, data))[0] == IOERR
            assert (await blk.request(OUT, 56, data))[0] == IOERR  # half of it
            assert (await blk.request(OUT, 48, data))[0] == OK
            assert (await blk.request(FLUSH))[0] == OK
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert (await blk.request(OUT, 64, data))[0] == OK
        assert await blk.request(IN, 64, read_bytes=8 * KIB) == (OK, data)
