"""virtio-blk on storage that does not answer: others go on, and an end has its bounds."""

from __future__ import annotations

from pathlib import Path

import pytest

from fakes.hanging_fs import said_by


@pytest.mark.slow
@pytest.mark.parametrize("io_threads", [0, 1], ids=["loop", "thread"])
@pytest.mark.parametrize("engine", ["io_uring", "threads"])
def test_a_file_system_that_hangs(tmp_path: Path, engine: str, io_threads: int) -> None:
    """In namespaces of its own, served by a program of ours."""
    said = said_by("fakes.hanging_disk", tmp_path, engine, io_threads)
    assert "an_end_leaves_it_to_itself" in said
