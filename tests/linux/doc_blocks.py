"""The blocks of Python in a document, and what runs them."""

from __future__ import annotations

import ast
import asyncio
import inspect
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

RAISES = re.compile(r"\n# (\w+)(?:: (.*))?$")


@dataclass(frozen=True)
class Block:
    """One fenced block. line: of its first line of code; language: what stands behind the fence."""

    language: str
    code: str
    line: int

    @property
    def raises(self) -> tuple[str, str] | None:
        """The name and message of the error that its last comment promises.

        "..." at the end of the message stands for whatever follows.
        """
        found = RAISES.search(self.code)
        return (found[1], found[2] or "...") if found and found[1].endswith("Error") else None


@dataclass
class Chapter:
    """What stands below one heading of the second level."""

    title: str
    blocks: list[Block] = field(default_factory=list)

    def of(self, language: str) -> list[Block]:
        """Its blocks in one language."""
        return [block for block in self.blocks if block.language == language]

    @property
    def is_test(self) -> bool:
        """Whether it is pytest that runs it."""
        return any("def test_" in block.code for block in self.blocks)


def chapters(document: Path) -> list[Chapter]:
    """Those of a Markdown file that have blocks."""
    found = [Chapter("")]
    block: list[str] | None = None
    language = ""
    for number, line in enumerate(document.read_text().splitlines(), 1):
        if block is not None:
            if line == "```":
                code = "\n".join(block)
                found[-1].blocks.append(Block(language, code, number - len(block)))
                block = None
            else:
                block.append(line)
        elif line.startswith("```"):
            block, language = [], line[3:]
        elif line.startswith("## "):
            found.append(Chapter(line[3:]))
    assert block is None, f"{document}: the last block has no end"
    return [chapter for chapter in found if chapter.blocks]


def run_chapter(document: Path, chapter: Chapter) -> None:
    """Run a chapter's blocks of Python one after the other, in one namespace and on one loop."""
    namespace: dict[str, Any] = {"__name__": "__main__"}
    with asyncio.Runner() as runner:
        for block in chapter.of("python"):
            try:
                _run(runner, block, namespace, str(document))
            except BaseException as e:
                e.add_note(f"{document.name}, {chapter.title!r}, the block in line {block.line}")
                raise


def _run(runner: asyncio.Runner, block: Block, namespace: dict[str, Any], name: str) -> None:
    # No tree of Python objects: Python 3.11.2 cannot make two of them in two threads at once.
    text = "\n" * (block.line - 1) + block.code
    code = compile(text, name, "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT, dont_inherit=True)

    def run() -> None:
        if code.co_flags & inspect.CO_COROUTINE:
            runner.run(eval(code, namespace))
        else:
            exec(code, namespace)

    if block.raises is None:
        run()
        return
    kind, message = block.raises
    with pytest.raises(Exception) as caught:  # noqa: PT011 # which one is looked at below
        run()
    text = str(caught.value)
    if type(caught.value).__name__ != kind:
        raise caught.value
    if message.endswith("..."):
        assert text.startswith(message.removesuffix("..."))
    else:
        assert text == message
