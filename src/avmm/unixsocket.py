"""A listening unix socket, and its file."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import stat

from avmm.errors import ConfigError, HostError

_PATH_BYTES_MAX = 107
_WAITING_MAX = 16
_USER_ERRORS = (errno.ENOENT, errno.ENOTDIR, errno.EACCES, errno.EPERM, errno.EROFS)


class Listener:
    """Listens at `path` from the start; owns the socket, which does not block, and the file.

    A file that a killed process left there is removed. Raises ConfigError("socket"), or
    HostError("socket") when the host refuses for another reason.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        if len(os.fsencode(path)) > _PATH_BYTES_MAX:
            raise ConfigError(
                "socket", f"Socket {path}: longer than {_PATH_BYTES_MAX} bytes; use a shorter path"
            )
        try:
            self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
            try:
                _remove_stale(path)
                self.socket.bind(path)
                self._inode = os.stat(path).st_ino
                self.socket.listen(_WAITING_MAX)
            except BaseException:
                self.socket.close()
                raise
        except OSError as e:
            if e.errno in _USER_ERRORS:
                raise ConfigError("socket", f"Socket {path}: {os.strerror(e.errno)}") from e
            raise HostError("socket", op="bind", path=path, errno=e.errno) from e

    def accept(self) -> socket.socket | None:
        """A connection, which does not block, if one is waiting. Raises HostError."""
        try:
            connection, _ = self.socket.accept()
        except (BlockingIOError, ConnectionError):
            return None
        except OSError as e:
            raise HostError("socket", op="accept", path=self.path, errno=e.errno) from e
        connection.setblocking(False)
        return connection

    def close(self) -> None:
        """Close the socket and remove its file, unless somebody put another one in its place."""
        with contextlib.suppress(OSError):
            if os.stat(self.path).st_ino == self._inode:
                os.unlink(self.path)
        self.socket.close()


def _remove_stale(path: str) -> None:
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise ConfigError("socket", f"Socket {path}: a file that is no socket is in its place")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as probe:
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            os.unlink(path)
            return
        except BlockingIOError:  # somebody listens, and has more to do than to answer
            pass
    raise ConfigError("socket", f"Socket {path}: another process listens there")
