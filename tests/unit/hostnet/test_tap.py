"""TAPs, each test in a network namespace of its own: the machine's network is not touched."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

_CLONE_NEWNET = 0x40000000
_CAP_NET_ADMIN = 12


def can_make_taps() -> bool:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("CapEff:"):
            capable = int(line.split()[1], 16) >> _CAP_NET_ADMIN & 1
            return bool(capable) and os.access("/dev/net/tun", os.R_OK | os.W_OK)
    return False


pytestmark = pytest.mark.skipif(
    not can_make_taps(), reason="no CAP_NET_ADMIN or no /dev/net/tun: TAPs cannot be made"
)

PRELUDE = """
import asyncio, os, sys
from avmm.errors import AvmmError
from avmm.hostnet.tap import TapSettings, open_tap

def names():
    import socket
    return sorted(name for _, name in socket.if_nameindex())

def addresses(name):
    import fcntl, socket, struct
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
        try:
            reply = fcntl.ioctl(s, 0x8915, struct.pack("16s24x", name.encode()))
        except OSError:
            return None
    return socket.inet_ntoa(reply[20:24])
"""


def in_namespace(body: str) -> subprocess.Popen[str]:
    """A child process in a namespace of its own that runs `body`, an async function's."""
    program = PRELUDE + "async def main():\n" + textwrap.indent(textwrap.dedent(body), "    ")
    program += "\nasyncio.run(main())\n"

    def unshare() -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.unshare(_CLONE_NEWNET) != 0:
            os._exit(77)

    return subprocess.Popen(
        [sys.executable, "-W", "error", "-c", program],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=unshare,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
    )


def output(body: str) -> list[str]:
    with in_namespace(body) as child:
        out, err = child.communicate(timeout=60)
    assert child.returncode == 0, err
    return out.splitlines()


def test_a_tap_is_made_with_address_and_mtu_and_goes_with_its_close() -> None:
    lines = output("""
        fds = len(os.listdir("/proc/self/fd"))
        tap = await open_tap(TapSettings("avt0", "10.9.8.1/24", 1400))
        print(names(), addresses("avt0"), tap.created, tap.mtu)
        await tap.close()
        await tap.close()
        print(names(), len(os.listdir("/proc/self/fd")) - fds)
    """)
    assert lines == ["['avt0', 'lo'] 10.9.8.1 True 1400", "['lo'] 0"]


HOLDER = """
import asyncio
from avmm.hostnet.tap import TapSettings, open_tap
async def main():
    tap = await open_tap(TapSettings("avt0", "10.9.8.1/24", queues=3))
    print("up", flush=True)
    await asyncio.Event().wait()
asyncio.run(main())
"""


def test_a_tap_is_gone_when_its_process_is_killed() -> None:
    lines = output(f"""
        import subprocess
        holder = subprocess.Popen([sys.executable, "-c", {HOLDER!r}], stdout=subprocess.PIPE)
        holder.stdout.readline()
        print(names())
        holder.kill()
        holder.wait()
        holder.stdout.close()
        print(names())
    """)
    assert lines == ["['avt0', 'lo']", "['lo']"]


def test_a_tap_that_exists_is_used_and_stays_without_our_address() -> None:
    lines = output("""
        from avmm.hostnet.netlink import with_netlink
        await with_netlink(lambda netlink: netlink.add_tap("avt0"))
        tap = await open_tap(TapSettings("avt0", "10.9.8.1/24"))
        print(names(), addresses("avt0"), tap.created)
        await tap.close()
        print(names(), addresses("avt0"))
    """)
    assert lines == ["['avt0', 'lo'] 10.9.8.1 False", "['avt0', 'lo'] None"]


def test_a_tap_with_several_queues_sends_packets_only_to_those_attached() -> None:
    lines = output("""
        import socket
        tap = await open_tap(TapSettings("avt0", queues=3))
        print(len(tap.fds), all(not os.get_blocking(fd) for fd in tap.fds))
        tap.set_queues([True])
        tap.set_queues([True, False, True])
        def read(fd):
            try:
                return os.read(fd, 2000)
            except OSError as e:
                return e.errno
        frame = b"\\xff" * 6 + bytes(6) + b"\\x88\\xb5" + bytes(46)
        with socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as s:
            s.bind(("avt0", 0))
            for _ in range(20):
                s.send(frame)
        got = [0, 0, 0]
        for index in range(3):
            while isinstance(packet := read(tap.fds[index]), bytes):
                got[index] += packet[12:] == frame
        print(sum(got), got[1])
        await tap.close()
        print(names())
    """)
    assert lines == ["3 True", "20 0", "['lo']"]


