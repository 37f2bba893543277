"""The gate: pause and stop reach every vCPU, also one that waits for the loop."""

from __future__ import annotations

import asyncio
import gc
import threading
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import pytest

from avmm.bus.bus import Bus
from avmm.bus.region import Post
from avmm.loop import POSTS_MAX, LoopBridge, LoopClosed
from avmm.machine.vcpu.exits import Exits
from avmm.machine.vcpu.wake import Gate, Mode
from avmm.native import lib


class FakeVcpu:
    """Runs "guest instructions" until it is kicked, as KVM_RUN does."""

    def __init__(self, gate: Gate) -> None:
        self.gate = gate
        self.kicked = threading.Event()
        self.instructions = 0
        self.ran = threading.Event()
        self.thread = threading.Thread(target=self.main)
        self.thread.start()

    def main(self) -> None:
        while self.gate.park():
            self.kicked.clear()
            if self.gate.mode is not Mode.RUN:
                continue
            self.instructions += 1
            self.ran.set()
            self.kicked.wait()
        self.gate.ended()

    def kick(self) -> None:
        self.kicked.set()


async def in_thread(event: threading.Event) -> None:
    await asyncio.to_thread(event.wait)


async def test_vcpus_wait_at_the_gate_until_resumed_and_end_when_stopped() -> None:
    gate = Gate(asyncio.get_running_loop(), 2)
    vcpus = [FakeVcpu(gate) for _ in range(2)]
    gate.kicks = [v.kick for v in vcpus]
    await gate.pause()
    assert [v.instructions for v in vcpus] == [0, 0]
    gate.resume()
    for v in vcpus:
        await in_thread(v.ran)
    gate.stop()
    for v in vcpus:
        await asyncio.to_thread(v.thread.join)


async def test_nothing_runs_between_pause_and_resume() -> None:
    gate = Gate(asyncio.get_running_loop(), 2)
    vcpus = [FakeVcpu(gate) for _ in range(2)]
    gate.kicks = [v.kick for v in vcpus]
    for _ in range(20):
        gate.resume()
        await gate.pause()
        before = [v.instructions for v in vcpus]
        for v in vcpus:
            v.kick()
        await asyncio.sleep(0)
        assert [v.instructions for v in vcpus] == before
    gate.stop()
    for v in vcpus:
        await asyncio.to_thread(v.thread.join)


async def test_a_vcpu_that_waits_for_the_loop_counts_as_paused() -> None:
    loop = asyncio.get_running_loop()
    gate = Gate(loop, 1)
    errors: list[BaseException] = []
    bridge = LoopBridge(loop, errors.append)
    paused_inside_call = asyncio.Event()

    async def action() -> None:
        await gate.pause()  # would wait for ever if the calling vCPU counted as running
        paused_inside_call.set()

    def main() -> None:
        assert gate.park()
        with gate.resting():
            bridge.call_and_wait(action)
        while gate.park():
            pass
        gate.ended()

    thread = threading.Thread(target=main)
    thread.start()
    gate.resume()
    await paused_inside_call.wait()
    gate.stop()
    await asyncio.to_thread(thread.join)
    assert errors == []


@dataclass
class Exit:
    """What of struct av_exit is looked at."""

    kind: int = lib.AV_EXIT_PIO_WRITE
    location: int = 0x10
    size: int = 1
    value: int = 0


class Posting:
    """Registers whose every write is a Post."""

    def __init__(self) -> None:
        self.performed = 0

    def read(self, offset: int, size: int) -> int:
        return 0

    def write(self, offset: int, size: int, value: int) -> Post:
        return Post(self._perform)

    def _perform(self) -> None:
        self.performed += 1


def hold_the_loop_until(condition: Callable[[], bool]) -> None:
    while not condition():
        time.sleep(0)  # another thread's turn


