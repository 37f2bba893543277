"""The committed inputs of the targets for what Python parses (scripts/fuzz), without atheris."""

from __future__ import annotations

from pathlib import Path

import pytest

from fakes.parser_targets import TARGETS

CORPORA = Path(__file__).parents[2] / "corpora"


@pytest.mark.parametrize("name", TARGETS)
def test_the_corpus_does_no_harm(name: str) -> None:
    inputs = sorted((CORPORA / name).iterdir())
    assert inputs
    for path in inputs:
        try:
            TARGETS[name](path.read_bytes())
        except Exception as e:
            e.add_note(f"by the input {path.name}")
            raise
