"""Prints docs/api.md from the docstrings of avmm's public names."""

from __future__ import annotations

import ast
import enum
import functools
import importlib
import inspect
import re
import textwrap
from collections.abc import Iterator

import msgspec

import avmm
from avmm.config import field_description

HEAD = """\
<!-- Made by scripts/api_reference.py; a test compares. -->
# API reference

All that `import avmm` has, and under their full names what its calls return or take. How it is
used: [embedding.md](embedding.md). Options of devices, also of the command line:
[devices.md](devices.md). What is not here is not for users.
"""

SECTIONS = {
    "A microVM": ("avmm.machine.machine", "avmm.machine.config", "avmm.machine"),
    "Events": ("avmm.machine.events",),
    "Console": ("avmm.console", "avmm.machine.console"),
    "Commands and files of the guest": ("avmm.agent",),
    "vsock": ("avmm.vsock",),
    "Devices": ("avmm.virtio.devices",),
    "Disks in Python": ("avmm.virtio.devices.blk_source", "avmm.block"),
    "NICs and switches in Python": ("avmm.virtio.devices.nic", "avmm.hostnet"),
    "Devices in Python": ("avmm.virtio.python_device",),
    "vhost-user": ("avmm.vhost_user",),
    "pytest": ("avmm.pytest_plugin",),
    "Statistics": (),
    "Errors": ("avmm.errors",),
    "Others": ("avmm",),
}
"""Where a name stands: in the section with the longest prefix of its module."""

BEYOND = (
    "avmm.agent.files.Files",
    "avmm.agent.process.ExecOptions",
    "avmm.console.streams.GuestReader",
    "avmm.console.streams.GuestWriter",
    "avmm.vsock.host.VsockHost",
    "avmm.vsock.host.VsockServer",
    "avmm.block.source.BlockSource",
    "avmm.block.objects.ram.RamDisk",
    "avmm.block.objects.overlay.OverlayDisk",
    "avmm.block.objects.http.HttpDisk",
    "avmm.block.objects.faults.FaultyDisk",
    "avmm.block.objects.faults.FaultRates",
    "avmm.pytest_plugin.MicroVMs",
)
"""What one gets, or can use, beside the names of avmm itself."""

NOT_MADE = {
    *("Agent", "Capture", "Chain", "Console", "Events", "Files", "GuestPort", "GuestReader"),
    *("GuestWriter", "MicroVMs", "Port", "Process", "SwitchPort", "VsockHost", "VsockServer"),
}
"""Classes whose objects a user gets and does not make."""

INTERNAL = re.compile(r"^    # What follows is for ")
"""In a class this comment ends what is for users."""

LINE_MAX = 92


def reference() -> str:
    """The whole document."""
    sections: dict[str, dict[str, type]] = {title: {} for title in SECTIONS}
    for name, value in names():
        sections[section_of(value)][name] = value
    text = HEAD
    for title, entries in sections.items():
        if entries:
            links = ", ".join(f"[{name}](#{name.replace('.', '').lower()})" for name in entries)
            text += f"\n**{title}:** {links}\n"
    for title, entries in sections.items():
        if entries:
            text += f"\n## {title}\n"
        for name, value in entries.items():
            text += f"\n### {name}\n\n" + described(value)
    return text


def names() -> Iterator[tuple[str, type]]:
    """Each public name, and what it means."""
    for name in avmm.__all__:
        value = getattr(avmm, name)
        if inspect.isclass(value):
            yield name, value
        elif name != "__version__":
            raise SystemExit(f"avmm.{name} is no class: scripts/api_reference.py cannot show it")
    public = {getattr(avmm, name) for name in avmm.__all__}
    for path in BEYOND:
        module, _, name = path.rpartition(".")
        value = getattr(importlib.import_module(module), name)
        if value not in public:
            door = module.removesuffix(f".{module.rpartition('.')[2]}")
            shown = door if hasattr(importlib.import_module(door), name) else module
            yield f"{shown}.{name}", value


def section_of(value: type) -> str:
    """The section a class belongs to."""
    if value.__name__.endswith("Statistics"):
        return "Statistics"
    module = value.__module__
    found = (
        (len(prefix), title)
        for title, prefixes in SECTIONS.items()
        for prefix in prefixes
        if module == prefix or module.startswith(f"{prefix}.")
    )
    return max(found)[1]


def described(value: type) -> str:
    """A class: how it is made, what it is, what it has."""
    text = f"```python\n{making(value)}\n```\n\n{doc_of(value)}\n"
    if issubclass(value, enum.Enum):
        members = ", ".join(f"`{name}`" for name in value.__members__)
        return f"{text}\nMembers: {members}.\n"
    if issubclass(value, msgspec.Struct):
        text += "\n| field | type | default | |\n|---|---|---|---|\n"
        for name, kind, default in fields(value):
            shown = f"`{default}`" if default else "needed"
            kind = kind.replace("|", "\\|")
            text += f"| `{name}` | `{kind}` | {shown} | {field_description(value, name)} |\n"
    for name, heading, doc in members_of(value):
        text += f"\n#### {value.__name__}.{name}\n\n```python\n{heading}\n```\n\n{doc}\n"
    return text


