"""Streams to a guest in a worker process: the sockets are the program's, the device is not."""

from __future__ import annotations

import asyncio
import errno
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import pytest

import avmm
from avmm.machine.isolation import messages as say
from avmm.units import MIB
from avmm.virtio.devices.vsock import TX, Vsock
from avmm.vsock.credit import BUFFER_BYTES
from avmm.vsock.packet import CID_HOST, SHUTDOWN_BOTH, Op
from fakes import probing_worker
from fakes.probing_worker import probe, worker_pid
from kvm.guest_steps import LAST, Assemble
from kvm.socket_guest import CID, PACKET, PORT, SocketGuest
from kvm.test_isolation import held

pytestmark = pytest.mark.asyncio(loop_factories=["uvloop"])

SERVED = 5000
HOST_PORT = 1 << 30
"""Of the host's first connection."""
SPIN = "putc 'x'\n1: jmp 1b"


def isolated(kernel: Path, **more: object) -> avmm.MicroVM:
    values = {"kernel": str(kernel), "memory": "4M", "cmdline": "", "vsock": Vsock(CID), **more}
    return avmm.MicroVM(avmm.Config(**values), isolation="process")  # type: ignore[arg-type]


def connected_to() -> SocketGuest:
    """A guest with the host's first connection."""
    guest = SocketGuest("pci")
    guest.start(queues=2)
    guest.listen()
    guest.hear(CID_HOST, HOST_PORT, Op.REQUEST, buf_alloc=BUFFER_BYTES)
    guest.say(CID_HOST, HOST_PORT, Op.RESPONSE)
    return guest


def talker(last: Op | None = Op.RST) -> str:
    """A guest that is connected to, connects, closes properly, and ends the other by `last`."""
    guest = connected_to()
    guest.hear(CID_HOST, HOST_PORT, Op.RW, b"go!!", buf_alloc=BUFFER_BYTES)
    guest.say(CID_HOST, SERVED, Op.REQUEST)
    guest.hear(CID_HOST, SERVED, Op.RESPONSE, buf_alloc=BUFFER_BYTES)
    guest.say(CID_HOST, SERVED, Op.RW, b"a word..")
    guest.hear(CID_HOST, SERVED, Op.RW, b"A WORD..", buf_alloc=BUFFER_BYTES, fwd_cnt=8)
    guest.say(CID_HOST, SERVED, Op.SHUTDOWN, flags=SHUTDOWN_BOTH, fwd_cnt=8)
    guest.hear(CID_HOST, SERVED, Op.RST, buf_alloc=BUFFER_BYTES, fwd_cnt=8)
    if last is not None:
        guest.say(CID_HOST, HOST_PORT, last)
    return guest.text + "putc 'r'\n1: jmp 1b\n" + LAST


@pytest.mark.asyncio(loop_factories=["uvloop", "asyncio"])
@pytest.mark.parametrize("io_threads", [0, 1])
async def test_streams_both_ways(tiny_guest: Assemble, io_threads: int) -> None:
    before = held()
    served: asyncio.Queue[bytes] = asyncio.Queue()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        assert writer.get_extra_info("peername") == (CID, PORT)
        writer.write((await reader.readexactly(8)).upper())
        served.put_nowait(await reader.read())
        writer.close()

    async with isolated(tiny_guest(talker()), io_threads=io_threads) as vm:
        async with asyncio.timeout(60):
            reader, writer = await vm.vsock.connect(PORT)
            assert writer.get_extra_info("sockname") == (CID_HOST, HOST_PORT)
            async with await vm.vsock.serve(SERVED, serve):
                writer.write(b"go!!")
                assert await served.get() == b""
            with pytest.raises(ConnectionResetError, match="The guest reset"):
                await reader.read()
            writer.close()
        await vm.console.expect(b"r")
        await vm.pause()
        counters = vm.statistics().devices["vsock0"].counters
        assert (counters["opened"], counters["connections"]) == (2, 0)
        assert (counters["rx_bytes"], counters["tx_bytes"]) == (8, 12)
    with pytest.raises(ConnectionResetError, match="has ended"):
        await vm.vsock.connect(PORT)
    assert held() == before


