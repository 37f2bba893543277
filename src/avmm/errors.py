"""The five error families of avmm. A new case adds a `kind` string, never a class."""

from __future__ import annotations

import os
from errno import EMFILE, ENFILE


class AvmmError(Exception):
    """Base of all of avmm's errors; `kind` is stable and meant for programs, str() for people."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


class ConfigError(AvmmError):
    """The user asked for something that cannot be (HTTP 400, exit code 2)."""


_REMEDIES = {
    # A microVM takes 9 and some for each device, so programs with many meet this first.
    EMFILE: "too many for this process: raise `ulimit -n`, RLIMIT_NOFILE",
    ENFILE: "too many for this host: raise fs.file-max",
}
"""For what can happen to any operation, and then comes before its own."""


class HostError(AvmmError):
    """The host refused an operation.

    op: the call that failed ("KVM_CREATE_VM", "open"); path: the object it was on, if any;
    errno: the host's reason, None when there is none; remedy: what the user can do.
    """

    def __init__(
        self,
        kind: str,
        *,
        op: str,
        errno: int | None = None,
        path: str | None = None,
        remedy: str | None = None,
    ) -> None:
        remedy = _REMEDIES.get(errno or 0, remedy)
        message = f"{op} {path}" if path else op
        if errno is not None:
            message += f": {os.strerror(errno)}"
        if remedy:
            message += f": {remedy}" if errno is None else f" ({remedy})"
        super().__init__(kind, message)
        self.op = op
        self.errno = errno
        self.path = path
        self.remedy = remedy


class GuestFault(AvmmError):
    """The guest broke the specification. Counted, answered with DEVICE_NEEDS_RESET, never fatal."""

    def __init__(self, kind: str, message: str | None = None) -> None:
        super().__init__(kind, message or f"Guest fault: {kind}")


class SnapshotError(AvmmError):
    """A snapshot cannot be used: version, checksum, missing file."""


class BugError(AvmmError):
    """avmm itself is wrong: the VM stops loudly."""
