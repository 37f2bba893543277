"""Feature bits, of every kind of device (virtio 1.3 sections 2.2 and 6)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from avmm.virtio import features
from avmm.virtio.state import ACKNOWLEDGE, DRIVER, FEATURES_OK
from fakes.every_device import EVERY

Rigged = Callable[..., Any]

NET, BLK, CONSOLE, RNG, VSOCK, NOBODYS = 1, 2, 3, 4, 19, 50
SR_IOV = 37

DEFINED: dict[int, set[int]] = {
    NET: {*range(24), *range(51, 64)} - {4, 6, 58},
    BLK: {1, 2, 4, 5, 6, *range(9, 18)},
    CONSOLE: {0, 1, 2},
    RNG: set(),
    VSOCK: {0, 1, 2},
    NOBODYS: set(),
}
"""Bits of each kind's own, by the sections of chapter 5."""

GENERAL = {28, 29, *range(32, 41)}
"""Of chapter 6, without ADMIN_VQ (41), which virtio over MMIO does not have (4.2.5)."""

NEEDS: dict[int, int] = {
    features.NET_GUEST_TSO4: features.NET_GUEST_CSUM,
    features.NET_GUEST_TSO6: features.NET_GUEST_CSUM,
    features.NET_GUEST_USO4: features.NET_GUEST_CSUM,
    features.NET_GUEST_USO6: features.NET_GUEST_CSUM,
    features.NET_GUEST_ECN: features.NET_GUEST_TSO,
    features.NET_HOST_TSO4: features.NET_CSUM,
    features.NET_HOST_TSO6: features.NET_CSUM,
    features.NET_HOST_USO: features.NET_CSUM,
    features.NET_HOST_ECN: features.NET_HOST_TSO4 | features.NET_HOST_TSO6,
    features.NET_CTRL_GUEST_OFFLOADS: features.NET_CTRL_VQ,
    features.NET_CTRL_RX: features.NET_CTRL_VQ,
    features.NET_CTRL_VLAN: features.NET_CTRL_VQ,
    features.NET_CTRL_RX_EXTRA: features.NET_CTRL_VQ,
    features.NET_GUEST_ANNOUNCE: features.NET_CTRL_VQ,
    features.NET_MQ: features.NET_CTRL_VQ,
    features.NET_CTRL_MAC_ADDR: features.NET_CTRL_VQ,
}
"""One of these, by section 5.1.3.1; other kinds' features need none."""


def bits(mask: int) -> set[int]:
    return {bit for bit in range(mask.bit_length()) if mask >> bit & 1}


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.spec("2.2.2", "offer no feature without those it requires")
@pytest.mark.spec("2.2.2", "offer no feature it would not support if the driver accepted it")
@pytest.mark.spec("6.2", "offer VERSION_1")
@pytest.mark.spec("6.2", "not offer SR_IOV without that capability")
async def test_features_are_offered_with_sense(rigged: Rigged, name: str) -> None:
    async with rigged(EVERY[name]) as rig:
        await rig.driver.probe()
        offered = await rig.driver.read_features()
        assert bits(offered) <= DEFINED[rig.device.device_type.virtio_id] | GENERAL
        assert bits(offered) >= {32}
        assert SR_IOV not in bits(offered)
        if rig.device.device_type.virtio_id == NET:
            needs = [need for feature, need in NEEDS.items() if offered & feature]
            assert len(needs) == len(NEEDS)
            assert all(offered & need for need in needs)


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.spec("2.2.2", "refuse FEATURES_OK with features it does not accept")
async def test_features_ok_stays_clear_with_any_bit_that_was_not_offered(
    rigged: Rigged, name: str
) -> None:
    async with rigged(EVERY[name]) as rig:
        await rig.driver.probe()
        offered = await rig.driver.read_features()
        for bit in {0, 3, 23, 24, 30, 31, 33, 36, 40, 41, 50, 63} - bits(offered):
            assert not await rig.driver.negotiate(features.VERSION_1 | 1 << bit)
            assert rig.driver.status() == ACKNOWLEDGE | DRIVER
        assert not await rig.driver.negotiate(offered & ~features.VERSION_1)
        assert await rig.driver.negotiate(offered)
        assert rig.driver.status() == ACKNOWLEDGE | DRIVER | FEATURES_OK
