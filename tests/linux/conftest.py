"""The linux layer: stock Debian kernels booted by avmm in this process, as root.

Runs where /dev/kvm runs stock kernels: a machine with VT-x or AMD-V, or inside scripts/testbed.
Kernels and guest file systems are those of scripts/assets, under $AVMM_CACHE. One boot takes
seconds, so one guest is asked several things, and a test runs on one event loop: uvloop, or the
stock loop where it is marked `both_loops`. AVMM_VARIANTS=1 runs those on both, and all that is
marked `variant`: the same on another transport, or by another image of a kernel.

Devices are on virtio-pci, where a test says nothing else; AVMM_TRANSPORT=mmio, AVMM_RING=split and
AVMM_IO_THREADS=N in the environment give those guests another transport, other rings, or I/O
threads.
"""

from __future__ import annotations

import asyncio
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest
import uvloop

from linux.guest import Assets, Guests
from linux.holdings import Holdings

VARIANTS = bool(os.environ.get("AVMM_VARIANTS"))


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "both_loops: run on the stock asyncio loop, or on both")
    config.addinivalue_line("markers", "variant: repeats another; run with AVMM_VARIANTS=1")


def pytest_asyncio_loop_factories(
    item: pytest.Item,
) -> Mapping[str, Callable[[], asyncio.AbstractEventLoop]]:
    factories: dict[str, Callable[[], asyncio.AbstractEventLoop]] = {}
    stock = item.get_closest_marker("both_loops") is not None
    if VARIANTS or not stock:
        factories["uvloop"] = uvloop.new_event_loop
    if stock:
        factories["asyncio"] = asyncio.new_event_loop
    return factories


def why_not_here() -> str | None:
    """Why this machine cannot run the layer; None when it can."""
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        return "/dev/kvm is missing or not accessible"
    flags = Path("/proc/cpuinfo").read_text().split()
    if "vmx" not in flags and "svm" not in flags:
        return "the CPU shows neither vmx nor svm: a software KVM; use scripts/test linux"
    if os.geteuid() != 0:
        return "TAPs need root; use sudo or scripts/test linux"
    missing = Assets.locate().missing()
    if missing:
        return f"{missing[0]} is missing; run scripts/assets"
    return None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not VARIANTS:
        left_out = [item for item in items if item.get_closest_marker("variant")]
        items[:] = [item for item in items if item not in left_out]
        config.hook.pytest_deselected(items=left_out)
    reason = why_not_here()
    if reason is None:
        return
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def assets() -> Assets:
    """The kernels and guest file systems."""
    return Assets.locate()


@pytest.fixture
def guests(assets: Assets) -> Guests:
    """Boots guests; each one's console is shown when the test fails."""
    return Guests(assets)


@pytest.fixture
def root_disk(assets: Assets, tmp_path: Path) -> Path:
    """A copy of the small root file system, to be written."""
    return Path(shutil.copy(assets.root, tmp_path / "root.ext4"))


@pytest.fixture
def other_root_disk(assets: Assets, tmp_path: Path) -> Path:
    """A second copy, for a second guest."""
    return Path(shutil.copy(assets.root, tmp_path / "other.ext4"))


@pytest.fixture(scope="session", autouse=True)
def libuv_signal_pipe() -> None:
    """libuv makes one pipe per process with its first loop: not a leak of any test."""
    uvloop.new_event_loop().close()


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    """Each test gives back every descriptor, mapping, thread, child and network device."""
    before = Holdings.now()
    yield
    left = Holdings.now().beyond(before)
    assert not left, f"left behind: {left}"
