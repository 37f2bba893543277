"""A file system whose storage may hang: one file, served through /dev/fuse.

python -m fakes.hanging_fs FOLDER SIZE: mounts it on FOLDER, which is FOLDER/disk then, and says
"ready". A line "hang N" on its input: reads and writes from byte N on are not answered any more;
"go": they are, and those that wait. It ends with its input; then all that waits fails.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import select
import stat
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

_IN = struct.Struct("<IIQQIIIHH")
_OUT = struct.Struct("<IiQ")
_ATTR = struct.Struct("<6Q10I")
_TRANSFER = struct.Struct("<QQIIQII")
_LOOKUP, _FORGET, _GETATTR, _OPEN, _READ, _WRITE, _STATFS = 1, 2, 3, 14, 15, 16, 17
_RELEASE, _FSYNC, _FLUSH, _INIT, _INTERRUPT, _BATCH_FORGET = 18, 20, 25, 26, 36, 42
_ROOT, _FILE = 1, 2
_WRITE_MAX = 128 * 1024
_ATTR_S = 3600


class Server:
    """Answers the kernel's requests."""

    def __init__(self, fd: int, size: int) -> None:
        self._fd = fd
        self._data = bytearray(size)
        self._hangs_at: int | None = None
        self._waiting: list[bytes] = []

    def set_hanging(self, at: int | None) -> None:
        self._hangs_at = at
        if at is None:
            waiting, self._waiting = self._waiting, []
            for request in waiting:
                self._answer(request)

    def serve_one(self) -> None:
        request = os.read(self._fd, _WRITE_MAX + 4096)
        opcode = _IN.unpack_from(request)[1]
        if self._hangs_at is not None and opcode in (_READ, _WRITE):
            offset = _TRANSFER.unpack_from(request, _IN.size)[1]
            if offset >= self._hangs_at:
                self._waiting.append(request)
                return
        self._answer(request)

    def _answer(self, request: bytes) -> None:
        _, opcode, unique, node, *_ = _IN.unpack_from(request)
        if opcode in (_FORGET, _INTERRUPT, _BATCH_FORGET):
            return
        answer = self._perform(opcode, node, request[_IN.size :])
        error = 0 if answer is not None else -errno.ENOSYS
        payload = answer or b""
        # ENOENT: the request was given up meanwhile.
        with contextlib.suppress(FileNotFoundError):
            os.write(self._fd, _OUT.pack(_OUT.size + len(payload), error, unique) + payload)

    def _perform(self, opcode: int, node: int, body: bytes) -> bytes | None:
        if opcode == _INIT:
            major, minor, readahead, _ = struct.unpack_from("<IIII", body)
            limits = struct.pack("<HHIIHHI28x", 12, 9, _WRITE_MAX, 1, 0, 0, 0)
            return struct.pack("<IIII", major, min(minor, 31), readahead, 0) + limits
        if opcode == _LOOKUP:
            return struct.pack("<QQQQII", _FILE, 0, _ATTR_S, _ATTR_S, 0, 0) + self._attr(_FILE)
        if opcode == _GETATTR:
            return struct.pack("<QII", _ATTR_S, 0, 0) + self._attr(node)
        if opcode == _OPEN:
            return struct.pack("<QII", 0, 1, 0)  # FOPEN_DIRECT_IO: nothing is cached
        if opcode == _READ:
            _, offset, size, *_ = _TRANSFER.unpack_from(body)
            return bytes(self._data[offset : offset + size])
        if opcode == _WRITE:
            _, offset, size, *_ = _TRANSFER.unpack_from(body)
            self._data[offset : offset + size] = body[_TRANSFER.size :]
            return struct.pack("<II", size, 0)
        if opcode == _STATFS:
            return bytes(80)
        if opcode in (_RELEASE, _FSYNC, _FLUSH):
            return b""
        return None

    def _attr(self, node: int) -> bytes:
        size = len(self._data) if node == _FILE else 0
        mode = stat.S_IFREG | 0o666 if node == _FILE else stat.S_IFDIR | 0o755
        times = (0,) * 6
        return _ATTR.pack(node, size, size // 512, *times, mode, 1, 0, 0, 0, 4096, 0)


class HangingFs:
    """The program, and the file that it serves."""

    def __init__(self, program: subprocess.Popen[str], disk: Path) -> None:
        self._program = program
        self.disk = disk

    def hang(self, at: int = 0) -> None:
        self._tell(f"hang {at}")

    def go(self) -> None:
        self._tell("go")

    def _tell(self, word: str) -> None:
        assert self._program.stdin is not None
        assert self._program.stdout is not None
        self._program.stdin.write(f"{word}\n")
        self._program.stdin.flush()
        assert self._program.stdout.readline() == f"{word}\n"


@contextlib.contextmanager
def hanging_fs(folder: Path, size: int) -> Iterator[HangingFs]:
    """It runs, and does not hang. In a mount namespace of the caller's own."""
    command = [sys.executable, "-m", "fakes.hanging_fs", str(folder), str(size)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, text=True, **pipes) as program:  # type: ignore[call-overload]
        assert program.stdout is not None
        try:
            assert program.stdout.readline() == "ready\n"
            yield HangingFs(program, folder / "disk")
        finally:
            program.kill()


def said_by(module: str, *arguments: object) -> str:
    """What a program of tests/fakes says that mounts; skips where none may, or has no io_uring."""
    command = ["unshare", "--user", "--map-root-user", "--mount"]
    if subprocess.run([*command, "sh", "-c", "exec 3<>/dev/fuse"], capture_output=True).returncode:
        pytest.skip("no namespaces or no /dev/fuse here")
    ended = subprocess.run(
        [*command, sys.executable, "-m", module, *map(str, arguments)],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    if "disk-engine" in ended.stderr:
        pytest.skip("no io_uring here")
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout


def mount(fd: int, folder: str) -> None:
    """Raises OSError."""
    libc = ctypes.CDLL(None, use_errno=True)
    options = f"fd={fd},rootmode=40000,user_id={os.getuid()},group_id={os.getgid()}"
    if libc.mount(b"hanging", folder.encode(), b"fuse", 2 | 4, options.encode()) < 0:
        raise OSError(ctypes.get_errno(), "mount")


def main(folder: str, size: int) -> None:
    fd = os.open("/dev/fuse", os.O_RDWR)
    mount(fd, folder)
    server = Server(fd, size)
    print("ready", flush=True)
    while True:
        readable, _, _ = select.select([fd, 0], [], [])
        if fd in readable:
            server.serve_one()
        if 0 in readable:
            word = os.read(0, 100).decode().strip()
            if not word:
                return
            server.set_hanging(int(word.split()[1]) if word.startswith("hang") else None)
            print(word, flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
