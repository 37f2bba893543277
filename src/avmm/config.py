"""Configuration by one schema: option strings, TOML and JSON become the same msgspec structs."""

from __future__ import annotations

import difflib
import functools
import os
import tomllib
import types
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import msgspec

from avmm.errors import ConfigError

T = TypeVar("T", bound=msgspec.Struct)

_SHOWN_MAX = 60

_SWITCH = {"on": True, "off": False}


class Checked(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Base of configuration structs: each value is of its field's declared type.

    A struct with a __post_init__() of its own calls super().__post_init__() first.
    """

    def __post_init__(self) -> None:
        """Raises ConfigError("value") that names the first bad field, its value and its type."""
        for name, hint in _hints(type(self)).items():
            if problem := _mismatch(getattr(self, name), hint, name):
                raise ConfigError("value", f"{type(self).__name__}: {problem}")


def field_hint(struct: type[msgspec.Struct], name: str, key: str) -> Any:
    """An entry of the `extra` of a field's Annotated[..., msgspec.Meta(extra={...})]."""
    hint = get_type_hints(struct, include_extras=True)[name]
    for meta in getattr(hint, "__metadata__", ()):
        if isinstance(meta, msgspec.Meta) and meta.extra and key in meta.extra:
            return meta.extra[key]
    return None


def field_description(struct: type[msgspec.Struct], name: str) -> str:
    """The description in a field's metadata."""
    hint = get_type_hints(struct, include_extras=True)[name]
    for meta in getattr(hint, "__metadata__", ()):
        if isinstance(meta, msgspec.Meta) and meta.description:
            return meta.description
    raise ValueError(f"{struct.__name__}.{name} has no description")


def parse_option(text: str, struct: type[T], what: str) -> T:
    """A struct from "VALUE,key=value,flag": the first part may be the first field's bare value.
    A flag may also be written flag=on or flag=off; a list has : between its parts.

    what: the option, for the ConfigError that names a bad part.
    """
    keys = {key.name: key for key in option_keys(struct)}
    values: dict[str, Any] = {}
    for index, part in enumerate(text.split(",")):
        name, separator, value = part.partition("=")
        if separator and name in keys:
            keys[name].put(values, value)
        elif part in keys and keys[part].is_flag:
            keys[part].put(values, "on")
        elif index == 0 and part:
            next(iter(keys.values())).put(values, part)
        else:
            raise ConfigError("option", f"{what} {text}: {_unknown(name, keys)}")
    return convert_text(values, struct, f"{what} {text}")


@dataclass(frozen=True, slots=True)
class OptionKey:
    """What can be said in an option string. path: of the field, in a struct of a struct too."""

    name: str
    path: tuple[str, ...]
    description: str
    hint: Any

    @property
    def is_flag(self) -> bool:
        """Whether it needs no value."""
        return self.hint is bool

    def put(self, values: dict[str, Any], text: str) -> None:
        """Add what was said to the values of a struct."""
        for name in self.path[:-1]:
            values = values.setdefault(name, {})
        value: Any = text
        if self.is_flag:
            value = _SWITCH.get(text, text)
        elif self.hint == list[str]:
            value = text.split(":")
        values[self.path[-1]] = value


def option_keys(struct: type[msgspec.Struct]) -> list[OptionKey]:
    """The keys of a struct's option string: its fields, by their `option` where they have one. A
    field that is a struct itself has that one's fields, behind its `prefix`."""
    found = []
    for name, hint in _hints(struct).items():
        text = field_description(struct, name)
        inner = _inner_struct(hint)
        if inner is None:
            key = field_hint(struct, name, "option") or name
            found.append(OptionKey(key, (name,), text, hint))
            continue
        prefix = field_hint(struct, name, "prefix")
        found += [
            OptionKey(prefix + key.name, (name, *key.path), f"{text}: {key.description}", key.hint)
            for key in option_keys(inner)
        ]
    return found


def _inner_struct(hint: Any) -> type[msgspec.Struct] | None:
    """The struct that a value of this type may be."""
    arms = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    return next((a for a in arms if isinstance(a, type) and issubclass(a, msgspec.Struct)), None)


def convert_text(values: Mapping[str, Any], struct: type[T], what: str) -> T:
    """A struct from values of which some are still text, as on a command line: "2" is a 2."""
    try:
        return msgspec.convert(values, struct, strict=False)
    except msgspec.ValidationError as e:
        if isinstance(e.__cause__, ConfigError):
            raise e.__cause__ from None
        raise ConfigError("value", f"{what}: {e}") from e
    except UnicodeEncodeError as e:
        raise ConfigError("value", f"{what}: {e.object[e.start : e.end]!r} is not UTF-8") from e


def convert(values: Mapping[str, Any], struct: type[T], what: str) -> T:
    """A struct from plain values, checked; ConfigError names the key.

    what: begins the message; "FILE: " or, with the path of a part of it, "FILE: disks[0].".
    """
    known = struct.__struct_fields__
    for key in values:
        if key not in known:
            begin = f"{what[:-1]}: " if what.endswith(".") else what
            raise ConfigError("unknown-key", f"{begin}{_unknown(key, known)}")
    values = dict(values)
    for field in msgspec.structs.fields(struct):
        inner = _inner_struct(_hints(struct)[field.name])
        if inner is not None and isinstance(values.get(field.name), dict):
            values[field.name] = convert(values[field.name], inner, f"{what}{field.name}.")
        if field.name not in values:
            if field.required:
                raise ConfigError("value", f"{what}{field.name} is missing")
        elif problem := _mismatch(values[field.name], _hints(struct)[field.name], field.name):
            raise ConfigError("value", f"{what}{problem}")
    return struct(**values)


def read_file(path: str) -> dict[str, Any]:
    """The plain values of a .toml or .json file."""
    try:
        with open(path, "rb") as file:
            data = file.read()
        if path.endswith(".toml"):
            return tomllib.loads(data.decode())
        if path.endswith(".json"):
            values = msgspec.json.decode(data)
            if isinstance(values, dict):
                return values
            raise ConfigError("config-file", f"Config file {path}: it must be a JSON object")
    except OSError as e:
        raise ConfigError("config-file", f"Config file {path}: {os.strerror(e.errno or 0)}") from e
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, msgspec.DecodeError) as e:
        raise ConfigError("config-file", f"Config file {path}: {e}") from e
    raise ConfigError("config-file", f"Config file {path}: its name must end in .toml or .json")


