"""A microVM in a user's asyncio program: many at once, on any loop, timed out, misused."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import textwrap
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import uvloop

import avmm
from linux.holdings import Holdings

Assemble = Callable[[str], Path]

SPIN = "1: jmp 1b"
HELLO = "putc 'h'\nputc 'i'\npoweroff"
OBEY = "1: inb 0x603\ntest $1, %al\njz 1b\npoweroff"


def config(kernel: Path, **more: object) -> avmm.Config:
    return avmm.Config(kernel=str(kernel), memory="3M", cmdline="", **more)  # type: ignore[arg-type]


@pytest.fixture(autouse=True)
async def nothing_left() -> AsyncIterator[None]:
    """Each test gives back all it held, down to the loop's tasks."""
    uvloop.new_event_loop().close()  # libuv's own pipe, once a process
    before = Holdings.now()
    yield
    assert Holdings.now().beyond(before) == {}
    assert asyncio.all_tasks() == {asyncio.current_task()}


async def hello(kernel: Path) -> avmm.ExitReason:
    async with avmm.MicroVM(config(kernel)) as vm:
        await vm.console.expect(b"hi", timeout=60)
        return await vm.wait()


@pytest.mark.slow
async def test_fifty_in_a_task_group_run_and_leave_nothing(tiny_guest: Assemble) -> None:
    kernel = tiny_guest(HELLO)
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(hello(kernel)) for _ in range(50)]
    assert {task.result().kind for task in tasks} == {avmm.ExitKind.POWEROFF}


@pytest.mark.slow
async def test_one_failing_in_a_task_group_ends_all_others(tiny_guest: Assemble) -> None:
    kernel, vms = tiny_guest(SPIN), [avmm.MicroVM(config(tiny_guest(SPIN))) for _ in range(10)]
    running = asyncio.Semaphore(0)

    async def run(vm: avmm.MicroVM) -> None:
        async with vm:
            running.release()
            await vm.wait()

    async def fail() -> None:
        for _ in vms:
            await running.acquire()
        async with avmm.MicroVM(config(kernel)):
            raise ValueError("the body fails")

    async def all_of_them() -> None:
        async with asyncio.TaskGroup() as group:
            for vm in vms:
                group.create_task(run(vm))
            group.create_task(fail())

    with pytest.raises(ExceptionGroup) as caught:
        await all_of_them()
    assert [type(e) for e in caught.value.exceptions] == [ValueError]
    assert {vm.state for vm in vms} == {avmm.State.STOPPED}
    assert {(await vm.wait()).kind for vm in vms} == {avmm.ExitKind.KILLED}


@pytest.mark.slow
async def test_several_loops_in_several_threads_each_have_their_own(tiny_guest: Assemble) -> None:
    kernel = tiny_guest(HELLO)

    async def several() -> list[avmm.ExitReason]:
        return await asyncio.gather(*(hello(kernel) for _ in range(4)))

    def on_a_loop(factory: Callable[[], asyncio.AbstractEventLoop]) -> list[avmm.ExitReason]:
        with asyncio.Runner(loop_factory=factory) as runner:
            return runner.run(several())

    factories = [uvloop.new_event_loop, asyncio.new_event_loop] * 3
    with ThreadPoolExecutor(len(factories)) as pool:
        loop = asyncio.get_running_loop()
        runs = [loop.run_in_executor(pool, on_a_loop, factory) for factory in factories]
        here, *there = await asyncio.gather(several(), *runs)
    assert {reason.kind for reasons in (here, *there) for reason in reasons} == {
        avmm.ExitKind.POWEROFF
    }


@pytest.mark.parametrize(
    "call",
    [
        lambda vm: vm.wait(),
        lambda vm: vm.stop(),
        lambda vm: vm.console.expect(b"never"),
        lambda vm: vm.console.write(bytes(200_000)),
        lambda vm: vm.console.open()[0].read(1),
        lambda vm: anext(vm.events()),
    ],
    ids=["wait", "stop", "expect", "write", "read", "events"],
)
async def test_a_timeout_works_around_every_call(
    tiny_guest: Assemble, call: Callable[[avmm.MicroVM], Awaitable[object]]
) -> None:
    async with avmm.MicroVM(config(tiny_guest(SPIN))) as vm:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.01):
                await call(vm)
        assert vm.state is avmm.State.RUNNING
    assert (await vm.wait()).kind is avmm.ExitKind.KILLED


