"""Builds avmm._native: cffi API mode over the headers and sources of this folder.

Each header is the contract of its source. What stands between `/* cdef begin */`
and `/* cdef end */` is what Python may call; cffi checks it against the compiled header.
"""

import os
from pathlib import Path

from cffi import FFI

HERE = Path(__file__).resolve().parent

# In the order in which their declarations depend on one another.
MODULES = (
    "gmem",
    "file",
    "interrupt",
    "vring",
    "hold",
    "bucket",
    "kicks",
    "home",
    "relay",
    "throttle",
    "budget",
    "rng",
    "cable",
    "switch",
    "stream",
    "blk",
    "blk_loop",
    "net",
    "vsock",
    "uart",
    "regs",
    "rtc",
    "vcpu",
    "vdriver",
    "load",
    "walls",
)

# In our own builds a warning is an error; a user's newer compiler may know more of them.
WERROR = ["-Werror"] if os.environ.get("AVMM_WERROR") else []

BEGIN, END = "/* cdef begin */", "/* cdef end */"


def declarations(header: Path) -> str:
    """The cdef part of one header; ValueError when it has none."""
    text = header.read_text()
    if BEGIN not in text or END not in text:
        raise ValueError(f"{header.name}: no part between '{BEGIN}' and '{END}'")
    return text.split(BEGIN, 1)[1].split(END, 1)[0]


ffi = FFI()
ffi.cdef("struct iovec { void *iov_base; size_t iov_len; };")  # <sys/uio.h>
ffi.cdef("\n".join(declarations(HERE / f"{name}.h") for name in MODULES))
ffi.set_source(
    "avmm._native",
    "\n".join(f'#include "{name}.h"' for name in MODULES),
    # Relative to the project root, from where setuptools compiles.
    sources=[f"native/{path.name}" for path in sorted(HERE.glob("*.c"))],
    depends=[f"native/{path.name}" for path in sorted(HERE.glob("*.h"))],
    include_dirs=["native"],
    libraries=["uring", "pthread"],
    extra_compile_args=["-std=gnu11", "-O2", "-g", "-Wall", "-Wextra", "-Wshadow", *WERROR],
)
