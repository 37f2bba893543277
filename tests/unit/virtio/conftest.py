"""Every test of a device runs with both layouts of rings, and where it offers IN_ORDER with it and
without."""

from __future__ import annotations

import pytest

import fakes.driver
import fakes.virtio_rig
from avmm.virtio import features

LAYOUTS = {"split": features.IN_ORDER, "packed": 0}
"""And what drivers refuse."""
RIGS = {"virtio_rig", "pci_rig", "net_rig"}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if RIGS & set(vars(metafunc.module)):
        metafunc.parametrize("_ring", LAYOUTS, indirect=True)


@pytest.fixture(autouse=True)
def _ring(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if hasattr(request, "param"):
        monkeypatch.setattr(fakes.virtio_rig, "ring", request.param)
        monkeypatch.setattr(fakes.driver, "refused", LAYOUTS[request.param])
