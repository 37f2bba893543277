"""Rings and chains that break the rules: each has the outcome that is written here, the device
works after a reset, nothing else is touched, and a guest beside it notices nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

import avmm
from kvm.attacker import (
    ATTACKED,
    WORKED_ON,
    Device,
    all_at_once,
    neighbour,
    nothing_left,
    sectors_changed,
)

# What is tested is behind the loop; tests/kvm/test_attack_races.py has the other one too.
pytestmark = pytest.mark.asyncio(loop_factories=["uvloop"])

TARGETS = (("blk", 0, False), ("blk", 0, True), ("net", 0, False), ("net", 1, False))
TARGETS += (("vsock", 0, False), ("vsock", 1, False))

FAULTS = {
    "outside": "bad-gpa",
    "wrapping": "bad-gpa",
    "in-pci-hole": "bad-gpa",
    "in-ecam": "bad-gpa",
    "past-the-end": "bad-gpa",
    "no-bytes": "zero-length",
    "four-gib": "bad-gpa",
    "wrong-way": "request",
    "all-readable": "request",
    "all-writable": "request",
    "writable-before-readable": "chain-order",
    "loop": "chain-loop",
    "table-sound": "",
    "table-nested": "indirect-nested",
    "table-misaligned": "",  # a table may be anywhere
    "table-cut": "indirect-size",
    "table-empty": "indirect-size",
    "table-oversized": "indirect-size",
    "table-four-gib": "indirect-size",
    "table-outside": "bad-gpa",
    "table-past-the-end": "bad-gpa",
    "table-and-next": "indirect-nested",
    "table-long": "chain-long",
    "table-not-negotiated": "indirect-nested",
}
OF_SPLIT = {
    "table-loop": "chain-loop",
    "table-bad-next": "bad-head",
    "bad-head": "bad-head",
    "bad-next": "bad-head",
    "index-ahead": "avail-jump",
    "index-back": "avail-jump",
}
OF_PACKED = {"bad-id": "bad-id"}

SOUND = {
    "blk": "used 513 status 0",
    "blk write": "used 1 status 0",
    "net 0": "used 72",
    "net 1": "used 0",
    "vsock 0": "used 44",
    "vsock 1": "used 0",
}
"""Of the chain that the others spoil: what a device writes to it."""


def expected(device: Device) -> tuple[dict[str, str], list[str]]:
    """What the guest says, and the faults in order."""
    faults = FAULTS | (OF_SPLIT if device.ring == "split" else OF_PACKED)
    answered: dict[str, str] = {}
    if device.kind == "blk":
        # Header, data, status: with the status it is 4 GiB. Data the wrong way is none.
        faults["four-gib"] = "chain-bytes"
        answered = dict.fromkeys(("wrong-way", "all-writable"), "used 1 status 1")
        sound = SOUND["blk write" if device.write else "blk"]
    else:
        sound = SOUND[f"{device.kind} {device.queue}"]
        # For reading or writing is the one piece, as it should be.
        answered["all-writable" if device.queue == 0 else "all-readable"] = sound
    if (device.kind, device.queue) == ("net", 1):
        # A frame without bytes is lost, as on any wire.
        answered |= dict.fromkeys(("wrong-way", "all-writable"), sound)
    if device.ring == "packed":
        # Of an entry's flags only WRITE means anything (2.8.7): it is a buffer like any other.
        faults["table-nested"] = "request"
        if (device.kind, device.queue) == ("net", 1):
            answered["table-nested"] = sound
    said = {
        name: answered.get(name, "needs-reset" if fault else sound)
        for name, fault in faults.items()
    }
    said |= {"device": "works", "guards": "whole"}
    return said, [fault for name, fault in faults.items() if said[name] == "needs-reset"]


@pytest.mark.parametrize("ring", ["split", "packed"])
@pytest.mark.parametrize(("transport", "io_threads"), [("pci", 0), ("mmio", 0), ("pci", 1)])
async def test_each_broken_ring_has_its_outcome_and_harms_nothing_else(
    tmp_path: Path, transport: str, io_threads: int, ring: str
) -> None:
    devices = [
        Device(kind, transport, ring, queue, write, io_threads=io_threads)
        for kind, queue, write in TARGETS
    ]
    with nothing_left():
        async with neighbour(tmp_path):
            outcomes = await all_at_once(tmp_path, devices, "rings")
    for device, outcome in outcomes.items():
        said, faults = expected(device)
        assert outcome.said == said, device
        assert outcome.faults == faults, device
        assert outcome.reason.kind is avmm.ExitKind.POWEROFF
        may = {WORKED_ON, ATTACKED} if device.write else {WORKED_ON}
        assert sectors_changed(outcome.disk) <= may, device
