"""Network configuration of the host by netlink: the sole user of pyroute2.

What only has to be read is asked by ioctls, so a TAP that needs no change needs no netlink.
pyroute2 (0.9) runs an asyncio loop of its own below its synchronous calls and takes it from the
current policy, which fails where that gives uvloop loops. So it gets a plain thread and a stock
loop, whatever the program around us uses. It is imported on that thread, when there is something to
change: it costs 13 MiB and most of a tenth of a second.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import socket
import struct
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from avmm.errors import HostError
from avmm.loop import on_thread

T = TypeVar("T")


_SIOCGIFFLAGS, _SIOCGIFMTU = 0x8913, 0x8921
_IFF_UP = 1
_IFREQ = struct.Struct("16sI20x")


class Netlink:
    """The calls avmm needs, on the netlink thread. Each raises HostError("netlink")."""

    def __init__(self, stack: contextlib.ExitStack) -> None:
        self._stack = stack
        self._connection: Any = None

    @property
    def _ipr(self) -> Any:
        if self._connection is None:
            self._connection = self._stack.enter_context(_connected())
        return self._connection

    def index(self, name: str) -> int | None:
        """The interface's number; None when there is none of that name."""
        try:
            return socket.if_nametoindex(name)
        except OSError as e:
            if e.errno in (None, errno.ENODEV):
                return None
            raise HostError("netlink", op="if_nametoindex", path=name, errno=e.errno or 0) from e

    def add_tap(self, name: str, *, multi_queue: bool = False) -> None:
        """Make a TAP that takes a virtio-net header before each packet."""
        flags = {"vnet_hdr": 1, "multi_queue": int(multi_queue)}
        with _explained(f"Creating TAP {name}"):
            self._ipr.link("add", ifname=name, kind="tuntap", mode="tap", ifr=flags)

    def set_up(self, index: int, name: str, mtu: int | None) -> None:
        """Set the MTU, if given, and bring the interface up, if it is not so already."""
        if self._ask(name, _SIOCGIFFLAGS) & _IFF_UP and mtu in (None, self.mtu(name)):
            return
        settings = {"mtu": mtu} if mtu is not None else {}
        with _explained(f"Bringing up {name}"):
            self._ipr.link("set", index=index, state="up", **settings)

    def mtu(self, name: str) -> int:
        """The interface's MTU in bytes."""
        return self._ask(name, _SIOCGIFMTU)

    def _ask(self, name: str, request: int) -> int:
        """netdevice(7)"""
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as any_socket:
                answer = fcntl.ioctl(any_socket, request, _IFREQ.pack(name.encode(), 0))
        except OSError as e:
            raise HostError("netlink", op="ioctl", path=name, errno=e.errno or 0) from e
        return int(_IFREQ.unpack(answer)[1])

    def delete(self, index: int, name: str) -> None:
        """Remove an interface."""
        with _explained(f"Removing {name}"):
            self._ipr.link("del", index=index)

    def add_address(self, index: int, name: str, address: str, prefix: int) -> bool:
        """Add an address; False when the interface had it before."""
        from pyroute2.netlink.exceptions import NetlinkError

        with _explained(f"Adding address {address}/{prefix} to {name}"):
            try:
                self._ipr.addr("add", index=index, address=address, prefixlen=prefix)
            except NetlinkError as e:
                if e.code != errno.EEXIST:
                    raise
                return False
        return True

    def remove_address(self, index: int, name: str, address: str, prefix: int) -> None:
        """Remove an address."""
        with _explained(f"Removing address {address}/{prefix} from {name}"):
            self._ipr.addr("del", index=index, address=address, prefixlen=prefix)


async def with_netlink(
    work: Callable[[Netlink], T], undo: Callable[[Netlink, T], None] | None = None
) -> T:
    """Run `work` on a netlink thread of its own and wait for it, also when cancelled: half a
    configuration could not be undone. undo: does that with the result nobody waits for then.
    """
    try:
        return await _in_thread(lambda: _perform(work))
    except _Cancelled as e:
        result = e.args[0]
        if undo is not None and result is not None:
            take_back = undo
            with contextlib.suppress(_Cancelled):
                await _in_thread(lambda: _perform(lambda netlink: take_back(netlink, result)))
        raise asyncio.CancelledError from None


class _Cancelled(Exception):
    """Cancelled while the thread worked; its argument is the result, None for a failure."""


async def _in_thread(work: Callable[[], T]) -> T:
    done, cancelled = on_thread(work), False
    while not done.done():
        try:
            await asyncio.shield(done)
        except asyncio.CancelledError:
            cancelled = True
        except BaseException:
            break
    if cancelled:
        raise _Cancelled(None if done.exception() else done.result())
    return done.result()


def _perform(work: Callable[[Netlink], T]) -> T:
    with contextlib.ExitStack() as stack:
        return work(Netlink(stack))


@contextlib.contextmanager
def _connected() -> Iterator[Any]:
    from pyroute2.iproute.linux import IPRoute

    failures: list[BaseException] = []

    def on_failure(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        # Of a callback, such as one that has to watch the socket: what it was for never comes.
        failures.append(context.get("exception") or RuntimeError(context["message"]))
        loop.stop()

    with _explained("Netlink"):
        loop = asyncio.SelectorEventLoop()
        loop.set_exception_handler(on_failure)
        try:
            ipr = IPRoute(use_event_loop=loop)
            try:
                yield ipr
            finally:
                ipr.close()
        except RuntimeError as e:  # the loop stopped
            raise (failures[0] if failures else e) from e
        finally:
            if not loop.is_closed():
                loop.run_until_complete(asyncio.sleep(0))  # its transports close on the next turn
                loop.close()


@contextlib.contextmanager
def _explained(op: str) -> Iterator[None]:
    from pyroute2.netlink.exceptions import NetlinkError

    try:
        yield
    except NetlinkError as e:
        remedy = None
        if e.code == errno.EPERM:
            remedy = "run as root or with CAP_NET_ADMIN, or name a TAP made for your user"
        raise HostError("netlink", op=op, errno=e.code, remedy=remedy) from e
    except OSError as e:
        raise HostError("netlink", op=op, errno=e.errno or 0) from e
