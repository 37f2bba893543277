"""What a front-end has said of one ring, and the descriptors it lent for it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable

from avmm.errors import GuestFault
from avmm.native import ffi
from avmm.units import Gpa
from avmm.vhost_user.inflight import Inflight
from avmm.vhost_user.message import VringAddresses
from avmm.virtio.interrupt import NO_FD
from avmm.virtio.queue import Queue


class Vring:
    """One ring's front-end side. Loop; the descriptors change hands only here.

    enabled: by SET_VRING_ENABLE, or from the start for a front-end that does not know it.
    base: where the ring begins when it is started next; None: where it last stood.
    """

    def __init__(self, queue: Queue) -> None:
        self.queue = queue
        self.enabled = False
        self.base: int | None = None
        self.size: int | None = None
        self.addresses: VringAddresses | None = None
        self._kick_fd = NO_FD
        self._call_fd = NO_FD
        self._error_fd = NO_FD

    @property
    def wanted(self) -> bool:
        """Whether the ring is to run."""
        return self.enabled and self._kick_fd != NO_FD

    def place(self, gpa_of: Callable[[int], Gpa], inflight: Inflight | None) -> None:
        """Tell the queue where it is, and what is in flight. Raises GuestFault("front-end")."""
        if self.size is None or self.addresses is None:
            raise GuestFault(
                "front-end", f"Ring {self.queue.index} is started without size and addresses"
            )
        self.queue.size = self.size
        self.queue.desc_gpa = gpa_of(self.addresses.desc_uva)
        self.queue.driver_gpa = gpa_of(self.addresses.driver_uva)
        self.queue.device_gpa = gpa_of(self.addresses.device_uva)
        if inflight is not None:
            self.queue.inflight = inflight.part(self.queue.index, self.size)

    def set_kick(self, fd: int) -> None:
        """The descriptor the front-end kicks by; NO_FD: none. Takes it over. At rest."""
        self._kick_fd = _replace(self._kick_fd, fd)
        self.queue.lend_kick(self._kick_fd)

    def set_call(self, fd: int) -> None:
        """The descriptor that interrupts the driver; NO_FD: nobody wants to know. Takes it over.

        Any time: the new one gets the old one's number, so that whoever is raising on another
        thread never meets a closed descriptor, or worse, one that has become something else.
        """
        if fd == NO_FD:
            self.queue.interrupt.set_fd(NO_FD)
        elif self._call_fd == NO_FD:
            self._call_fd = fd
            self.queue.interrupt.set_fd(fd)
        else:
            os.dup2(fd, self._call_fd, inheritable=False)
            os.close(fd)
            self.queue.interrupt.set_fd(self._call_fd)

    def set_error(self, fd: int) -> None:
        """The descriptor that announces a dead ring; NO_FD: none. Takes it over."""
        self._error_fd = _replace(self._error_fd, fd)

    def signal_error(self) -> None:
        """Tell the front-end that the ring is dead."""
        if self._error_fd != NO_FD:
            with contextlib.suppress(BlockingIOError):  # it has been told often enough
                os.eventfd_write(self._error_fd, 1)

    def close(self) -> None:
        """Give the descriptors back. At rest; idempotent."""
        self.queue.inflight = ffi.NULL
        self.queue.interrupt.set_fd(NO_FD)
        self._call_fd = _replace(self._call_fd, NO_FD)
        self.set_kick(NO_FD)
        self.set_error(NO_FD)


def _replace(old: int, new: int) -> int:
    if old != NO_FD:
        os.close(old)
    return new


def check_eventfd(fd: int, what: str) -> None:
    """Raises GuestFault("front-end") unless `fd` is an eventfd, which we may wait for and write
    to. Waiting for anything else could take for ever, or no time at all, again and again."""
    if os.readlink(f"/proc/self/fd/{fd}") != "anon_inode:[eventfd]":
        raise GuestFault("front-end", f"{what}: its descriptor is not an eventfd")
    # It is shared with the front-end and whoever else has it; none of them may stall us.
    os.set_blocking(fd, False)
