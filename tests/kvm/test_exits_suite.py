"""The exits suite's guests, on this machine's /dev/kvm."""

from __future__ import annotations

from pathlib import Path

import pytest

import avmm
from avmm.bench.exits import ACCESSES, Access, cases, kernel
from avmm.bench.record import LIMIT, OWN
from avmm.bench.suite import Options


@pytest.mark.parametrize("access", ACCESSES, ids=lambda access: access.name)
async def test_each_access_exits_as_its_name_says(tmp_path: Path, access: Access) -> None:
    path = tmp_path / "kernel"
    path.write_bytes(kernel(access, 100))
    config = avmm.Config(kernel=str(path), memory="4M", cmdline="", rng=True, transport="mmio")
    async with avmm.MicroVM(config) as vm:
        assert (await vm.wait()).kind is avmm.ExitKind.POWEROFF
        (vcpu,) = vm.statistics().vcpus
    in_python = 100 if "Python" in access.name or "loop" in access.name else 0
    assert vcpu.mmio == in_python
    assert vcpu.interrupt == (100 if access.name == "answered in C" else 0)


def test_the_suite_measures_every_access() -> None:
    measured = list(cases(Options(runs=1, seconds=0.001)))
    assert [case.name for case in measured] == [access.name for access in ACCESSES]
    assert list(measured[0].series) == [OWN]
    assert all(list(case.series) == [OWN, LIMIT] for case in measured[1:])
