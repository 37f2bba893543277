"""TAPs, each test in a network namespace of its own: the machine's network is not touched."""

from __future__ import annotations

import pytest

from fakes.network_namespace import can_make_taps, output

pytestmark = pytest.mark.skipif(
    not can_make_taps(), reason="no CAP_NET_ADMIN or no /dev/net/tun: TAPs cannot be made"
)


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


MAKER = """
import asyncio
from avmm.hostnet.netlink import with_netlink
def make(netlink):
    netlink.add_tap("avt0")
    netlink.set_up(netlink.index("avt0"), "avt0", 1300)
asyncio.run(with_netlink(make))
"""


def test_a_tap_that_is_up_needs_neither_netlink_nor_a_privilege() -> None:
    lines = output(f"""
        import ctypes, subprocess
        subprocess.run([sys.executable, "-c", {MAKER!r}], check=True)
        libc = ctypes.CDLL(None)
        header, sets = (ctypes.c_uint32 * 2)(0x20080522), (ctypes.c_uint32 * 6)()
        assert libc.capget(header, sets) == 0
        sets[0] &= ~(1 << 12)  # CAP_NET_ADMIN, of what is effective
        assert libc.capset(header, sets) == 0
        tap = await open_tap(TapSettings("avt0", mtu=1300))
        print(tap.created, tap.mtu, "pyroute2" in sys.modules)
        await tap.close()
        try:
            await open_tap(TapSettings("avt0", mtu=1400))
        except AvmmError as e:
            print(type(e).__name__, e)
    """)
    assert lines[0] == "False 1300 False"
    assert lines[1].startswith("HostError Bringing up avt0: Operation not permitted")
    assert "CAP_NET_ADMIN" in lines[1]


def test_a_tap_with_several_queues_sends_packets_only_to_those_attached() -> None:
    lines = output("""
        import contextlib, socket
        tap = await open_tap(TapSettings("avt0", queues=3))
        print(len(tap.fds), all(not os.get_blocking(fd) for fd in tap.fds))
        tap.set_queues([True])
        tap.set_queues([True, False, True])
        def take(index):
            with contextlib.suppress(OSError):  # there is none, or the queue is not attached
                while packet := os.read(tap.fds[index], 2000):
                    got[index] += packet[12:] == frame  # others are the kernel's own
        frame = b"\\xff" * 6 + bytes(6) + b"\\x88\\xb5" + bytes(46)
        got = [0, 0, 0]
        for index in (0, 2):
            asyncio.get_running_loop().add_reader(tap.fds[index], take, index)
        with socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as s:
            s.bind(("avt0", 0))
            for _ in range(20):
                s.send(frame)
        while sum(got) < 20:  # another CPU may be the one that passes a packet on
            await asyncio.sleep(0)
        take(1)
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
