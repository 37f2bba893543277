"""A worker that a guest has taken over, on the other end of what an isolated vsock is made of."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import mmap
import os
import random
import socket
from contextlib import AsyncExitStack, ExitStack
from pathlib import Path

import pytest

from avmm.errors import AvmmError, HostError
from avmm.log import GuestLog
from avmm.machine.isolation import messages as say
from avmm.machine.isolation import sockets
from avmm.virtio.devices.vsock import Vsock
from avmm.vsock import remote
from fakes.apart_vsock import Apart, Line, apart_rig
from fakes.mmio_driver import settle
from fakes.vsock_guest import VsockGuest, vsock_guest

PORT, SERVED = 1024, 5000

Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


def apart(guest: VsockGuest) -> Apart:
    assert guest.apart is not None
    return guest.apart


async def hear_anything(seed: int, tmp_path: Path) -> None:
    """What it says and does, by chance."""
    choose = random.Random(seed)
    broken: list[AvmmError] = []
    line = Line(hear=lambda record: None)
    config = Vsock(uds=str(tmp_path / "v"))
    served: list[asyncio.StreamWriter] = []

    async def read_all(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        served.append(writer)
        await reader.read()

    async with AsyncExitStack() as stack:
        program = sockets.Sockets(config, line, GuestLog(), broken.append, stack)  # type: ignore[arg-type]
        with ExitStack() as theirs:
            way, memory = program.theirs(theirs)
            worker = socket.socket(fileno=os.dup(way))
            fates = mmap.mmap(memory, 0)
        stack.callback(worker.close)
        await program.host.serve(SERVED, read_all)
        held: list[socket.socket] = []
        asked: list[asyncio.Future[Streams]] = []

        def say_something() -> None:
            record: say.OfSockets = choose.choice(
                [
                    say.Took(),
                    say.Declined(choose.randrange(8), None),
                    say.Declined(choose.randrange(8), say.failure_of(ValueError("x"))),
                    say.Requested(choose.randrange(4), choose.choice([SERVED, 1]), 1),
                ]
            )
            try:
                program.hear(record)
            except HostError as e:
                broken.append(e)

        def take() -> None:
            with contextlib.suppress(BlockingIOError):
                _, fds, _, _ = socket.recv_fds(worker, 100, 1)
                held.extend(socket.socket(fileno=fd) for fd in fds)

        def write() -> None:
            if held:
                data = choose.choice([b"OK 5\n", b"OK 5\nmore", b"x", bytes(100_000)])
                with contextlib.suppress(OSError):
                    choose.choice(held).send(data)

        def end() -> None:
            if held:
                one = held[choose.randrange(len(held))]
                with contextlib.suppress(OSError):
                    one.shutdown(choose.choice([socket.SHUT_RD, socket.SHUT_WR, socket.SHUT_RDWR]))
                if choose.random() < 0.5:
                    held.remove(one)
                    one.close()

        def scribble() -> None:
            fates[choose.randrange(16)] = choose.randrange(256)

        def connect() -> None:
            timeout_s = choose.choice([None, 0.001])
            asked.append(asyncio.ensure_future(program.host.connect(1, timeout_s=timeout_s)))

        def write_back() -> None:
            done = [one.result()[1] for one in asked if one.done() and not one.exception()]
            if writers := served + done:
                writer = choose.choice(writers)
                choose.choice(
                    [
                        lambda: writer.write(bytes(choose.randrange(1, 300_000))),
                        writer.close,
                        writer.transport.abort,
                    ]
                )()

        steps = [say_something, take, take, write, end, scribble, connect, write_back]
        for _ in range(400):
            choose.choice(steps)()
            if choose.random() < 0.3:
                await asyncio.sleep(0)
        assert {error.kind for error in broken} <= {"worker-protocol"}
        for one in held:
            one.close()
        fates.close()
    ends = await asyncio.gather(*asked, return_exceptions=True)
    for one in ends:
        assert isinstance(one, tuple | OSError | HostError), one
    assert len(program._table) == 0


@pytest.mark.parametrize("seed", range(8))
async def test_a_worker_that_was_taken_over_harms_its_own_streams_alone(
    seed: int, tmp_path: Path
) -> None:
    failures: list[dict[str, object]] = []
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(lambda _, context: failures.append(context))
    gc.collect()  # of what other tests left
    before = sorted(os.listdir("/proc/self/fd"))
    await hear_anything(seed, tmp_path)
    gc.collect()
    assert failures == []
    assert sorted(os.listdir("/proc/self/fd")) == before
    loop.set_exception_handler(None)


def open_sockets() -> int:
    """Descriptors of this process."""
    return len(os.listdir("/proc/self/fd"))


def hears_nothing(guest: VsockGuest) -> None:
    """A worker that takes no sockets."""
    asyncio.get_running_loop().remove_reader(apart(guest).relay._way.fileno())


async def test_a_worker_that_takes_nothing_keeps_no_socket_of_what_has_ended() -> None:
    async with vsock_guest(apart_rig) as guest:
        hears_nothing(guest)
        table = apart(guest).sockets._table
        gc.collect()  # of what other tests left
        before = open_sockets()
        await guest.host.serve(SERVED, lambda _, writer: writer.transport.abort())
        for number in range(100):
            apart(guest).to_program.say(say.Requested(number, SERVED, 1))
            with pytest.raises(TimeoutError):
                await guest.host.connect(PORT, timeout_s=0)
        await settle()
        assert len(table) == 0
        assert open_sockets() == before
        kept = [record.number for record in apart(guest).to_worker.said]  # type: ignore[attr-defined]
        assert kept == list(range(100 - len(kept), 100))
        assert 0 < len(kept) < 100


async def ask_without_end(guest: VsockGuest) -> None:
    """At a unix socket, by a worker that takes none."""
    hears_nothing(guest)
    for number in range(300):
        apart(guest).to_program.say(say.Requested(number, SERVED, 1))
    await settle()
    refused = [record.number for record in apart(guest).to_worker.said]  # type: ignore[attr-defined]
    assert refused == list(range(64 + 32, 300))
    connecting = asyncio.ensure_future(guest.host.connect(PORT))
    await settle()
    assert not connecting.done()  # what the program itself wants waits its turn
    connecting.cancel()


async def test_a_worker_that_takes_nothing_gets_a_part_of_our_descriptors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote.resource, "getrlimit", lambda _: (256, 256))
    with socket.socket(socket.AF_UNIX) as program:
        program.bind(str(tmp_path / f"v_{SERVED}"))
        program.listen(1000)
        async with vsock_guest(apart_rig, uds=str(tmp_path / "v")) as guest:
            await ask_without_end(guest)


async def test_a_worker_that_only_says_it_took_them_keeps_few() -> None:
    async with vsock_guest(apart_rig) as guest:
        hears_nothing(guest)
        connecting = []
        for _ in range(300):
            connecting.append(asyncio.ensure_future(guest.host.connect(PORT)))
            apart(guest).to_program.say(say.Took())
            await settle()
        kept = 0
        with contextlib.suppress(BlockingIOError):
            while True:
                _, fds, _, _ = socket.recv_fds(apart(guest).relay._way, 100, 1)
                kept += len(fds)
                os.close(*fds)
        assert sockets._ON_THEIR_WAY_MAX <= kept <= 4 * sockets._ON_THEIR_WAY_MAX
        for one in connecting:
            one.cancel()
        await asyncio.gather(*connecting, return_exceptions=True)
