"""The runner of documents' blocks: what it lets pass, and what not."""

from __future__ import annotations

from pathlib import Path

import pytest

from linux.doc_blocks import chapters, run_chapter

DOCUMENT = """
# Title

## One

```python
import asyncio


async def twice(number: int) -> int:
    await asyncio.sleep(0)
    return number * 2
```

words

```toml
key = 1
```

```python
done = await twice(4)
```

### A part of it

```python
asyncio.run(twice(1))
assert done == 8
```

## Without blocks

## Two

```python
LAST
```
"""


def run_last(tmp_path: Path, last: str) -> None:
    document = tmp_path / "document.md"
    document.write_text(DOCUMENT.replace("LAST", last))
    one, two = chapters(document)
    assert (one.title, two.title) == ("One", "Two")
    assert [block.language for block in one.blocks] == ["python", "toml", "python", "python"]
    run_chapter(document, one)
    run_chapter(document, two)


@pytest.mark.parametrize(
    "last",
    [
        "int('x')\n# ValueError: invalid literal for int() with base 10: 'x'",
        "int('x')\n# ValueError: invalid literal...",
        "int('x')\n# ValueError",
        "raise OSError(2, 'gone')\n# FileNotFoundError: ...",
        "pass\n# A comment: of another kind",
    ],
)
def test_a_block_that_keeps_its_promise_passes(tmp_path: Path, last: str) -> None:
    run_last(tmp_path, last)


@pytest.mark.parametrize(
    ("last", "error"),
    [
        ("assert 1 == 2", AssertionError),
        ("done", NameError),
        ("int('7')\n# ValueError: ...", pytest.fail.Exception),
        ("int('x')\n# ValueError: invalid", AssertionError),
        ("int('x')\n# OSError: ...", ValueError),
    ],
)
def test_a_block_that_does_not_fails_with_its_place(
    tmp_path: Path, last: str, error: type[BaseException]
) -> None:
    with pytest.raises(error) as caught:
        run_last(tmp_path, last)
    assert caught.value.__notes__ == ["document.md, 'Two', the block in line 37"]