async def test_vcpus_that_post_faster_than_the_loop_follows_wait_for_it() -> None:
    loop = asyncio.get_running_loop()
    gate = Gate(loop, 1)
    errors: list[BaseException] = []
    bridge = LoopBridge(loop, errors.append)
    registers, pio = Posting(), Bus()
    pio.add(0x10, 1, registers, "posting")
    exits = Exits(pio=pio, mmio=Bus(), bridge=bridge, gate=gate, drain_uart=lambda: None)
    written = 0
    count = 4 * POSTS_MAX

    def main() -> None:
        nonlocal written
        assert gate.park()
        for _ in range(count):
            assert exits.handle(Exit()) is None
            written += 1
        gate.ended()

    thread = threading.Thread(target=main)
    thread.start()
    gate.resume()
    hold_the_loop_until(lambda: bridge.behind and bool(bridge._waiting))
    assert (written, registers.performed) == (POSTS_MAX, 0)
    await asyncio.to_thread(thread.join)
    assert (written, registers.performed) == (count, count)
    assert not bridge.behind
    assert errors == []


async def test_stop_is_final() -> None:
    gate = Gate(asyncio.get_running_loop(), 1)
    vcpu = FakeVcpu(gate)
    gate.kicks = [vcpu.kick]
    gate.stop()
    gate.resume()
    await asyncio.to_thread(vcpu.thread.join)
    assert vcpu.instructions == 0
    await gate.pause()


async def test_closing_the_bridge_releases_a_waiting_thread() -> None:
    loop = asyncio.get_running_loop()
    bridge = LoopBridge(loop, lambda e: None)
    started = asyncio.Event()
    cancelled = asyncio.Event()
    outcome: list[str] = []

    async def never() -> None:
        started.set()
        try:
            await asyncio.Event().wait()
        finally:
            cancelled.set()

    def main() -> None:
        try:
            bridge.call_and_wait(never)
        except LoopClosed:
            outcome.append("closed")
        try:
            bridge.post(lambda: outcome.append("ran"))
        except LoopClosed:
            outcome.append("refused")

    thread = threading.Thread(target=main)
    thread.start()
    await started.wait()
    await bridge.close()
    await asyncio.to_thread(thread.join)
    assert outcome == ["closed", "refused"]
    assert cancelled.is_set()


async def test_an_action_that_had_not_begun_when_the_bridge_closed_is_never_missed() -> None:
    loop = asyncio.get_running_loop()
    errors: list[BaseException] = []
    bridge = LoopBridge(loop, errors.append)
    closing: list[asyncio.Task[None]] = []
    begun = False

    async def action() -> None:
        nonlocal begun
        begun = True

    def close_before_it_begins() -> Awaitable[None]:
        closing.append(loop.create_task(bridge.close()))
        return action()

    with pytest.raises(LoopClosed):
        await asyncio.to_thread(bridge.call_and_wait, close_before_it_begins)
    await closing[0]
    gc.collect()  # would warn of a coroutine that nobody awaited
    assert (begun, errors) == (False, [])


async def test_a_call_on_its_way_to_the_loop_when_the_bridge_closes_is_not_performed() -> None:
    bridge = LoopBridge(asyncio.get_running_loop(), pytest.fail)
    performed: list[str] = []
    caller = asyncio.create_task(
        asyncio.to_thread(bridge.call_and_wait, lambda: performed.append("late"))
    )
    await asyncio.sleep(0)  # the thread is started
    hold_the_loop_until(lambda: bool(bridge._waiting))
    await bridge.close()
    with pytest.raises(LoopClosed):
        await caller
    await asyncio.sleep(0)
    assert performed == []


async def test_an_action_that_raises_is_reported_and_its_caller_released() -> None:
    loop = asyncio.get_running_loop()
    errors: list[BaseException] = []
    bridge = LoopBridge(loop, errors.append)

    def plain() -> None:
        raise ValueError("plain")

    async def waiting() -> None:
        raise ValueError("waiting")

    await asyncio.to_thread(bridge.call_and_wait, plain)
    await asyncio.to_thread(bridge.call_and_wait, waiting)
    await asyncio.to_thread(bridge.post, plain)
    await asyncio.sleep(0)
    assert [str(e) for e in errors] == ["plain", "waiting", "plain"]


async def test_call_and_wait_returns_only_after_the_action() -> None:
    bridge = LoopBridge(asyncio.get_running_loop(), lambda e: None)
    steps: list[str] = []

    async def action() -> None:
        await asyncio.sleep(0)
        steps.append("action")

    def main() -> None:
        bridge.call_and_wait(action)
        steps.append("caller")

    await asyncio.to_thread(main)
    assert steps == ["action", "caller"]
