"""Sound chains that ask for what cannot be, and devices set up as no driver would."""

from __future__ import annotations

from pathlib import Path

import pytest

import avmm
from kvm.attacker import (
    WORKED_ON,
    Device,
    all_at_once,
    neighbour,
    nothing_left,
    sectors_changed,
)

# What is tested is behind the loop; tests/kvm/test_attack_races.py has the other one too.
pytestmark = pytest.mark.asyncio(loop_factories=["uvloop"])

UNHARMED = {"device": "works", "guards": "whole"}

IO_ERROR, UNSUPPORTED = "used 1 status 1", "used 1 status 2"

BLK = UNHARMED | {
    "read-far": IO_ERROR,
    "read-wrapping": IO_ERROR,
    "read-part-of-a-sector": IO_ERROR,
    "read-nothing": IO_ERROR,
    "write-far": IO_ERROR,
    "write-part-of-a-sector": IO_ERROR,
    "write-nothing": IO_ERROR,
    "half-a-header": IO_ERROR,
    "unknown-type": UNSUPPORTED,
    "id-of-five-bytes": "used 6 status 0",
    "flush-with-data": "used 1 status 0",
    "zero-far": IO_ERROR,
    "zero-wrapping": IO_ERROR,
    "zero-unknown-flags": UNSUPPORTED,
    "zero-half-a-range": IO_ERROR,
    "zero-too-many": IO_ERROR,
    "discard-far": IO_ERROR,
    "onto-the-ring": "reset",
}

NET = UNHARMED | dict.fromkeys(
    (
        *("header-of-ones", "checksum-far", "segments-of-nothing", "half-a-header"),
        *("header-only", "one-byte", "all-of-memory"),
    ),
    "used 0",
)

VSOCK = UNHARMED | {
    "unknown-sender": "used 0",
    "unknown-receiver": "used 0",
    "unknown-type": "used 0",
    "unknown-operation": "used 0",
    "payload-missing": "needs-reset",
    "payload-of-four-gib": "needs-reset",
    "data-without-a-stream": "used 0",
    "half-a-header": "needs-reset",
    "all-of-memory": "used 0",
    "unanswered": "reset",
}

FAULTS = {"blk": {"avail-jump"}, "net": set(), "vsock": {"request", "avail-jump"}}
"""A ring that the disk wrote over need not be one any more; and the driver of `unanswered` offers
more than its ring holds, which a device that has room yet to keep packets finds out."""

SETUP = UNHARMED | {
    "features-never-offered": "refused",
    "features-of-old": "refused",
    "features-late": "works",
    "queue-of-none": "needs-reset",
    "queue-of-three": "needs-reset",
    "queue-too-large": "needs-reset",
    "queue-unaligned": "needs-reset",
    "queue-nowhere": "needs-reset",
    "queue-wrapping": "needs-reset",
    "queue-past-the-end": "needs-reset",
    "driver-area-in-pci-hole": "needs-reset",
    "device-area-wrapping": "needs-reset",
    "moved-live": "works",
    "taken-away-live": "works",
    "registers": "works",
}
SETUP_OF_PACKED = {"queue-of-three": "taken"}
SETUP_OF_PCI = {
    "functions-that-are-not-there": "ones",
    "configuration-space": "works",
    "moved-bar": "works",
    "masked-for-ever": "works, pending",
    "all-masked": "works",
    "messages-that-are-none": "works",
    "vector-that-is-none": "refused",
}


@pytest.mark.parametrize("ring", ["split", "packed"])
@pytest.mark.parametrize("transport", ["pci", "mmio"])
async def test_a_request_for_what_cannot_be_fails_and_changes_nothing(
    tmp_path: Path, transport: str, ring: str
) -> None:
    expected = {
        Device("blk", transport, ring): BLK,
        Device("net", transport, ring, 1): NET,
        Device("vsock", transport, ring, 1): VSOCK,
    }
    with nothing_left():
        async with neighbour(tmp_path):
            outcomes = await all_at_once(tmp_path, expected, "requests")
    for device, outcome in outcomes.items():
        assert outcome.said == expected[device], device
        assert set(outcome.faults) <= FAULTS[device.kind], device
        assert sectors_changed(outcome.disk) <= {WORKED_ON}, device


@pytest.mark.parametrize("ring", ["split", "packed"])
@pytest.mark.parametrize("transport", ["pci", "mmio"])
async def test_a_device_that_is_set_up_wrongly_says_so_and_works_after_a_reset(
    tmp_path: Path, transport: str, ring: str
) -> None:
    expected = dict(SETUP)
    if ring == "packed":
        expected |= SETUP_OF_PACKED
    if transport == "pci":
        expected |= SETUP_OF_PCI
    devices = [
        Device(kind, transport, ring, int(kind != "blk")) for kind in ("blk", "net", "vsock")
    ]
    with nothing_left():
        async with neighbour(tmp_path):
            outcomes = await all_at_once(tmp_path, devices, "setup")
    for device, outcome in outcomes.items():
        assert outcome.said == expected, device
        assert set(outcome.faults) == {"queue-size", "queue-address"}, device
        assert outcome.reason.kind is avmm.ExitKind.POWEROFF
        assert sectors_changed(outcome.disk) <= {WORKED_ON}, device