def making(value: type) -> str:
    """How an object is made: the class, and its parameters where a user gives them."""
    start = f"class {value.__name__}"
    if issubclass(value, enum.Enum | msgspec.Struct) or value.__name__ in NOT_MADE:
        return start
    for base in value.__mro__:
        if "__dataclass_fields__" in vars(base) and "__init__" in vars(base):
            given = [f"{n}: {k} = {d}" if d else f"{n}: {k}" for n, k, d in fields(value)]
            return wrapped(start, given, "")
        for node in body_of(base):
            if isinstance(node, ast.FunctionDef) and node.name == "__init__":
                return parameters(node, start)
    return start


def fields(value: type) -> Iterator[tuple[str, str, str]]:
    """(name, type, default or "") of each field, those of bases first."""
    for base in reversed(value.__mro__):
        for node in body_of(base):
            if not isinstance(node, ast.AnnAssign) or not isinstance(node.target, ast.Name):
                continue
            kind = node.annotation
            if isinstance(kind, ast.Subscript) and ast.unparse(kind.value) == "Annotated":
                assert isinstance(kind.slice, ast.Tuple)
                kind = kind.slice.elts[0]
            if ast.unparse(kind).startswith("ClassVar") or node.target.id.startswith("_"):
                continue
            default = ast.unparse(node.value) if node.value else ""
            if default.startswith("msgspec.field"):
                default = "[]"
            yield node.target.id, ast.unparse(kind), default


def members_of(value: type) -> Iterator[tuple[str, str, str]]:
    """(name, signature, text) of each public method and property, in the order of the source."""
    seen: set[str] = set()
    for base in value.__mro__:
        for node in body_of(base):
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            doc = ast.get_docstring(node)
            if node.name in seen or node.name.startswith("_") or not doc:
                continue
            seen.add(node.name)
            yield node.name, signature(node), doc


def signature(node: ast.FunctionDef | ast.AsyncFunctionDef) -> str:
    """As a user would write it."""
    decorators = {ast.unparse(decorator) for decorator in node.decorator_list}
    returns = ast.unparse(node.returns) if node.returns else "None"
    if "property" in decorators:
        return f"{node.name}: {returns}"
    prefix = "async " if isinstance(node, ast.AsyncFunctionDef) else ""
    lines = "".join(f"@{name}\n" for name in decorators & {"classmethod", "staticmethod"})
    return lines + parameters(node, f"{prefix}def {node.name}", f" -> {returns}")


def parameters(
    node: ast.FunctionDef | ast.AsyncFunctionDef, before: str = "", behind: str = ""
) -> str:
    """A function's parameters in parentheses, on lines of their own where one would be long."""
    args = node.args
    positional = [*args.posonlyargs, *args.args]
    defaults = [None] * (len(positional) - len(args.defaults)) + args.defaults
    words = [parameter(*pair) for pair in zip(positional, defaults, strict=True)]
    if args.posonlyargs:
        words.insert(len(args.posonlyargs), "/")
    if args.vararg:
        words.append("*" + parameter(args.vararg))
    elif args.kwonlyargs:
        words.append("*")
    words += [parameter(*pair) for pair in zip(args.kwonlyargs, args.kw_defaults, strict=True)]
    if args.kwarg:
        words.append("**" + parameter(args.kwarg))
    if words and words[0] in ("self", "cls"):
        words = words[2:] if words[1:2] == ["/"] else words[1:]
    return wrapped(before, words, behind)


def parameter(arg: ast.arg, default: ast.expr | None = None) -> str:
    """One parameter."""
    kind = f": {ast.unparse(arg.annotation)}" if arg.annotation else ""
    return f"{arg.arg}{kind}" + (f" = {ast.unparse(default)}" if default else "")


def wrapped(before: str, words: list[str], behind: str) -> str:
    """`before(words)behind`, in as many lines as it needs."""
    line = f"{before}({', '.join(words)}){behind}"
    if len(line) <= LINE_MAX:
        return line
    return "".join([f"{before}(\n", *(f"    {word},\n" for word in words), f"){behind}"])


def doc_of(value: type) -> str:
    """A class' own docstring; exceptions may have inherited one."""
    return inspect.cleandoc(value.__doc__ or "")


@functools.cache
def body_of(value: type) -> list[ast.stmt]:
    """What stands in a class of ours, as far as it is for users."""
    if not value.__module__.startswith("avmm"):
        return []
    lines = textwrap.dedent(inspect.getsource(value)).splitlines()
    end = next((at for at, line in enumerate(lines) if INTERNAL.match(line)), len(lines))
    tree = ast.parse("\n".join(lines[:end]))
    assert isinstance(tree.body[0], ast.ClassDef)
    return tree.body[0].body


if __name__ == "__main__":
    print(reference(), end="")
