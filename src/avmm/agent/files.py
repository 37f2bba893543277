"""The guest's files."""

from __future__ import annotations

import asyncio
import os
import stat
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, aclosing, contextmanager
from typing import IO, TypeVar

from avmm.agent import protocol
from avmm.agent.connection import Connection
from avmm.agent.protocol import FRAME_MAX_BYTES, FileEntry, FileFlag, FileStat, Type, nonsense
from avmm.errors import HostError
from avmm.loop import on_thread
from avmm.units import MIB

READ_MAX_BYTES = 256 * MIB
"""What read() brings at most when no size is given: the guest is not trusted with our memory."""

_EVERYTHING = (0, (1 << 64) - 1)
_CHUNK_BYTES = 1 * MIB

T = TypeVar("T")
Path = str | os.PathLike[str]
Connections = Callable[[], AbstractAsyncContextManager[Connection]]


class Files:
    """Files of the guest, by absolute paths as its init sees them, and as root.

    What the guest's kernel refuses raises OSError with its errno, so FileNotFoundError,
    PermissionError and so on. A cancelled call leaves no half-written file where `atomic` is on.
    """

    def __init__(self, connections: Connections) -> None:
        self._connections = connections

    async def read(self, path: Path, *, offset: int = 0, size: int | None = None) -> bytes:
        """A file's content, or at most `size` bytes of it from `offset` on.

        Raises HostError("file-size") for one of more than 256 MiB read without a size.
        """
        most = READ_MAX_BYTES if size is None else size
        parts: list[bytes] = []
        total = 0
        async with aclosing(self.chunks(path, offset=offset, size=size)) as chunks:
            async for part in chunks:
                parts.append(part)
                total += len(part)
                if total > most:
                    raise HostError(
                        "file-size",
                        op="read",
                        path=os.fspath(path),
                        remedy=f"it has more than {most} bytes; use chunks() or download()",
                    )
        return b"".join(parts)

    async def chunks(
        self, path: Path, *, offset: int = 0, size: int | None = None
    ) -> AsyncGenerator[bytes, None]:
        """A file's content piece by piece, no faster than they are taken."""
        span = (offset, _EVERYTHING[1] if size is None else size)
        async with self._connections() as connection:
            connection.send(Type.READ, _pack(path, span=span))
            await connection.expect(Type.OK)
            while data := await connection.part():
                yield data

    async def write(
        self,
        path: Path,
        data: bytes | bytearray | memoryview | AsyncIterable[bytes],
        *,
        mode: int | None = None,
        atomic: bool = True,
        append: bool = False,
        new: bool = False,
    ) -> int:
        """Write a file; the number of bytes.

        data: also an async iterable of pieces. mode: permission bits; by default those of the file
        it takes the place of, or 0644. atomic: the name means the old content or the new one,
        never a part, even if the guest crashes; off, the file is changed in place, which devices
        and the files of /proc and /sys need. append: behind what is there (not atomic). new: raise
        FileExistsError if there is one.
        """
        flags = FileFlag.APPEND if append else FileFlag.ATOMIC if atomic else FileFlag.NOTHING
        if new:
            flags |= FileFlag.NEW
        request = _pack(path, flags=flags, mode=mode)
        pieces = data if isinstance(data, AsyncIterable) else _pieces(memoryview(data).cast("B"))
        async with self._connections() as connection:
            return await _send(connection, request, pieces)

    async def upload(
        self, source: Path, path: Path, *, mode: int | None = None, atomic: bool = True
    ) -> int:
        """Copy a host file into the guest; the number of bytes. mode: by default the file's."""
        with _opened(source) as file:
            if mode is None:
                mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
            return await self.write(path, _read_file(file), mode=mode, atomic=atomic)

    async def download(self, path: Path, target: Path, *, mode: int | None = None) -> int:
        """Copy a file of the guest to the host; the number of bytes.

        mode: by default the file's permission bits. `target` is replaced when all of it is there,
        and keeps its old content otherwise.
        """
        size = 0
        async with self._connections() as connection:
            connection.send(Type.READ, _pack(path, span=_EVERYTHING))
            found = protocol.unpack_stat(await connection.expect(Type.OK))
            bits = stat.S_IMODE(found.mode) & 0o777 if mode is None else mode
            with _replacing(target, bits) as file:
                while data := await connection.part():
                    await _on_thread(file.write, data)
                    size += len(data)
        return size

    async def list(self, path: Path) -> list[FileEntry]:
        """What is in a folder, in no particular order."""
        entries: list[FileEntry] = []
        async with self._connections() as connection:
            connection.send(Type.LIST, _pack(path))
            await connection.expect(Type.OK)
            while data := await connection.part():
                entries += protocol.unpack_entries(data)
                if len(entries) > 1_000_000:
                    raise nonsense(f"{os.fspath(path)} has more than a million entries")
        return entries

    async def stat(self, path: Path, *, follow: bool = True) -> FileStat:
        """Size, mode and so on. follow: of what a symbolic link points to."""
        flags = FileFlag.FOLLOW if follow else FileFlag.NOTHING
        return protocol.unpack_stat(await self._ask(Type.STAT, _pack(path, flags=flags)))

    async def exists(self, path: Path) -> bool:
        """Whether there is something of that name."""
        try:
            await self.stat(path)
        except (FileNotFoundError, NotADirectoryError):
            return False
        return True

    async def mkdir(self, path: Path, mode: int = 0o777, *, parents: bool = False) -> None:
        """Make a folder. parents: with those that lead there; it may be there already, then."""
        flags = FileFlag.PARENTS if parents else FileFlag.NOTHING
        await self._ask(Type.MKDIR, _pack(path, flags=flags, mode=mode & ~0o022))

    async def remove(
        self, path: Path, *, recursive: bool = False, missing_ok: bool = False
    ) -> None:
        """Remove a file or an empty folder; recursive: also one with all that is in it, but not
        what is mounted there."""
        flags = FileFlag.RECURSIVE if recursive else FileFlag.NOTHING
        flags |= FileFlag.MISSING_OK if missing_ok else FileFlag.NOTHING
        await self._ask(Type.REMOVE, _pack(path, flags=flags))

    async def rename(self, path: Path, new_path: Path) -> None:
        """Give a file another name, in the place of what has that name."""
        await self._ask(Type.RENAME, _pack(path, new_path))

    async def chmod(self, path: Path, mode: int) -> None:
        """Set a file's permission bits."""
        await self._ask(Type.CHMOD, _pack(path, mode=mode))

    async def _ask(self, type: Type, request: bytes) -> bytes:
        async with self._connections() as connection:
            return await connection.request(type, request)


