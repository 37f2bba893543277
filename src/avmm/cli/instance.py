"""The folder of a running `avmm run --name NAME`: where other commands find it.

It holds `pid`, which the running process keeps locked, and the sockets. A lock ends with its
process however that ends, so what a killed one left behind is known to be stale.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import shutil
import stat
import struct
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from avmm.errors import ConfigError, HostError

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,63}")
_PATH_MAX_BYTES = 107 - len("/vsock.sock_4294967295")  # of a folder whose sockets can be bound
_FLOCK = struct.Struct("hhqqi4x")  # type, whence, start, length, pid
_TRIES = 100


@dataclass(frozen=True, slots=True)
class Instance:
    """A running microVM's name, and its folder."""

    name: str
    path: Path

    @property
    def console_path(self) -> Path:
        """The socket of its console."""
        return self.path / "console.sock"

    @property
    def serial_path(self) -> Path:
        """The socket of its serial port's console, when the other one is on virtio."""
        return self.path / "serial.sock"

    @property
    def vsock_path(self) -> Path:
        """The socket by which host programs connect to the guest's vsock ports."""
        return self.path / "vsock.sock"

    @property
    def pid_path(self) -> Path:
        """The process id, in a file that is locked while the process lives."""
        return self.path / "pid"

    def pid(self) -> int | None:
        """The process that runs it; None when there is none any more."""
        try:
            with self.pid_path.open("rb") as file:
                if not _is_locked(file.fileno()):
                    return None
                return int(file.read(32) or 0)
        except (OSError, ValueError):
            return None


@contextlib.contextmanager
def claimed(name: str) -> Iterator[Instance]:
    """A new instance of that name; its folder is gone afterwards, whatever was put there.

    Raises ConfigError("name" | "name-taken"), and HostError when the folder cannot be made.
    """
    instance = Instance(name, _checked(name))
    try:
        fd = _lock(instance)
    except OSError as e:
        raise HostError(
            "instance", op="Folder of the instance", errno=e.errno, path=str(instance.path)
        ) from e
    try:
        yield instance
    finally:
        # With the lock held, so nobody takes it over half removed; `pid` goes with the folder.
        _empty(instance)
        instance.pid_path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            instance.path.rmdir()
        os.close(fd)


def find(name: str) -> Instance:
    """The running instance of that name. Raises ConfigError("instance") with those there are."""
    instances = {instance.name: instance for instance, _ in running()}
    if name in instances:
        return instances[name]
    known = f"running are {', '.join(instances)}" if instances else "none is running"
    raise ConfigError("instance", f"No microVM of avmm run --name {name} is running: {known}")


def running() -> list[tuple[Instance, int]]:
    """The running instances of this user and their process ids, by name."""
    folder = _folder()
    found: list[tuple[Instance, int]] = []
    for path in sorted(folder.iterdir()) if _is_private(folder) else ():
        instance = Instance(path.name, path)
        pid = instance.pid()
        if pid is not None:
            found.append((instance, pid))
    return found


def _folder() -> Path:
    """Of all instances of this user."""
    uid = os.getuid()
    for parent in (os.environ.get("XDG_RUNTIME_DIR"), f"/run/user/{uid}"):
        if parent and os.path.isabs(parent) and os.path.isdir(parent):
            return Path(parent, "avmm")
    return Path(tempfile.gettempdir(), f"avmm-{uid}")


def _checked(name: str) -> Path:
    """The folder for `name`."""
    if not _NAME.fullmatch(name):
        raise ConfigError(
            "name",
            f"--name {name}: a name is 1 to 64 letters, digits, dots, dashes and underscores, and "
            "begins with none of dot and dash",
        )
    path = _folder() / name
    if len(os.fsencode(path)) > _PATH_MAX_BYTES:
        raise ConfigError(
            "name",
            f"--name {name}: {path} is too long a path for sockets; choose a shorter name or a "
            "shorter XDG_RUNTIME_DIR",
        )
    return path


def _lock(instance: Instance) -> int:
    """Make the folder ours; the descriptor that holds the lock."""
    _make_private(instance.path.parent)
    for _ in range(_TRIES):
        _make_private(instance.path)
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        try:
            fd = os.open(instance.pid_path, flags, 0o600)
        except FileNotFoundError:  # somebody's end came between
            continue
        try:
            if not _try_lock(fd):
                running = instance.pid() or "another process"
                raise ConfigError(
                    "name-taken", f"--name {instance.name}: a microVM of that name runs ({running})"
                )
            if _is_at(fd, instance.pid_path):
                _empty(instance)
                os.truncate(fd, 0)
                os.write(fd, b"%d\n" % os.getpid())
                return fd
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)  # of a folder that was removed before we had the lock
    raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN))


def _make_private(path: Path) -> None:
    """A folder that only this user can look into; one that is there already has to be that."""
    with contextlib.suppress(FileExistsError):
        path.mkdir(mode=0o700)
    if not _is_private(path):
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))
    path.chmod(0o700)


def _is_private(path: Path) -> bool:
    """Whether it is a folder that is ours; in a shared place anybody can be first to make it."""
    with contextlib.suppress(OSError):
        found = path.lstat()
        return stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid()
    return False


def _empty(instance: Instance) -> None:
    """Remove what is in the folder, but for the locked file."""
    for path in instance.path.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        elif path != instance.pid_path:
            path.unlink(missing_ok=True)


# Locks of open file descriptions: as of flock(), with a query that does not take the lock. One
# that did would refuse an instance that starts while somebody lists them.


def _try_lock(fd: int) -> bool:
    try:
        fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0))
    except BlockingIOError:
        return False
    return True


def _is_locked(fd: int) -> bool:
    asked = _FLOCK.pack(fcntl.F_RDLCK, os.SEEK_SET, 0, 0, 0)
    kind: int = _FLOCK.unpack(fcntl.fcntl(fd, fcntl.F_OFD_GETLK, asked))[0]
    return kind != fcntl.F_UNLCK


def _is_at(fd: int, path: Path) -> bool:
    with contextlib.suppress(OSError):
        return os.path.samestat(os.fstat(fd), path.lstat())
    return False