ENDS: dict[str, tuple[Callable[[SocketGuest], None], str]] = {
    "a reset": (
        lambda guest: guest.say(CID_HOST, HOST_PORT, Op.RST),
        "The guest reset the connection",
    ),
    "an operation out of place": (
        lambda guest: guest.say(CID_HOST, HOST_PORT, Op.REQUEST),
        "The guest broke the connection: an operation out of place",
    ),
    "more read than sent": (
        lambda guest: guest.say(CID_HOST, HOST_PORT, Op.CREDIT_UPDATE, fwd_cnt=5),
        "The guest broke the connection: it has read more than it was sent",
    ),
    "a reset of the driver": (
        lambda guest: guest.put("status", 0),
        "The guest's vsock driver was reset",
    ),
    "a chain that is no packet": (
        lambda guest: guest.offer(2, queue=TX, buffer=PACKET, size_bytes=4, writable=False),
        "The guest broke its vsock device",
    ),
    "the microVM's end": (lambda guest: None, "The microVM has ended"),
}


@pytest.mark.parametrize("isolation", [None, "process"])
@pytest.mark.parametrize("end", ENDS)
async def test_a_streams_error_says_why_wherever_its_device_is(
    tiny_guest: Assemble, isolation: Literal["process"] | None, end: str
) -> None:
    act, why = ENDS[end]
    guest = connected_to()
    guest.hear(CID_HOST, HOST_PORT, Op.RW, b"go!!", buf_alloc=BUFFER_BYTES)
    act(guest)
    kernel = tiny_guest(guest.text + "putc 'r'\n1: jmp 1b\n" + LAST)
    config = avmm.Config(kernel=str(kernel), memory="4M", cmdline="", vsock=Vsock(CID))
    async with asyncio.timeout(60), avmm.MicroVM(config, isolation=isolation) as vm:
        reader, writer = await vm.vsock.connect(PORT)
        writer.write(b"go!!")
        if end == "the microVM's end":
            await vm.console.expect(b"r")
            await vm.kill()
        with pytest.raises(ConnectionResetError) as caught:
            await reader.read()
        assert (caught.value.errno, caught.value.strerror) == (errno.ECONNRESET, why)


async def test_programs_reach_it_by_its_unix_socket(tiny_guest: Assemble, tmp_path: Path) -> None:
    before = held()
    uds = tmp_path / "v"
    served: asyncio.Queue[bytes] = asyncio.Queue()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write((await reader.readexactly(8)).upper())
        served.put_nowait(await reader.read())
        writer.close()

    guest = tiny_guest(talker())
    async with (
        asyncio.timeout(60),
        await asyncio.start_unix_server(serve, f"{uds}_{SERVED}"),
        isolated(guest, vsock=Vsock(CID, str(uds))),
    ):
        reader, writer = await asyncio.open_unix_connection(uds)
        writer.write(b"CONNECT %d\ngo!!" % PORT)
        assert await reader.readline() == b"OK %d\n" % HOST_PORT
        assert await served.get() == b""
        assert await reader.read() == b""
        writer.close()
    assert not uds.exists()
    await asyncio.sleep(0)  # the server's own end
    assert held() == before


