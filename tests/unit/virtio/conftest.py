"""Every test of a device runs with both layouts of rings."""

from __future__ import annotations

import pytest

import fakes.virtio_rig

RIGS = {"virtio_rig", "pci_rig", "net_rig"}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if RIGS & set(vars(metafunc.module)):
        metafunc.parametrize("_ring", ["split", "packed"], indirect=True)


@pytest.fixture(autouse=True)
def _ring(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if hasattr(request, "param"):
        monkeypatch.setattr(fakes.virtio_rig, "ring", request.param)
