"""Imports go only downward through the floors, and some modules only through one door."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[2] / "src" / "avmm"

FLOORS = (
    ("errors", "units", "log", "config", "metrics", "frozen"),
    ("native", "loop", "descriptors", "eventfd", "kicks", "unixsocket", "kvm", "mem"),
    ("bus", "pci", "legacy", "boot", "block", "hostnet", "vsock", "console", "agent"),
    ("virtio",),
    ("machine", "vhost_user"),
    ("snapshot",),
    ("api", "cli", "jailer", "fleet", "bench", "pytest_plugin"),
)
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}

SOLE_IMPORTERS = {
    "avmm._native": "native.py",
    "uvloop": "loop.py",
    "pyroute2": "hostnet/netlink.py",
}

FILES = sorted(
    path.relative_to(SOURCE).as_posix()
    for path in SOURCE.rglob("*.py")
    if path.parent != SOURCE or path.stem not in ("__init__", "__main__")  # the front doors
)


def imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module or ""
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def room(module: str) -> str | None:
    parts = module.split(".")
    return parts[1] if parts[0] == "avmm" and len(parts) > 1 else None


@pytest.mark.parametrize("file", FILES)
def test_imports_go_only_downward(file: str) -> None:
    own = file.split("/")[0].removesuffix(".py")
    assert own in FLOOR_OF, f"{file}: no floor is known for {own}"
    for module in imports(SOURCE / file):
        other = room(module)
        if other is not None and other in FLOOR_OF:
            assert FLOOR_OF[other] <= FLOOR_OF[own], f"{file} imports {module} from a floor above"


@pytest.mark.parametrize(("module", "owner"), SOLE_IMPORTERS.items())
def test_some_modules_have_one_importer(module: str, owner: str) -> None:
    importers = {
        file
        for file in FILES
        if any(name == module or name.startswith(f"{module}.") for name in imports(SOURCE / file))
    }
    assert importers == {owner}