async def test_a_timeout_around_start_leaves_nothing(tiny_guest: Assemble) -> None:
    vm = avmm.MicroVM(config(tiny_guest(SPIN)))
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0):
            await vm.start()
    assert vm.state is avmm.State.STOPPED
    with pytest.raises(avmm.ConfigError, match="stopped and never ran"):
        await vm.wait()


async def test_a_second_start_is_refused_at_every_stage(tiny_guest: Assemble) -> None:
    vm = avmm.MicroVM(config(tiny_guest(SPIN)))
    first = asyncio.create_task(vm.start())
    await asyncio.sleep(0)
    for state in ("starting", "running", "stopped"):
        with pytest.raises(avmm.ConfigError, match=f"start: this microVM is {state}, not new"):
            await vm.start()
        await first
        if state == "running":
            await vm.close()


async def test_closing_while_another_task_starts_it_makes_start_fail(tiny_guest: Assemble) -> None:
    vm = avmm.MicroVM(config(tiny_guest(SPIN)))
    start = asyncio.create_task(vm.start())
    await asyncio.sleep(0)
    assert vm.state is avmm.State.STARTING
    await vm.close()
    assert vm.state is avmm.State.STOPPED
    with pytest.raises(avmm.ConfigError, match="closed while it started"):
        await start


async def test_what_was_closed_before_its_start_does_not_start(tiny_guest: Assemble) -> None:
    vm = avmm.MicroVM(config(tiny_guest(SPIN)))
    events = vm.events()
    await vm.close()
    with pytest.raises(avmm.ConfigError, match="stopped, not new"):
        await vm.start()
    assert [event async for event in events] == []


async def test_after_the_end_answers_stay_and_requests_are_refused(tiny_guest: Assemble) -> None:
    async with avmm.MicroVM(config(tiny_guest(HELLO), rng=True)) as vm:
        reason = await vm.wait()
        assert [await vm.wait(), await vm.stop(), await vm.kill()] == [reason] * 3
        statistics = vm.statistics()
        assert statistics is vm.statistics()
        assert hash(statistics)
        with pytest.raises(TypeError):
            statistics.devices["more"] = statistics.devices["rng0"]  # type: ignore[index]
        for refused in (vm.pause, vm.resume, vm.start):
            with pytest.raises(avmm.ConfigError, match="this microVM is stopped"):
                await refused()
        with pytest.raises(avmm.ConfigError, match="this microVM is stopped"):
            vm.set_link("net0", True)
        assert vm.console.scrollback == b"hi"
    await vm.close()
    everything = await asyncio.to_thread(lambda: (asyncio.run(vm.wait()), vm.statistics()))
    assert everything == (reason, statistics)


async def test_another_loop_or_thread_is_refused(tiny_guest: Assemble) -> None:
    async with avmm.MicroVM(config(tiny_guest(SPIN))) as vm:

        async def from_another_loop() -> None:
            calls = (vm.wait, vm.stop, vm.kill, vm.pause, vm.resume, vm.close)
            for call in calls:
                with pytest.raises(avmm.ConfigError, match="another event loop") as caught:
                    await call()
                assert caught.value.kind == "loop"

        def from_another_thread() -> None:
            asyncio.run(from_another_loop())
            for look in (vm.statistics, vm.events, lambda: vm.console, lambda: vm.set_link("", 1)):
                with pytest.raises(avmm.ConfigError, match="another event loop"):
                    look()

        await asyncio.to_thread(from_another_thread)
        assert vm.state is avmm.State.RUNNING
        loop = asyncio.get_running_loop()
        kill = await asyncio.to_thread(asyncio.run_coroutine_threadsafe, vm.kill(), loop)
        assert (await asyncio.wrap_future(kill)).kind is avmm.ExitKind.KILLED


def test_without_a_loop_the_message_says_so(tiny_guest: Assemble) -> None:
    with pytest.raises(avmm.ConfigError, match="no event loop runs here"):
        avmm.MicroVM(config(tiny_guest(SPIN))).events()


async def test_events_tell_a_whole_life(tiny_guest: Assemble) -> None:
    vm = avmm.MicroVM(config(tiny_guest(OBEY)))
    early = vm.events()
    async with vm:
        late = vm.events()
        await vm.pause()
        await vm.pause()
        await vm.resume()
        await vm.resume()
        reason = await vm.stop(60)
    seen = [event async for event in early]
    assert [type(event) for event in seen] == [
        *(avmm.Started, avmm.Paused, avmm.Resumed, avmm.StopRequested),
        *(avmm.ConsoleClosed, avmm.Ended),
    ]
    assert seen[-1] == avmm.Ended(seen[-1].at_s, reason)
    assert [event async for event in late] == seen[1:]
    assert [event.at_s for event in seen] == sorted(event.at_s for event in seen)
    assert [event async for event in vm.events()] == []


