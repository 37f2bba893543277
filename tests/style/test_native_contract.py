"""native.Lib, the headers and the compiled module say the same."""

from __future__ import annotations

import re
from pathlib import Path

from avmm.native import Lib, lib

NATIVE = Path(__file__).parents[2] / "native"


def declared() -> set[str]:
    """Every function and enumerator in the headers' cdef parts."""
    names: set[str] = set()
    for header in NATIVE.glob("*.h"):
        for part in re.findall(
            r"/\* cdef begin \*/(.*?)/\* cdef end \*/", header.read_text(), re.S
        ):
            text = re.sub(r"/\*.*?\*/", "", part, flags=re.S)
            for body in re.findall(r"enum \w+ \{([^}]*)\}", text):
                names |= {item.split("=")[0].strip() for item in body.split(",") if item.strip()}
            text = re.sub(r"(struct|enum) \w+ \{[^}]*\};", "", text)
            names |= set(re.findall(r"\b(av_\w+)\(", text))
    return names


def typed() -> set[str]:
    functions = {name for name in vars(Lib) if name.startswith("av_")}
    return functions | {name for name in Lib.__annotations__ if name.startswith("AV_")}


def test_the_protocol_names_what_the_headers_declare() -> None:
    assert typed() == declared()


def test_the_compiled_module_has_all_of_it() -> None:
    assert {name for name in declared() if not hasattr(lib, name)} == set()
