"""A worker's control group, in a tree made of folders."""

from __future__ import annotations

import asyncio
import errno
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

import avmm
from avmm.machine.isolation import cgroup
from avmm.units import MIB


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Groups in which new folders have the files that the kernel makes, where controllers are
    handed on, and can be removed with them."""
    made = Path.mkdir

    def mkdir(path: Path) -> None:
        made(path)
        handed_on = path.parent / "cgroup.subtree_control"
        if handed_on.exists() and handed_on.read_text() == "+memory +pids":
            for name in ("memory.max", "pids.max", "cgroup.procs"):
                (path / name).touch()

    def rmdir(path: Path) -> None:
        if (path / "cgroup.procs").exists() and (path / "cgroup.procs").read_text():
            raise OSError(errno.EBUSY, "")
        if not path.exists():
            raise FileNotFoundError
        shutil.rmtree(path)

    monkeypatch.setattr(Path, "mkdir", mkdir)
    monkeypatch.setattr(Path, "rmdir", rmdir)
    for name in ("hands-on", "bare"):
        made(tmp_path / name)
        (tmp_path / name / "cgroup.subtree_control").touch()
    (tmp_path / "hands-on/cgroup.subtree_control").write_text("+memory +pids")
    return tmp_path


def in_group(monkeypatch: pytest.MonkeyPatch, path: Path) -> None:
    monkeypatch.setattr(cgroup, "own_group", lambda: path)


def config(**more: Any) -> avmm.Config:
    return avmm.Config(kernel="k", memory="64M", **more)


def test_limits_and_process_are_in_it(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    in_group(monkeypatch, tree / "hands-on")
    limits = cgroup.limits_of(config())
    group = cgroup.WorkerGroup.make("avmm-7", 7, limits)
    assert group is not None
    assert group.path == tree / "hands-on" / "avmm-7"
    found = {file.name: file.read_text() for file in group.path.iterdir()}
    assert found == {**{file: str(value) for file, value in limits.items()}, "cgroup.procs": "7"}


def test_limits_grow_with_what_a_worker_has_to_do() -> None:
    def beyond(**more: Any) -> tuple[int, int]:
        plain, limits = cgroup.limits_of(config()), cgroup.limits_of(config(**more))
        memory, pids = (limits[file] - plain[file] for file in ("memory.max", "pids.max"))
        return memory // MIB, pids

    uring = 4 * (os.cpu_count() or 1)
    assert cgroup.limits_of(config())["memory.max"] == (64 + 2 + 256) * MIB
    assert beyond(cpus=5) == (0, 4)
    assert beyond(io_threads=2) == (0, 2 * (1 + uring))
    assert beyond(disks=[avmm.Disk("a"), avmm.Disk("b")]) == (2 * 128, 8)
    assert beyond(vsock=True) == beyond(agent=True) == (512, 0)


def test_where_no_controller_is_handed_on_there_is_none(
    tree: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "avmm")
    in_group(monkeypatch, tree / "bare")
    assert cgroup.WorkerGroup.make("avmm-7", 7, {"memory.max": 1}) is None
    assert not (tree / "bare/avmm-7").exists()
    assert "Worker 7 has no control group" in caplog.text


def test_where_nothing_may_be_made_there_is_none(
    tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for own in (None, tree / "missing"):
        monkeypatch.setattr(cgroup, "own_group", lambda own=own: own)
        assert cgroup.WorkerGroup.make("avmm-7", 7, {}) is None


def test_controllers_are_handed_on_in_a_group_above_that_is_delegated(
    tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_group(monkeypatch, tree / "bare/program")
    (tree / "bare/program").mkdir()
    assert cgroup.WorkerGroup.make("avmm-7", 7, {"memory.max": 1}) is None
    delegated = {(tree / "bare", "user.delegate"): b"1"}
    monkeypatch.setattr(os, "getxattr", lambda path, name: delegated[path, name])
    group = cgroup.WorkerGroup.make("avmm-7", 7, {"memory.max": 1})
    assert group is not None
    assert group.path == tree / "bare/avmm-7"
    assert (tree / "bare/cgroup.subtree_control").read_text() == "+memory +pids"


def test_an_empty_group_of_the_same_name_is_made_anew(
    tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A program that is killed leaves the groups of its workers."""
    in_group(monkeypatch, tree / "hands-on")
    left = tree / "hands-on/avmm-7"
    left.mkdir()
    (left / "memory.max").write_text("5")
    (left / "other").touch()
    assert cgroup.WorkerGroup.make("avmm-7", 7, {"pids.max": 2}) is not None
    assert not (left / "other").exists()
    assert (left / "memory.max").read_text() == ""
    assert cgroup.WorkerGroup.make("avmm-7", 8, {"pids.max": 3}) is None  # somebody lives there
    assert (left / "cgroup.procs").read_text() == "7"


@pytest.mark.parametrize(
    ("events", "limit", "told"),
    [
        ("oom 0\noom_kill 0", "1048576", None),
        ("max 9\noom 3\noom_kill 1", "7340032", "reached its memory limit, 7 MiB"),
        ("max 9\noom 3\noom_kill 1", "max", "reached its memory limit, memory.max"),
        (
            "oom 0\noom_kill 1\noom_group_kill 0",
            "7340032",
            "on the host or in a control group above",
        ),
    ],
)
def test_a_kill_for_memory_is_told(
    tmp_path: Path, events: str, limit: str, told: str | None
) -> None:
    (tmp_path / "memory.events").write_text(events + "\n")
    (tmp_path / "memory.max").write_text(limit + "\n")
    reason = cgroup.WorkerGroup(tmp_path).killed_for()
    assert (told in reason) if told is not None and reason is not None else reason is told


async def test_a_group_is_removed_when_it_is_empty_or_left(
    tree: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    in_group(monkeypatch, tree / "hands-on")
    group = cgroup.WorkerGroup.make("avmm-7", 7, {})
    assert group is not None
    assert group.killed_for() is None
    removing = asyncio.create_task(group.removed())
    await asyncio.sleep(0)
    assert group.path.exists()
    (group.path / "cgroup.procs").write_text("")
    await removing
    assert not group.path.exists()
    await group.removed()
    assert caplog.text == ""

    monkeypatch.setattr(cgroup, "GONE_S", 0.02)
    group = cgroup.WorkerGroup.make("avmm-8", 8, {})
    assert group is not None
    await group.removed()
    assert f"Control group {group.path} is left" in caplog.text


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
