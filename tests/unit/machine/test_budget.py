"""What a VM's exits may take, by a clock of the test's own; and that the loop's work is charged."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from avmm.loop import LoopBridge
from avmm.machine.vcpu import budget as module
from avmm.machine.vcpu.budget import BURST_NS, Budget
from avmm.native import CData, ffi, lib

MS = 1_000_000
SECOND = 1000 * MS
FIFTH = 200_000
"""In millionths."""
OWED_MAX = 100 * MS
TURN = MS // 2


@contextmanager
def new(share_ppm: int = FIFTH, burst_ns: int = 10 * MS) -> Iterator[CData]:
    budget = lib.av_budget_create(share_ppm, burst_ns, 0)
    assert budget
    yield budget
    lib.av_budget_destroy(budget)


def test_a_burst_is_free_and_what_is_beyond_it_is_waited_for_at_the_shares_rate() -> None:
    with new() as budget:
        lib.av_budget_spend(budget, 10 * MS - 1, 0)
        assert lib.av_budget_wait_ns(budget, 0) == 0
        lib.av_budget_spend(budget, 1 + 2 * MS, 0)
        assert lib.av_budget_wait_ns(budget, 0) == 5 * (2 * MS + TURN)
        assert lib.av_budget_wait_ns(budget, 5 * MS) == 5 * (MS + TURN)


def test_who_waited_may_spend_a_turn_before_it_waits_again() -> None:
    with new() as budget:
        lib.av_budget_spend(budget, 10 * MS, 0)
        now = lib.av_budget_wait_ns(budget, 0)
        lib.av_budget_spend(budget, TURN - 1, now)
        assert lib.av_budget_wait_ns(budget, now) == 0
        lib.av_budget_spend(budget, 1, now)
        assert lib.av_budget_wait_ns(budget, now) == 5 * TURN


@pytest.mark.parametrize("share_ppm", [20_000, FIFTH, 999_999])
@pytest.mark.parametrize("vcpus", [1, 4])
def test_a_storm_gets_its_share_however_many_vcpus_make_it(share_ppm: int, vcpus: int) -> None:
    exit_ns, end = 10_000, SECOND // 4
    spent, ready = 0, [0] * vcpus
    with new(share_ppm, MS) as budget:
        while (now := min(ready)) < end:
            vcpu = ready.index(now)
            wait_ns = lib.av_budget_wait_ns(budget, now)
            if wait_ns:
                ready[vcpu] = now + wait_ns
                continue
            ready[vcpu] = now + exit_ns
            lib.av_budget_spend(budget, exit_ns, now + exit_ns)
            spent += exit_ns
    most = MS + end * share_ppm // 10**6 + TURN + vcpus * exit_ns
    # One vCPU cannot take more than all of its time, which it spends on nothing else here.
    assert 0.8 * min(most, vcpus * end) <= spent <= most


def test_no_more_than_a_tenth_of_a_second_is_owed() -> None:
    with new() as budget:
        lib.av_budget_spend(budget, 100 * SECOND, 0)
        lib.av_budget_spend(budget, 2**63, 0)
        assert lib.av_budget_wait_ns(budget, 0) == 5 * (OWED_MAX + TURN)


def test_rest_fills_no_more_than_the_burst() -> None:
    with new() as budget:
        lib.av_budget_spend(budget, 10 * MS, 100 * SECOND)
        assert lib.av_budget_wait_ns(budget, 100 * SECOND) > 0


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Of what is charged in Python: it passes only where a test says so."""
    now = [0]
    monkeypatch.setattr(module.time, "monotonic_ns", lambda: now[0])
    monkeypatch.setattr(module.time, "thread_time_ns", lambda: now[0])
    return now


async def test_what_vcpus_let_the_loop_do_is_charged_with_a_turn_each(clock: list[int]) -> None:
    budget = Budget(0.5)
    bridge = LoopBridge(asyncio.get_running_loop(), pytest.fail, budget.charged)
    done = asyncio.Event()

    def work() -> None:
        clock[0] += BURST_NS - module.TURN_NS + MS

    bridge.post(work)
    await asyncio.to_thread(bridge.call_and_wait, done.set)
    # What was spent is paid back while it is spent, at half of its rate.
    owed = MS + module.TURN_NS
    level = lib.av_budget_wait_ns(budget.native, clock[0])
    assert done.is_set()
    assert level == 2 * (owed + TURN)
    await bridge.close()
    budget.close()


async def test_an_action_that_raises_is_charged_too(clock: list[int]) -> None:
    budget = Budget(0.5)
    errors: list[BaseException] = []
    bridge = LoopBridge(asyncio.get_running_loop(), errors.append, budget.charged)

    def work() -> None:
        clock[0] += 2 * BURST_NS
        raise ValueError

    await asyncio.to_thread(bridge.call_and_wait, work)
    assert lib.av_budget_wait_ns(budget.native, clock[0]) > 0
    assert [type(e) for e in errors] == [ValueError]
    await bridge.close()
    budget.close()


def test_what_the_loop_waits_for_is_charged_when_the_guest_is_the_reason(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = [0]
    blocked = [SECOND]
    monkeypatch.setattr(module.time, "monotonic_ns", lambda: now[0])
    monkeypatch.setattr(module.time, "thread_time_ns", lambda: 5 * SECOND)
    budget = Budget(0.5, lambda: blocked[0])
    with budget.charged():  # others have the GIL, or the processor
        now[0] += SECOND
    assert lib.av_budget_wait_ns(budget.native, now[0]) == 0
    with budget.charged():
        blocked[0] += BURST_NS
    owed = 2 * module.TURN_NS
    assert lib.av_budget_wait_ns(budget.native, now[0]) == 2 * (owed + TURN)
    budget.close()


def test_what_comes_after_the_end_is_not_charged() -> None:
    budget = Budget(0.5)
    budget.close()
    budget.close()
    with budget.charged():
        pass
    assert budget.native == ffi.NULL
