"""The documents: the API reference is what its generator prints; the tutorial is typed; links lead
somewhere."""

from __future__ import annotations

import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from linux.doc_blocks import chapters
from style.mypy_strict import strict

ROOT = Path(__file__).parents[2]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def test_the_api_reference_is_up_to_date() -> None:
    script = ROOT / "scripts" / "api_reference.py"
    made = subprocess.run(
        [sys.executable, str(script)], check=True, capture_output=True, text=True
    ).stdout
    assert made == (ROOT / "docs" / "api.md").read_text(), (
        "run scripts/api_reference.py > docs/api.md"
    )


@pytest.mark.slow
def test_the_tutorials_code_is_clean_under_mypy_strict(tmp_path: Path) -> None:
    module = ["from __future__ import annotations\n"]
    for number, chapter in enumerate(chapters(ROOT / "docs" / "embedding.md")):
        body = "\n".join(block.code for block in chapter.of("python"))
        module.append(f"async def chapter_{number}() -> None:\n{textwrap.indent(body, '    ')}\n")
    path = tmp_path / "tutorial.py"
    path.write_text("\n\n".join(module))
    status, told = strict(path, cache=tmp_path)
    assert status == 0, told


def test_the_readmes_program_is_the_tutorials_first() -> None:
    (chapter,) = chapters(ROOT / "README.md")
    first = chapters(ROOT / "docs" / "embedding.md")[0]
    assert [block.code for block in chapter.of("python")] == [first.blocks[0].code]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_and_paths_lead_to_files_and_headings(document: Path) -> None:
    text = document.read_text()
    for target in re.findall(r"\]\(([^)#\s]*)(?:#[^)]*)?\)", text):
        if target and "://" not in target:
            assert (document.parent / target).exists(), f"{document.name}: {target}"
    for path in re.findall(r"`((?:docs|examples|scripts|tests|src)/[\w./-]+)`", text):
        assert (ROOT / path).exists() or "NAME" in path, f"{document.name}: {path}"
    anchors = {re.sub(r"[^\w -]", "", h).lower() for h in re.findall(r"(?m)^#+ (.*)$", text)}
    for anchor in re.findall(r"\]\(#([^)]*)\)", text):
        assert anchor in anchors, f"{document.name}: #{anchor}"
