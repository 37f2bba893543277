"""A worker's control group, in a tree made of folders."""

from __future__ import annotations

from pathlib import Path

import pytest

import avmm
from avmm.machine.isolation import cgroup
from avmm.units import MIB


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A group of ours, in which new folders have the files that the kernel makes."""
    made = Path.mkdir

    def mkdir(path: Path) -> None:
        made(path)
        if path.parent.name == "hands-on":
            for name in ("memory.max", "pids.max", "cgroup.procs"):
                (path / name).touch()

    monkeypatch.setattr(Path, "mkdir", mkdir)
    for name in ("hands-on", "bare"):
        made(tmp_path / name)
    return tmp_path


def test_limits_and_process_are_in_it(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cgroup, "own_group", lambda: tree / "hands-on")
    limits = cgroup.limits_of(avmm.Config(kernel="k", memory="64M", cpus=2, io_threads=3))
    group = cgroup.WorkerGroup.make("avmm-7", 7, limits)
    assert group is not None
    assert group.path == tree / "hands-on" / "avmm-7"
    found = {file.name: file.read_text() for file in group.path.iterdir()}
    assert found == {
        "memory.max": str(64 * MIB + cgroup.OVERHEAD_BYTES),
        "pids.max": str(2 + 3 + 64),
        "cgroup.procs": "7",
    }


def test_where_no_controller_is_handed_on_there_is_none(
    tree: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "avmm")
    monkeypatch.setattr(cgroup, "own_group", lambda: tree / "bare")
    assert cgroup.WorkerGroup.make("avmm-7", 7, {"memory.max": 1}) is None
    assert list((tree / "bare").iterdir()) == []
    assert "Worker 7 has no control group" in caplog.text


def test_where_nothing_may_be_made_there_is_none(
    tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for own in (None, tree / "missing"):
        monkeypatch.setattr(cgroup, "own_group", lambda own=own: own)
        assert cgroup.WorkerGroup.make("avmm-7", 7, {}) is None


@pytest.mark.parametrize(
    ("root", "inside", "found"),
    [
        ("/", "/system.slice/a.service", "/sys/fs/cgroup/system.slice/a.service"),
        ("/box", "/box/a", "/sys/fs/cgroup/a"),
        ("/", "/", "/sys/fs/cgroup"),
    ],
)
def test_the_own_group_is_found(tmp_path: Path, root: str, inside: str, found: str) -> None:
    (tmp_path / "cgroup").write_text(f"4:memory:/x\n0::{inside}\n")
    (tmp_path / "mountinfo").write_text(
        "20 1 0:5 / /proc rw - proc proc rw\n"
        f"30 20 0:27 {root} /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw\n"
    )
    assert cgroup.own_group(tmp_path) == Path(found)


def test_without_the_unified_tree_there_is_no_group(tmp_path: Path) -> None:
    (tmp_path / "cgroup").write_text("4:memory:/x\n")
    (tmp_path / "mountinfo").write_text("20 1 0:5 / /proc rw - proc proc rw\n")
    assert cgroup.own_group(tmp_path) is None
    assert cgroup.own_group(tmp_path / "none") is None