@pytest.mark.parametrize("end", ["kill", "crash"])
@pytest.mark.asyncio(loop_factories=["uvloop", "asyncio"])
async def test_its_end_resets_its_streams(
    tiny_guest: Assemble, end: Literal["kill", "crash"]
) -> None:
    before = held()
    hung = asyncio.Event()

    async def hang(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        hung.set()
        await reader.read()

    async with asyncio.timeout(60), isolated(tiny_guest(talker(None))) as vm:
        reader, writer = await vm.vsock.connect(PORT)
        await vm.vsock.serve(SERVED, hang)
        writer.write(b"go!!")
        await hung.wait()
        waiting = asyncio.ensure_future(vm.vsock.connect(PORT + 1, timeout_s=None))
        await asyncio.sleep(0)
        if end == "kill":
            await vm.kill()
        else:
            os.kill(worker_pid(vm), signal.SIGKILL)
            await vm.wait()
        for call in (reader.read(), waiting):
            with pytest.raises(ConnectionResetError, match="The microVM has ended"):
                await call
        with pytest.raises(ConnectionResetError):
            await writer.drain()
    assert held() == before


async def test_a_worker_that_takes_nothing_is_given_few_sockets_and_a_bounded_time(
    tiny_guest: Assemble,
) -> None:
    before = held()
    async with isolated(tiny_guest(SPIN)) as vm:
        os.kill(worker_pid(vm), signal.SIGSTOP)
        connecting = [vm.vsock.connect(PORT, timeout_s=0.05) for _ in range(100)]
        ends = await asyncio.gather(*connecting, return_exceptions=True)
        assert [type(end) for end in ends] == [TimeoutError] * 100
        os.kill(worker_pid(vm), signal.SIGCONT)
        assert (await vm.kill()).kind is avmm.ExitKind.KILLED
    assert held() == before


NONSENSE = {
    "of a socket that was not on its way": say.Took(),
    "of a connection that there is not": say.Declined(3, None),
    "of a fate beyond all": say.Declined(1 << 20, None),
    "of a port beyond all": say.Requested(0, 1 << 32, 0),
    "of a number below all": say.Requested(-1, 0, 0),
}


async def test_no_time_passes_for_streams_while_the_guest_is_paused(
    tiny_guest: Assemble, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("avmm.vsock.remote_connection.CLOSE_LIMIT_S", 0.0)
    guest = connected_to()
    async with isolated(tiny_guest(guest.text + "1: jmp 1b\n" + LAST)) as vm, asyncio.timeout(60):
        _, writer = await vm.vsock.connect(PORT)
        await vm.pause()
        writer.write(bytes(4 * MIB))  # more than lies in a socket
        writer.close()
        closed = asyncio.ensure_future(writer.wait_closed())
        for _ in range(10):
            await asyncio.sleep(0)
        assert not closed.done()
        await vm.resume()
        with pytest.raises(ConnectionResetError, match="takes nothing more"):
            await closed
        await vm.kill()


@pytest.mark.parametrize("what", NONSENSE)
async def test_a_worker_that_speaks_nonsense_is_killed(
    tiny_guest: Assemble, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    probing_worker.launched_by(monkeypatch)
    async with isolated(tiny_guest(SPIN)) as vm:
        with pytest.raises(avmm.HostError) as raised:
            await probe(vm, f"os.write(3, {say.packed(NONSENSE[what])!r})")
        assert raised.value.kind == "worker-protocol"
        assert (await vm.wait()).error is raised.value


async def test_requests_that_a_worker_makes_up_are_refused_and_those_without_end_kill_it(
    tiny_guest: Assemble, monkeypatch: pytest.MonkeyPatch
) -> None:
    probing_worker.launched_by(monkeypatch)
    before = held()
    served = 0

    async def count(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal served
        served += 1
        await reader.read()

    async with isolated(tiny_guest(SPIN)) as vm:
        await vm.vsock.serve(SERVED, count)
        wanted = b"".join(say.packed(say.Requested(i, SERVED, i)) for i in range(1500))
        refused = b"".join(say.packed(say.Requested(i, 1, i)) for i in range(1500))
        assert await probe(vm, f"os.write(3, {refused!r}); result = 1") == "1"
        # More than there may be are served, none of which the device knows.
        assert await probe(vm, f"os.write(3, {wanted!r}); result = 1") == "1"
        assert 0 < served <= 1024
        assert (await vm.kill()).kind is avmm.ExitKind.KILLED
    assert held() == before


async def test_a_stream_that_begins_with_nonsense_is_the_microvms_end(
    tiny_guest: Assemble, monkeypatch: pytest.MonkeyPatch
) -> None:
    probing_worker.launched_by(monkeypatch)
    async with isolated(tiny_guest(SPIN)) as first, isolated(tiny_guest(SPIN)) as second:
        sockets = """
result = []
for fd in range(4, 64):
    try:
        if os.fstat(fd).st_mode & 0o170000 == 0o140000:
            result.append(fd)
    except OSError:
        pass
"""
        before = await probe(first, sockets)
        connecting = asyncio.ensure_future(first.vsock.connect(PORT, timeout_s=None))
        # Not to the sockets of its own loop, which may not read them.
        code = f"""{sockets}
for fd in set(result) - set({before}):
    os.write(fd, b'OKAY, I have you\\n')
"""
        for _ in range(100):  # until the socket has come
            try:
                await probe(first, code)
            except avmm.HostError:
                break
        with pytest.raises(ConnectionResetError):
            await connecting
        reason = await first.wait()
        assert isinstance(reason.error, avmm.HostError)
        assert reason.error.kind == "worker-protocol"
        assert second.state is avmm.State.RUNNING
