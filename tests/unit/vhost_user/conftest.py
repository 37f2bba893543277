"""A disk's server, and what it holds."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import pytest
import pytest_asyncio

import fakes.front_end
from avmm.errors import HostError
from avmm.units import MIB
from avmm.vhost_user.server import VhostUserServer
from avmm.virtio.devices.blk import BLK, BlkDevice, Disk
from avmm.virtio.devtype import DeviceContext, DeviceType
from fakes.pipe_disk import PipeDisk, Stuck

DISK_BYTES = MIB


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """With both layouts of rings, where it is the rings that matter."""
    if Path(metafunc.module.__file__).stem in ("test_blk", "test_inflight", "test_net"):
        metafunc.parametrize("_ring", ["split", "packed"], indirect=True)


@pytest.fixture(autouse=True)
def _ring(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if hasattr(request, "param"):
        monkeypatch.setattr(fakes.front_end, "ring", request.param)


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """An image of random bytes."""
    path = tmp_path / "disk.img"
    path.write_bytes(os.urandom(DISK_BYTES))
    return path


@pytest.fixture
def socket_path(tmp_path: Path) -> Iterator[str]:
    """Short enough for a unix socket, wherever pytest keeps its folders."""
    fd = os.open(tmp_path, os.O_PATH | os.O_DIRECTORY)
    yield f"/proc/self/fd/{fd}/s"
    os.close(fd)


@pytest_asyncio.fixture(params=[0, 1], ids=["loop", "thread"])
async def server(
    request: pytest.FixtureRequest, image: Path, socket_path: str
) -> AsyncIterator[VhostUserServer]:
    """Of `image`, on the loop and on an I/O thread."""
    disk = Disk(str(image), serial="served")
    async with VhostUserServer(disk, socket_path, io_threads=request.param) as server:
        yield server


@pytest.fixture
async def stuck(socket_path: str) -> AsyncIterator[Stuck]:
    read_fd, write_fd = os.pipe()

    async def build(config: Disk, context: DeviceContext) -> BlkDevice:
        return BlkDevice(config, PipeDisk(write_fd), context)

    class OnAPipe(Disk, frozen=True):
        device_type: ClassVar[DeviceType] = replace(BLK, build=build)

    try:
        async with VhostUserServer(OnAPipe("pipe", engine="io_uring"), socket_path) as server:
            disk = Stuck(server, read_fd, write_fd)
            disk.fill()
            yield disk
            disk.drain()  # a test that failed must not leave the server's end waiting
    except HostError as e:
        if e.kind == "disk-engine":
            pytest.skip(f"no io_uring here: {e}")
        raise
    finally:
        os.close(read_fd)
        os.close(write_fd)
