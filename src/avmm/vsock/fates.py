"""How connections ended, where a program and the lane in its worker both write it.

By a socket alone an end that the guest made properly looks like a reset, and a closed socket like
one that was given up. So each connection has three bytes in memory that both processes have: see
struct av_vsock_fate in native/vsock.h.
"""

from __future__ import annotations

import fcntl
import mmap
import os
from collections import deque
from typing import Final

from avmm.errors import HostError
from avmm.native import CData, ffi, lib
from avmm.vsock.reasons import Reason

FATES: Final = 1024
"""As many connections may be between a program and its worker."""

_BYTES: Final = 3
_SIZE_BYTES: Final = FATES * _BYTES
_LANE, _PROGRAM, _REASON = range(_BYTES)
_REASONS: Final = frozenset(Reason)
_SEALS: Final = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
"""A worker that is not ours any more could make it shorter, and reading it a SIGBUS."""


class Fates:
    """The program's side. fd: for the worker, until it has it; the owner closes both.

    A fate that a connection is done with is another's when the lane has said that it is, too.
    Raises HostError("memory").
    """

    def __init__(self) -> None:
        try:
            self.fd = os.memfd_create("avmm-fates", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
            try:
                os.ftruncate(self.fd, _SIZE_BYTES)
                fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, _SEALS)
                self._memory = mmap.mmap(self.fd, _SIZE_BYTES)
            except BaseException:
                os.close(self.fd)
                raise
        except OSError as e:
            raise HostError("memory", op="memfd_create", errno=e.errno) from e
        self._free = deque(range(FATES))
        self._left: set[int] = set()

    def close(self) -> None:
        """Idempotent."""
        self._memory.close()

    def take(self) -> int | None:
        """A fate of nobody's; None: there are as many connections as there may be."""
        if not self._free:
            gone = [fate for fate in self._left if self.ends(fate) & lib.AV_VSOCK_GONE]
            self._left.difference_update(gone)
            self._free.extend(gone)
        if not self._free:
            return None
        fate = self._free.popleft()
        self._memory[fate * _BYTES : (fate + 1) * _BYTES] = bytes(_BYTES)
        return fate

    def leave(self, fate: int) -> None:
        """The connection is no more here, and maybe in the lane."""
        self._left.add(fate)

    def give_back(self, fate: int) -> bool:
        """The lane never had it, and it was left; whether that can be."""
        if fate not in self._left:
            return False
        self._left.remove(fate)
        self._free.append(fate)
        return True

    def ends(self, fate: int) -> int:
        """av_vsock_ends bits, or what else the worker has written."""
        return int(self._memory[fate * _BYTES + _LANE])

    def reason(self, fate: int) -> Reason:
        """Why the lane has ended it. Of what is no reason the worker's word is that of a guest."""
        value = self._memory[fate * _BYTES + _REASON]
        return Reason(value) if value in _REASONS else Reason.GUEST_RESET

    def abort(self, fate: int) -> None:
        """The guest is to see a reset when the socket is closed."""
        self._memory[fate * _BYTES + _PROGRAM] = lib.AV_VSOCK_ABORTED


class LaneFates:
    """The worker's side. Takes fd over."""

    def __init__(self, fd: int) -> None:
        memory = mmap.mmap(fd, _SIZE_BYTES)
        os.close(fd)
        self._native = ffi.from_buffer("struct av_vsock_fate[]", memory)

    def at(self, fate: int | None) -> CData:
        """For the lane; NULL for None."""
        return ffi.NULL if fate is None else self._native + fate
