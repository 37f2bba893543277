"""docs/embedding.md: every block of it, run as its reader would."""

from __future__ import annotations

import importlib
import pkgutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import entry_points
from pathlib import Path

import pytest

import avmm
from linux.doc_blocks import Chapter, chapters, run_chapter
from linux.guest import Assets

DOCUMENT = Path(__file__).parents[2] / "docs" / "embedding.md"
LIMIT_S = 300
AT_ONCE = 2


def test_every_block_does_what_it_says(
    assets: Assets, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # All in one test, since two guests that boot at once take less time than one after the other.
    monkeypatch.chdir(tmp_path)
    Path("vmlinux").symlink_to(assets.kernel("cloud", "vmlinux"))
    Path("initrd.img").symlink_to(assets.initrd("cloud"))
    # pytest rewrites the modules of a plugin's package as they are imported, by trees that Python
    # 3.11.2 cannot make in two threads at once.
    for module in pkgutil.walk_packages(avmm.__path__, "avmm."):
        if module.name != "avmm.__main__":
            importlib.import_module(module.name)
    found = sorted(chapters(DOCUMENT), key=lambda chapter: -len(chapter.blocks))
    with ThreadPoolExecutor(AT_ONCE) as pool:
        runs = {chapter.title: pool.submit(run, chapter) for chapter in found}
    failed = [error for run in runs.values() if (error := run.exception())]
    if failed:
        raise BaseExceptionGroup("chapters of docs/embedding.md", failed)
    assert len(runs) > 5


def run(chapter: Chapter) -> None:
    if chapter.is_test:
        run_pytest(chapter)
    else:
        run_chapter(DOCUMENT, chapter)


def run_pytest(chapter: Chapter) -> None:
    """In a pytest of its own, with the configuration that the chapter shows."""
    (test,), (settings,) = chapter.of("python"), chapter.of("toml")
    Path("test_guest.py").write_text(test.code)
    Path("pyproject.toml").write_text(settings.code)
    plugin = () if entry_points(group="pytest11", name="avmm") else ("-p", "avmm.pytest_plugin")
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *plugin, "test_guest.py"]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, check=False)
    assert "1 passed" in ran.stdout, ran.stdout + ran.stderr
