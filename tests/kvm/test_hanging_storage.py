"""A machine whose disk's storage does not answer: it ends all the same, and nobody else notices."""

from __future__ import annotations

from pathlib import Path

import pytest

from fakes.hanging_fs import said_by


@pytest.mark.slow
@pytest.mark.parametrize(("engine", "io_threads"), [("io_uring", 0), ("threads", 1)])
def test_a_machine_on_a_file_system_that_hangs(
    tmp_path: Path, engine: str, io_threads: int
) -> None:
    folder = tmp_path / "mount"
    folder.mkdir()
    assert said_by("fakes.hanging_machine", folder, engine, io_threads) == "done\n"
