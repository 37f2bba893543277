"""Checks of the specification run on both transports and with both layouts of rings; on one loop,
for a driver sees nothing of it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import uvloop

import fakes.driver
import fakes.virtio_rig
from avmm.virtio import features
from fakes.pci_driver import pci_rig
from fakes.virtio_rig import virtio_rig

Rigged = Callable[..., Any]
"""Makes a rig of a device's build function."""

_TRANSPORTS: dict[str, Rigged] = {"mmio": virtio_rig, "pci": pci_rig}


def pytest_asyncio_loop_factories() -> Mapping[str, Callable[[], asyncio.AbstractEventLoop]]:
    return {"uvloop": uvloop.new_event_loop}


@pytest.fixture(params=["split", "packed"])
def layout(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Of the rings that drivers negotiate."""
    chosen: str = request.param
    monkeypatch.setattr(fakes.virtio_rig, "ring", chosen)
    monkeypatch.setattr(fakes.driver, "refused", features.IN_ORDER if chosen == "split" else 0)
    return chosen


@pytest.fixture
def accepting(layout: str) -> Callable[[int], int]:
    """What a driver accepts that wants these features."""
    always = features.VERSION_1 | (features.RING_PACKED if layout == "packed" else 0)
    return lambda bits: bits | always


@pytest.fixture(params=_TRANSPORTS)
def rigged(request: pytest.FixtureRequest, layout: str) -> Rigged:
    """A rig on one of the transports, whose drivers negotiate one of the layouts."""
    return _TRANSPORTS[request.param]
