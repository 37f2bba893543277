"""Memory of a process."""

from __future__ import annotations

from pathlib import Path

from avmm.errors import HostError


def pss_bytes(process: str = "self") -> int:
    """A process's memory, shared pages by its part (proc(5)), without that of guests, which is
    the memory that asks for huge pages. process: its id."""
    total = kib = 0
    path = f"/proc/{process}/smaps"
    try:
        lines = Path(path).read_text().splitlines()
    except OSError as e:
        raise HostError("bench", op="open", path=path, errno=e.errno) from e
    for line in lines:
        name, _, rest = line.partition(":")
        if name == "Pss":
            kib = int(rest.split()[0])
        elif name == "VmFlags" and "hg" not in rest.split():
            total += kib
    return total * 1024
