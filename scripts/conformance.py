"""Prints docs/conformance.md: what virtio 1.3 demands of a device, and the test behind each demand.

Read from the source of the tests, which are not imported: from marks like
`@pytest.mark.spec("2.1.2", "what the device must do, in our words")`, and from the tables of
tests/unit/spec/unchecked_*.toml, each with section, must, why and reason.
"""

from __future__ import annotations

import ast
import re
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[1]
TESTS = ROOT / "tests"

CHAPTERS = {
    "2.1": "Device Status Field",
    "2.2": "Feature Bits",
    "2.4": "Device Reset",
    "2.5": "Device Configuration Space",
    "2.6": "Virtqueues",
    "2.7": "Split Virtqueues",
    "2.8": "Packed Virtqueues",
    "2.10": "Shared Memory Regions",
    "2.12": "Device groups",
    "2.13": "Administration Virtqueues",
    "3": "General Initialization and Device Operation",
    "4.1": "Virtio Over PCI Bus",
    "4.2": "Virtio Over MMIO",
    "5.1": "Network Device",
    "5.2": "Block Device",
    "5.3": "Console Device",
    "5.4": "Entropy Device",
    "5.10": "Socket Device",
    "6": "Reserved Feature Bits",
}
WHYS = {
    "not checked": "observable, and to be done",
    "not kept": "observable, and not done, for the reason given",
    "not observable": "a driver cannot tell the difference",
    "not offered": "belongs to a feature or device that avmm does not have",
}

HEAD = """\
<!-- Made by scripts/conformance.py; a test compares. -->
# Conformance

What virtio 1.3 demands of a device (its MUSTs and MUST NOTs, paraphrased), section by section, and
the tests that check each on our devices. A demand is observable when a driver could tell from
outside that it is not kept.

"""


class Malformed(Exception):
    """A mark or a table that this cannot read."""


@dataclass(frozen=True, slots=True)
class Demand:
    """One MUST of a section."""

    section: str
    must: str

    @property
    def chapter(self) -> str:
        for chapter in CHAPTERS:
            if self.section == chapter or self.section.startswith(chapter + "."):
                return chapter
        raise Malformed(f"Section {self.section} of '{self.must}' is in no chapter known here")

    @property
    def order(self) -> tuple[tuple[int, ...], str]:
        return tuple(int(number) for number in self.section.split(".")), self.must


@dataclass(frozen=True, slots=True)
class Test:
    """A test function: its file, from tests/ on, and its name."""

    path: str
    name: str


@dataclass(slots=True)
class Register:
    """All demands: checked ones by their tests, the others with (why, reason)."""

    checked: dict[Demand, list[Test]] = field(default_factory=dict)
    unchecked: dict[Demand, tuple[str, str]] = field(default_factory=dict)


def _is_mark(node: ast.AST) -> bool:
    return isinstance(node, ast.Attribute) and ast.unparse(node) == "pytest.mark.spec"


def _constants(tree: ast.Module) -> dict[str, object]:
    """A module's names for texts."""
    return {
        target.id: node.value.value
        for node in tree.body
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant)
        for target in node.targets
        if isinstance(target, ast.Name)
    }


def _demand(call: ast.Call, constants: dict[str, object], where: str) -> Demand:
    match [constants.get(a.id) if isinstance(a, ast.Name) else a for a in call.args]:
        case [ast.Constant(str(section)), str(must) | ast.Constant(str(must))]:
            if re.fullmatch(r"[1-9]\d*(\.[1-9]\d*)*", section) and not call.keywords:
                return Demand(section, must)
    raise Malformed(f"{where}: a spec mark has a section and a text, or its name in the module")


def marks(path: Path) -> Iterator[tuple[Demand, Test]]:
    """Of one file: those on test functions, and in their parameters."""
    source = path.read_text()
    if "mark.spec" not in source:
        return
    tree = ast.parse(source)
    name, constants = str(path.relative_to(TESTS)), _constants(tree)
    seen = 0
    for function in ast.walk(tree):
        if not isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        for decorator in function.decorator_list:
            for node in ast.walk(decorator):
                if isinstance(node, ast.Call) and _is_mark(node.func):
                    seen += 1
                    where = f"{name}:{node.lineno}"
                    yield _demand(node, constants, where), Test(name, function.name)
    if seen != sum(_is_mark(node) for node in ast.walk(tree)):
        raise Malformed(f"{name}: a spec mark that decorates no function")


def collect() -> Register:
    """From the whole tree."""
    register = Register()
    for path in sorted(TESTS.rglob("test_*.py")):
        for demand, test in marks(path):
            tests = register.checked.setdefault(demand, [])
            if test not in tests:
                tests.append(test)
    for path in sorted((TESTS / "unit" / "spec").glob("unchecked_*.toml")):
        for entry in tomllib.loads(path.read_text())["must"]:
            demand = Demand(entry["section"], entry["must"])
            if demand in register.checked or demand in register.unchecked:
                raise Malformed(f"{path.name}: '{demand.must}' is there twice, or is checked")
            if entry["why"] not in WHYS:
                raise Malformed(f"{path.name}: why={entry['why']!r}; known: {', '.join(WHYS)}")
            register.unchecked[demand] = entry["why"], entry["reason"]
    return register


def _totals(register: Register) -> str:
    lines = "| | checked | observable | not observable | not offered |\n|---|---|---|---|---|\n"
    sums = [0, 0, 0, 0]
    for chapter, title in CHAPTERS.items():
        checked = sum(demand.chapter == chapter for demand in register.checked)
        whys = [why for d, (why, _) in register.unchecked.items() if d.chapter == chapter]
        row = [checked, checked + whys.count("not checked") + whys.count("not kept")]
        row += [whys.count("not observable"), whys.count("not offered")]
        sums = [a + b for a, b in zip(sums, row, strict=True)]
        lines += f"| {chapter} {title} | " + " | ".join(map(str, row)) + " |\n"
    return lines + "| all | " + " | ".join(map(str, sums)) + " |\n"


def _chapter(register: Register, chapter: str) -> str:
    text = ""
    checked = sorted((d for d in register.checked if d.chapter == chapter), key=lambda d: d.order)
    if checked:
        text += "\n| section | the device must | checked by |\n|---|---|---|\n"
        for demand in checked:
            tests = "<br>".join(
                f"[{Path(test.path).stem}](../tests/{test.path}) `{test.name}`"
                for test in register.checked[demand]
            )
            text += f"| {demand.section} | {demand.must} | {tests} |\n"
    others = sorted((d for d in register.unchecked if d.chapter == chapter), key=lambda d: d.order)
    if others:
        text += "\n| section | without a check | why | |\n|---|---|---|---|\n"
        for demand in others:
            why, reason = register.unchecked[demand]
            text += f"| {demand.section} | {demand.must} | {why} | {reason} |\n"
    return text


def document() -> str:
    """The whole of it."""
    register = collect()
    text = HEAD + _totals(register)
    text += "".join(f"\n- {why}: {meaning}" for why, meaning in WHYS.items()) + "\n"
    for chapter, title in CHAPTERS.items():
        if body := _chapter(register, chapter):
            text += f"\n## {chapter} {title}\n{body}"
    return text


if __name__ == "__main__":
    print(document(), end="")