def test_a_tap_that_was_made_with_one_queue_has_one() -> None:
    lines = output("""
        from avmm.hostnet.netlink import with_netlink
        await with_netlink(lambda netlink: netlink.add_tap("avt0"))
        tap = await open_tap(TapSettings("avt0", queues=4))
        print(len(tap.fds))
        await tap.close()
        print(names())
    """)
    assert lines == ["1", "['avt0', 'lo']"]


def test_a_tap_that_was_made_with_several_queues_can_be_used_with_one() -> None:
    lines = output("""
        from avmm.hostnet.netlink import with_netlink
        await with_netlink(lambda netlink: netlink.add_tap("avt0", multi_queue=True))
        tap = await open_tap(TapSettings("avt0"))
        print(len(tap.fds))
        await tap.close()
    """)
    assert lines == ["1"]


def test_a_tap_in_use_is_refused_by_name() -> None:
    lines = output("""
        tap = await open_tap(TapSettings("avt0"))
        try:
            await open_tap(TapSettings("avt0"))
        except AvmmError as e:
            print(type(e).__name__, e)
        await tap.close()
    """)
    assert lines == [
        "ConfigError TAP avt0: it is in use by another process or microVM; choose another name"
    ]


def test_an_interface_that_is_no_tap_is_refused() -> None:
    lines = output("""
        try:
            await open_tap(TapSettings("lo"))
        except AvmmError as e:
            print(type(e).__name__, e)
    """)
    assert lines[0].startswith("ConfigError TAP lo: it is not a TAP")


def test_a_failure_half_way_leaves_nothing() -> None:
    lines = output("""
        from avmm.hostnet.netlink import Netlink
        def fail(self, *args):
            raise OSError(5, "injected")
        fds = len(os.listdir("/proc/self/fd"))
        Netlink.set_up = fail
        try:
            await open_tap(TapSettings("avt0", "10.9.8.1/24"))
        except AvmmError as e:
            print(type(e).__name__)
        print(names(), len(os.listdir("/proc/self/fd")) - fds)
    """)
    assert lines == ["HostError", "['lo'] 0"]


def test_cancellation_leaves_nothing() -> None:
    lines = output("""
        import threading
        fds = len(os.listdir("/proc/self/fd"))
        for turns in range(6):
            task = asyncio.create_task(open_tap(TapSettings("avt0", "10.9.8.1/24")))
            for _ in range(turns):
                await asyncio.sleep(0)
            task.cancel()
            await asyncio.wait([task])
            assert task.cancelled()
            assert names() == ["lo"], names()
        threads = [t.name for t in threading.enumerate()]
        print(len(os.listdir("/proc/self/fd")) - fds, threads)
    """)
    assert lines == ["0 ['MainThread']"]


def test_it_works_under_a_uvloop_policy() -> None:
    lines = output("""
        import uvloop
        def inner():
            uvloop.install()
            async def use():
                tap = await open_tap(TapSettings("avt0", "10.9.8.1/24"))
                print(names())
                await tap.close()
            asyncio.run(use())
        import warnings
        warnings.simplefilter("ignore")
        await asyncio.to_thread(inner)
    """)
    assert lines == ["['avt0', 'lo']"]


def test_without_the_capability_the_remedy_is_named() -> None:
    lines = output("""
        import ctypes
        libc = ctypes.CDLL(None, use_errno=True)
        # Drop CAP_NET_ADMIN from the effective, permitted and inheritable sets.
        header = (ctypes.c_uint32 * 2)(0x20080522, 0)
        data = (ctypes.c_uint32 * 6)()
        assert libc.capget(header, data) == 0
        for index in range(3):
            data[index] &= ~(1 << 12)
        assert libc.capset(header, data) == 0
        try:
            await open_tap(TapSettings("avt0", "10.9.8.1/24"))
        except AvmmError as e:
            print(type(e).__name__, e)
        print(names())
    """)
    assert lines[0].startswith("HostError Creating TAP avt0: Operation not permitted")
    assert "CAP_NET_ADMIN" in lines[0]
    assert lines[1] == "['lo']"
