"""A served disk whose storage does not answer: front-ends wait, and a stop has its bound."""

from __future__ import annotations

from pathlib import Path

import pytest

from fakes.hanging_fs import said_by


@pytest.mark.slow
@pytest.mark.parametrize(
    ("engine", "io_threads"), [("io_uring", 0), ("io_uring", 1), ("threads", 1)]
)
def test_a_server_on_a_file_system_that_hangs(tmp_path: Path, engine: str, io_threads: int) -> None:
    """In namespaces of its own, served by a program of ours."""
    folder = tmp_path / "mount"
    folder.mkdir()
    assert said_by("fakes.hanging_server", folder, engine, io_threads) == "done\n"
