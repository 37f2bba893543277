"""The gate: pause and stop reach every vCPU, also one that waits for the loop."""

from __future__ import annotations

import asyncio
import threading

from avmm.loop import LoopBridge, LoopClosed
from avmm.machine.vcpu.wake import Gate, Mode


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
