"""The host's side of the linux layer: file systems, checksums, streams, TCP."""

from __future__ import annotations

import asyncio
import fcntl
import hashlib
import os
import struct
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

from avmm.units import MIB


async def answered(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, data: bytes
) -> bytes:
    """What comes for `data` and its end."""

    async def send() -> None:
        for at in range(0, len(data), 100_000):
            writer.write(data[at : at + 100_000])
            await writer.drain()
        writer.write_eof()

    _, came = await asyncio.gather(send(), reader.read())
    writer.close()
    await writer.wait_closed()
    return came


def assert_clean(image: Path) -> None:
    """The ext4 file system needs no repair and no journal replay."""
    check = subprocess.run(
        ["/sbin/e2fsck", "-f", "-n", str(image)], capture_output=True, text=True, check=False
    )
    assert check.returncode == 0, check.stdout + check.stderr
    header = subprocess.run(
        ["/sbin/dumpe2fs", "-h", str(image)], capture_output=True, text=True, check=True
    ).stdout
    assert "needs_recovery" not in header


def replay_journal(image: Path) -> None:
    """As a mount does, after a guest that did not come to an end; nothing else may want repair."""
    check = subprocess.run(
        ["/sbin/e2fsck", "-p", str(image)], capture_output=True, text=True, check=False
    )
    # 1: "file system errors corrected"; -p does what is safe, and an orphan's removal counts.
    assert check.returncode in (0, 1), check.stdout + check.stderr


async def wait_until_unlocked(image: Path) -> None:
    """Until no process has it as a disk."""
    whole = struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
    with image.open("r+b") as file:
        await asyncio.to_thread(fcntl.fcntl, file, fcntl.F_OFD_SETLKW, whole)


def read_from_ext4(image: Path, path: str) -> bytes:
    """A file of an ext4 image that is not in use."""
    return subprocess.run(
        ["/sbin/debugfs", "-R", f"cat {path}", str(image)], capture_output=True, check=True
    ).stdout


def random_file(path: Path, size_bytes: int) -> str:
    """Make a file of random bytes; its SHA-256."""
    digest = hashlib.sha256()
    with path.open("wb") as file:
        for _ in range(0, size_bytes, MIB):
            chunk = os.urandom(MIB)
            digest.update(chunk)
            file.write(chunk)
    return digest.hexdigest()


def sha256(path: Path) -> str:
    """Of a whole file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@dataclass
class Received:
    """All that came over one TCP connection."""

    digest: str
    size_bytes: int


@dataclass
class Receiver:
    """A TCP server that takes one connection to its end."""

    host: str
    port: int
    _done: asyncio.Future[Received] = field(init=False)
    _server: asyncio.Server = field(init=False)

    async def __aenter__(self) -> Receiver:
        self._done = asyncio.get_running_loop().create_future()
        self._server = await asyncio.start_server(self._take, self.host, self.port)
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        await self._server.wait_closed()

    async def result(self) -> Received:
        """Wait for the connection's end."""
        return await self._done

    async def _take(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        digest, size = hashlib.sha256(), 0
        while data := await reader.read(MIB):
            digest.update(data)
            size += len(data)
        writer.close()
        self._done.set_result(Received(digest.hexdigest(), size))


async def send(host: str, port: int, size_bytes: int) -> str:
    """Send random bytes over TCP; their SHA-256."""
    digest = hashlib.sha256()
    _, writer = await asyncio.open_connection(host, port)
    try:
        for _ in range(0, size_bytes, MIB):
            chunk = os.urandom(MIB)
            digest.update(chunk)
            writer.write(chunk)
            await writer.drain()
    finally:
        writer.close()
        await writer.wait_closed()
    return digest.hexdigest()


async def pings(busybox: Path, guest: str) -> bool:
    """Whether the guest answers the host's ping."""
    process = await asyncio.create_subprocess_exec(
        str(busybox), "ping", "-c", "2", "-W", "10", guest, stdout=subprocess.DEVNULL
    )
    return await process.wait() == 0