def _unknown(key: str, known: Iterable[str]) -> str:
    known = tuple(known)
    near = difflib.get_close_matches(key, known, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(known)}"
    return f"unknown key {key!r}; {hint}"


@functools.cache
def _hints(struct: type[msgspec.Struct]) -> dict[str, Any]:
    hints = get_type_hints(struct)
    return {name: hints[name] for name in struct.__struct_fields__}


def _mismatch(value: Any, hint: Any, path: str) -> str | None:
    """What is wrong with a value of a declared type, and at which path; None when nothing is."""
    if hint is Any or (hint is None and value is None):
        return None
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        problems = [_mismatch(value, arm, path) for arm in args]
        if None in problems:
            return None
        inside = [p for p in problems if p and not p.startswith(f"{path}: ")]
        return inside[0] if inside else _is_not(value, hint, path)
    if origin is Literal:
        fits = any(value == arg and type(value) is type(arg) for arg in args)
        return None if fits else _is_not(value, hint, path)
    if not _is_instance(value, origin or hint):
        return _is_not(value, hint, path)
    if isinstance(value, str) and "\0" in value:
        return f"{path}: {_shown(value)} has a NUL in it"
    if isinstance(value, list) and args:
        items = (_mismatch(item, args[0], f"{path}[{at}]") for at, item in enumerate(value))
        return next(filter(None, items), None)
    return None


def _is_instance(value: Any, kind: Any) -> bool:
    if kind in (int, float) and isinstance(value, bool):
        return False
    return isinstance(value, (int, float) if kind is float else kind)


def _is_not(value: Any, hint: Any, path: str) -> str:
    return f"{path}: {_shown(value)} is not {_described(hint)}"


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _SHOWN_MAX else f"{text[:_SHOWN_MAX]}..."


def _described(hint: Any) -> str:
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(_described(arm) for arm in args)
    if origin is Literal:
        return " or ".join(repr(arg) for arg in args)
    if origin is list:
        return f"list of {_described(args[0])}"
    return "None" if hint is type(None) else str(getattr(hint, "__name__", hint))