async def test_events_tell_of_a_devices_driver_and_its_faults(tiny_guest: Assemble) -> None:
    """A driver that offers a ring outside of memory, then resets the device."""
    guest = tiny_guest("""
        mov $0xd0000000, %ebx
        movl $3, 0x70(%rbx)        /* ACKNOWLEDGE, DRIVER */
        movl $1, 0x24(%rbx)        /* VERSION_1 */
        movl $1, 0x20(%rbx)
        movl $11, 0x70(%rbx)       /* FEATURES_OK */
        movl $15, 0x70(%rbx)       /* DRIVER_OK */
        movl $0x7ffffff0, 0x80(%rbx)
        movl $1, 0x44(%rbx)        /* QueueReady: its ring is nowhere */
        movl $0, 0x70(%rbx)
        poweroff
    """)
    vm = avmm.MicroVM(config(guest, rng=True, transport="mmio"))
    events = vm.events()
    async with vm:
        await vm.wait()
    seen = [event async for event in events]
    device = [e for e in seen if isinstance(e, avmm.DriverReady | avmm.DriverGone)]
    assert [type(event) for event in device] == [avmm.DriverReady, avmm.DriverGone]
    (fault,) = (event for event in seen if isinstance(event, avmm.DeviceFault))
    assert (fault.device, fault.kind) == ("rng0", "queue-address")
    assert "Queue 0" in fault.detail


async def test_a_pause_that_is_cancelled_lets_the_guest_go_on(tiny_guest: Assemble) -> None:
    guest = tiny_guest("mov $0x3f8, %dx\nmov $'x', %al\n1: out %al, %dx\njmp 1b")
    async with avmm.MicroVM(config(guest)) as vm:
        for _ in range(20):
            pause = asyncio.create_task(vm.pause())
            await asyncio.sleep(0)
            pause.cancel()
            await asyncio.wait([pause])
            if not pause.cancelled():
                await vm.resume()
            reader, writer = vm.console.open(scrollback=False)
            assert await reader.read(1) == b"x"
            writer.close()
        assert vm.state is avmm.State.RUNNING


async def test_stop_during_a_pause_reaches_the_guest(tiny_guest: Assemble) -> None:
    async with avmm.MicroVM(config(tiny_guest(OBEY))) as vm:
        pause = asyncio.create_task(vm.pause())
        await asyncio.sleep(0)
        assert (await vm.stop(60)).kind is avmm.ExitKind.STOPPED
        await asyncio.wait([pause])


async def test_kill_during_a_pause_ends_both(tiny_guest: Assemble) -> None:
    async with avmm.MicroVM(config(tiny_guest(SPIN), rng=True, cpus=2)) as vm:
        pause = asyncio.create_task(vm.pause())
        await asyncio.sleep(0)
        assert (await vm.kill()).kind is avmm.ExitKind.KILLED
        await asyncio.wait([pause])
        assert vm.state is avmm.State.STOPPED


async def test_two_tasks_may_wait_stop_and_close_at_once(tiny_guest: Assemble) -> None:
    async with avmm.MicroVM(config(tiny_guest(OBEY))) as vm:
        calls = [vm.wait(), vm.wait(), vm.stop(60), vm.stop(60)]
        reasons = await asyncio.gather(*calls)
        await asyncio.gather(vm.close(), vm.close())
    assert {reason.kind for reason in reasons} == {avmm.ExitKind.STOPPED}


@pytest.mark.slow
def test_a_program_that_forgets_its_microvm_still_ends(tiny_guest: Assemble) -> None:
    program = f"""
        import asyncio, avmm
        config = avmm.Config(kernel={str(tiny_guest(SPIN))!r}, memory="3M", cmdline="")
        vm = avmm.MicroVM(config)
        loop = asyncio.new_event_loop()
        loop.run_until_complete(vm.start())
        loop.close()
        print(vm.state.value)
    """
    command = [sys.executable, "-c", textwrap.dedent(program)]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (ran.returncode, ran.stdout) == (0, "running\n"), ran.stderr


async def test_threads_of_a_microvm_are_named_and_gone(tiny_guest: Assemble) -> None:
    async with avmm.MicroVM(config(tiny_guest(SPIN), cpus=2)):
        names = {thread.name for thread in threading.enumerate()}
        assert {"avmm-vcpu0", "avmm-vcpu1"} <= names
    assert not [t for t in threading.enumerate() if t.name.startswith("avmm")]