def _pack(
    *paths: Path,
    flags: FileFlag = FileFlag.NOTHING,
    mode: int | None = None,
    span: tuple[int, int] = (0, 0),
) -> bytes:
    names = [os.fspath(path) for path in paths]
    return protocol.pack_file(*names, flags=flags, mode=mode, span=span)


async def _send(connection: Connection, request: bytes, pieces: AsyncIterable[bytes]) -> int:
    """Send a file's content until it is all there or the agent says why it cannot be."""
    connection.send(Type.WRITE, request)
    size = 0
    answer = asyncio.ensure_future(connection.expect(Type.OK))
    try:
        async for piece in pieces:
            view = memoryview(piece)
            for at in range(0, len(view), FRAME_MAX_BYTES):
                if answer.done():
                    break
                connection.send(Type.DATA, bytes(view[at : at + FRAME_MAX_BYTES]))
                size += len(view[at : at + FRAME_MAX_BYTES])
                await connection.drain()
            if answer.done():
                break
        connection.send(Type.END)
        await asyncio.wait([answer])
    except BaseException:
        connection.settled = False  # whatever the answer: it has not got all
        answer.cancel()
        await asyncio.wait([answer])
        if not answer.cancelled():
            answer.exception()
        raise
    try:
        answer.result()
    except OSError:
        await connection.expect(Type.END)  # it has seen the last of what was on its way
        connection.settled = True
        raise
    connection.settled = True
    return size


async def _pieces(view: memoryview) -> AsyncIterator[bytes]:
    for at in range(0, len(view), FRAME_MAX_BYTES):
        yield bytes(view[at : at + FRAME_MAX_BYTES])


async def _read_file(file: IO[bytes]) -> AsyncIterator[bytes]:
    while data := await _on_thread(file.read, _CHUNK_BYTES):
        yield data


def _opened(path: Path) -> IO[bytes]:
    return open(path, "rb", buffering=0)


@contextmanager
def _replacing(target: Path, mode: int) -> Iterator[IO[bytes]]:
    """A file beside `target` that takes its place when the block ends well."""
    folder, name = os.path.split(os.path.abspath(target))
    temporary = os.path.join(folder, f".{name[:200]}.{os.urandom(6).hex()}")
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    try:
        with open(temporary, "wb", opener=lambda path, _: os.open(path, flags, 0o600)) as file:
            yield file
            os.fchmod(file.fileno(), mode)
        os.replace(temporary, target)
    except BaseException:
        os.unlink(temporary)
        raise


async def _on_thread(function: Callable[..., T], *arguments: object) -> T:
    """Where it may block. Returns only when the thread is done with it, cancelled or not."""
    job = on_thread(function, *arguments)
    try:
        return await asyncio.shield(job)
    except asyncio.CancelledError:
        await asyncio.wait([job])
        if not job.cancelled():
            job.exception()
        raise
