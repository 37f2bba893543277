"""The C shim, and the sole importer of the cffi module."""

from __future__ import annotations

from typing import Any, TypeAlias

from avmm._native import ffi as ffi
from avmm._native import lib as lib

CData: TypeAlias = Any
"""A value of a C type; cffi has no static types of its own."""
