"""Cancellation and failure at every moment of a microVM's life leave nothing behind."""

from __future__ import annotations

import asyncio
import os
import resource
import types
from collections.abc import AsyncIterator, Callable, Coroutine, Generator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import uvloop

import avmm
from avmm.errors import HostError
from linux.holdings import Holdings

Assemble = Callable[[str], Path]

SPIN = "putc 'x'\n1: jmp 1b"
OBEY = "putc 'x'\n1: inb 0x603\ntest $1, %al\njz 1b\npoweroff"
MOST = 1000


@pytest.fixture(autouse=True)
async def nothing_left() -> AsyncIterator[None]:
    """As in test_embedding.py."""
    uvloop.new_event_loop().close()
    before = Holdings.now()
    yield
    assert Holdings.now().beyond(before) == {}
    assert asyncio.all_tasks() == {asyncio.current_task()}


@pytest.fixture
def config(tmp_path: Path, tiny_guest: Assemble) -> Callable[..., avmm.Config]:
    """A machine with a bit of everything, around a guest."""

    def make(body: str, **more: Any) -> avmm.Config:
        (tmp_path / "disk.img").write_bytes(bytes(4096))
        return avmm.Config(
            kernel=str(tiny_guest(body)),
            memory="3M",
            cmdline="",
            disks=[avmm.Disk(str(tmp_path / "disk.img"))],
            rng=True,
            **more,
        )

    return make


Life = Callable[[], Coroutine[Any, Any, None]]


class Cancelled:
    """A life as a task that is cancelled the `at`-th time it waits.

    when_ready: in the moment in which what it waits for is done, and not as it begins to wait.
    came: whether it waited that often.
    """

    def __init__(self, life: Life, at: int, *, when_ready: bool) -> None:
        self.came = False
        self._at = at
        self._when_ready = when_ready
        self.task = asyncio.create_task(self._run(life))

    async def _run(self, life: Life) -> None:
        await self._steps(life())

    @types.coroutine
    def _steps(self, work: Coroutine[Any, Any, None]) -> Generator[Any, Any, None]:
        count, step, value = 0, work.send, None
        while True:
            try:
                future = step(value)
            except StopIteration:
                return
            if count == self._at:
                self._cancel(future)
            count += 1
            try:
                value, step = (yield future), work.send
            except BaseException as e:
                value, step = e, work.throw

    def _cancel(self, future: asyncio.Future[Any] | None) -> None:
        self.came = True
        if self._when_ready and future is not None:
            future.add_done_callback(lambda _: self.task.cancel())
        else:
            self.task.cancel()


async def cancelled_everywhere(life: Life, *, when_ready: bool) -> int:
    """Cancel `life` at each of the times it waits, life after life; how many there were."""
    before = Holdings.now()
    for at in range(MOST):
        run = Cancelled(life, at, when_ready=when_ready)
        await asyncio.wait([run.task])
        if not run.came:
            await run.task
            return at
        # When it was ready at the same moment, it may have been over before it was cancelled.
        if not run.task.cancelled():
            await run.task
        assert Holdings.now().beyond(before) == {}, f"cancelled at step {at}"
    raise AssertionError(f"still waiting after {MOST} steps")


@pytest.mark.parametrize("when_ready", [False, True])
@pytest.mark.parametrize("io_threads", [0, 1])
async def test_start_cancelled_at_each_of_its_waits(
    config: Callable[..., avmm.Config], when_ready: bool, io_threads: int
) -> None:
    kernel = config(SPIN, io_threads=io_threads)

    async def life() -> None:
        vm = avmm.MicroVM(kernel)
        try:
            await vm.start()
        except BaseException:
            assert vm.state is avmm.State.STOPPED
            raise
        await vm.close()

    assert await cancelled_everywhere(life, when_ready=when_ready) >= 1


@pytest.mark.slow
@pytest.mark.parametrize("when_ready", [False, True])
async def test_a_whole_life_cancelled_at_each_of_its_waits(
    config: Callable[..., avmm.Config], when_ready: bool
) -> None:
    machine = config(OBEY)

    async def life() -> None:
        async with avmm.MicroVM(machine) as vm:
            events = vm.events()
            await vm.console.expect(b"x")
            await vm.pause()
            await anext(events)
            await vm.resume()
            await vm.console.write(b"y")
            await vm.stop(60)

    assert await cancelled_everywhere(life, when_ready=when_ready) >= 4


@pytest.mark.slow
@pytest.mark.parametrize("transport", ["pci", "mmio"])
async def test_start_that_meets_the_limit_of_open_files_says_so(
    config: Callable[..., avmm.Config], transport: str
) -> None:
    """At each of the descriptors that a microVM needs."""
    machine = config(SPIN, transport=transport, io_threads=1)
    before, limits = Holdings.now(), resource.getrlimit(resource.RLIMIT_NOFILE)
    taken = {int(fd) for fd in os.listdir("/proc/self/fd")}
    messages: list[str] = []
    free = [fd for fd in range(MOST) if fd not in taken]
    for more in range(MOST):
        vm = avmm.MicroVM(machine)
        resource.setrlimit(resource.RLIMIT_NOFILE, (free[more], limits[1]))
        try:
            await vm.start()
        except HostError as e:
            messages.append(str(e))
        else:
            break
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        assert Holdings.now().beyond(before) == {}, f"with {more} descriptors"
    await vm.close()
    assert len(messages) > 10
    assert [text for text in messages if "Too many open files" not in text] == []
    assert [text for text in messages if "ulimit -n" not in text] == []


async def test_cancelled_twice_the_end_still_comes(config: Callable[..., avmm.Config]) -> None:
    """The second cancellation meets the clean-up that the first began."""
    machine, inside = config(SPIN), asyncio.Event()
    vm = avmm.MicroVM(machine)

    async def live() -> None:
        async with vm:
            inside.set()
            await vm.wait()

    task = asyncio.create_task(live())
    await inside.wait()
    task.cancel()
    for _ in range(5):
        await asyncio.sleep(0)
        task.cancel()
    await asyncio.wait([task])
    assert task.cancelled()
    assert vm.state is avmm.State.STOPPED


async def test_a_program_that_ends_in_the_middle_of_everything_gives_all_back(
    config: Callable[..., avmm.Config],
) -> None:
    """asyncio.run() cancels every task there is, those that clean up included."""
    machine = config(SPIN, io_threads=1)
    other = msgspec.structs.replace(machine, disks=[])

    async def leave(turns: int) -> None:
        running, starting = avmm.MicroVM(machine), avmm.MicroVM(other)
        await running.start()
        tasks = [asyncio.create_task(starting.start())]
        for _ in range(turns):
            await asyncio.sleep(0)
        tasks.append(asyncio.create_task(running.close()))
        for _ in range(turns):
            await asyncio.sleep(0)

    before = Holdings.now()
    for turns in range(20):
        await asyncio.to_thread(asyncio.run, leave(turns))
        assert Holdings.now().beyond(before) == {}, f"left after {turns} turns"
