"""Configuration by one schema: option strings, TOML and JSON become the same msgspec structs."""

from __future__ import annotations

import difflib
import os
import tomllib
from collections.abc import Mapping
from typing import Any, TypeVar, get_type_hints

import msgspec

from avmm.errors import ConfigError

T = TypeVar("T", bound=msgspec.Struct)

_SWITCH = {"on": True, "off": False}


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
    A flag may also be written flag=on or flag=off.

    what: the option, for the ConfigError that names a bad part.
    """
    aliases = {field_hint(struct, f, "option") or f: f for f in struct.__struct_fields__}
    values: dict[str, Any] = {}
    for index, part in enumerate(text.split(",")):
        key, separator, value = part.partition("=")
        if separator and key in aliases:
            name: str = aliases[key]
            values[name] = _SWITCH.get(value, value) if _is_flag(struct, name) else value
        elif part in aliases and _is_flag(struct, aliases[part]):
            values[aliases[part]] = True
        elif index == 0 and part:
            values[struct.__struct_fields__[0]] = part
        else:
            raise ConfigError("option", f"{what} {text}: {_unknown(key, aliases)}")
    return convert(values, struct, f"{what} {text}", strict=False)


def convert(values: Mapping[str, Any], struct: type[T], what: str, *, strict: bool = True) -> T:
    """A struct from plain values, checked; ConfigError names the key."""
    known = struct.__struct_fields__
    for key in values:
        if key not in known:
            raise ConfigError("unknown-key", f"{what}: {_unknown(key, known)}")
    try:
        return msgspec.convert(values, struct, strict=strict)
    except msgspec.ValidationError as e:
        if isinstance(e.__cause__, ConfigError):
            raise e.__cause__ from None
        raise ConfigError("value", f"{what}: {e}") from e


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


def _is_flag(struct: type[msgspec.Struct], name: str) -> bool:
    return get_type_hints(struct)[name] is bool


def _unknown(key: str, known: Mapping[str, str] | tuple[str, ...]) -> str:
    near = difflib.get_close_matches(key, list(known), n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(known)}"
    return f"unknown key {key!r}; {hint}"
