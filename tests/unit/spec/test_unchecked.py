"""Features that are not offered are why some demands have no check: no device offers them."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fakes.every_device import EVERY

Rigged = Callable[..., Any]

NET, BLK = 1, 2
GENERAL = {"NOTIFICATION_DATA": 38, "RING_RESET": 40, "ADMIN_VQ": 41}
OWN = {
    NET: {
        "HASH_TUNNEL": 51,
        "VQ_NOTF_COAL": 52,
        "NOTF_COAL": 53,
        "HASH_REPORT": 57,
        "RSS": 60,
        "RSC_EXT": 61,
        "SPEED_DUPLEX": 63,
    },
    BLK: {"LIFETIME": 15, "ZONED": 17},
}
"""Bits of chapters 5 and 6."""


def reasons() -> set[str]:
    entries = [
        entry
        for path in Path(__file__).parent.glob("unchecked_*.toml")
        for entry in tomllib.loads(path.read_text())["must"]
    ]
    return {entry["reason"] for entry in entries if entry["why"] == "not offered"}


def test_every_feature_that_is_a_reason_is_known_here() -> None:
    named = {name for reason in reasons() for name in re.findall(r"\bno ([A-Z_]{2,})", reason)}
    assert named == {*GENERAL, *(name for bits in OWN.values() for name in bits)}


@pytest.mark.parametrize("name", EVERY)
async def test_what_is_not_offered_is_not(rigged: Rigged, name: str) -> None:
    async with rigged(EVERY[name]) as rig:
        await rig.driver.probe()
        offered = await rig.driver.read_features()
        absent = GENERAL | OWN.get(rig.device.device_type.virtio_id, {})
        assert [name for name, bit in absent.items() if offered >> bit & 1] == []
