"""How a soak of tiny guests is judged; tests/kvm runs one."""

from __future__ import annotations

import random

import pytest

from avmm.bench import soak
from avmm.bench.guest.soak import Held
from avmm.bench.soak import Life, Soak

WARM = [Held(500, 90, 30), Held(900, 45, 4)]


@pytest.mark.parametrize(
    ("last", "problem"),
    [
        (Held(1000 + 4096, 40, 5), None),
        (Held(1000 + 9000, 40, 5), "memory grew from 1000 to 10000 KiB"),
        (Held(1000, 41, 5), "descriptors grew: [40, 40, 41]"),
        (Held(1000, 40, 6), "threads grew: [5, 5, 6]"),
        (Held(1000, 39, 4), None),
    ],
)
def test_what_is_held_after_the_first_intervals_has_to_stay(
    last: Held, problem: str | None
) -> None:
    result = Soak(held=[*WARM, Held(1000, 40, 5), Held(1200, 40, 5), last])
    soak._judge(result)
    assert result.problems == ([problem] if problem else [])


def test_a_short_soak_says_nothing_of_what_is_held() -> None:
    result = Soak(held=WARM)
    soak._judge(result)
    assert result.problems == []


def test_all_there_is_to_choose_is_chosen() -> None:
    choice = random.Random(0)
    lives = [Life.chosen(choice) for _ in range(2000)]
    assert {life.attack for life in lives} == {*soak.ATTACKS, "storm"}
    assert {life.storm for life in lives} == {*soak.STORMS, ""}
    assert {(life.kind, life.transport, life.ring) for life in lives if life.ends} == {
        (kind, transport, ring)
        for kind in ("blk", "net", "vsock")
        for transport in ("pci", "mmio")
        for ring in ("packed", "split")
    }
