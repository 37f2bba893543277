"""Device configuration space (virtio 1.3 section 2.5)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from avmm.virtio.state import ACKNOWLEDGE, DRIVER
from fakes.every_device import EVERY

Rigged = Callable[..., Any]


@pytest.mark.parametrize("name", sorted(set(EVERY) - {"rng"}))
@pytest.mark.spec("2.5.2", "let every field it offers be read before FEATURES_OK")
async def test_the_configuration_is_read_before_features_are_chosen(
    rigged: Rigged, name: str
) -> None:
    async with rigged(EVERY[name]) as rig:
        await rig.driver.probe()
        expected = rig.device.config.data
        assert any(expected)
        for status in (0, ACKNOWLEDGE, ACKNOWLEDGE | DRIVER):
            await rig.driver.set_status(status)
            seen = bytes(rig.driver.read_config(at, 1) for at in range(len(expected)))
            assert seen == expected
            for size in (2, 4):
                for at in range(0, len(expected) - size + 1, size):
                    field = rig.driver.read_config(at, size)
                    assert field == int.from_bytes(expected[at : at + size], "little")
