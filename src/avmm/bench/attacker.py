"""A guest that attacks its machine: native/attacker, a program without an operating system."""

from __future__ import annotations

from pathlib import Path

from avmm.errors import HostError
from avmm.units import MIB

PROGRAM = Path(__file__).with_name("avmm-attacker")
"""An ELF kernel, told by its command line what to do."""

MEMORY_BYTES = 4 * MIB


def check_program() -> None:
    """Raises HostError("attacker") when this avmm was built without it."""
    if not PROGRAM.exists():
        raise HostError(
            "attacker",
            op="The guest that attacks",
            path=str(PROGRAM),
            remedy="this avmm was built without it, for want of gcc; build it again",
        )


def command_line(
    attack: str,
    *,
    kind: str,
    transport: str,
    ring: str = "packed",
    queue: int = 0,
    cpus: int = 1,
    write: bool = False,
    storm: str = "",
) -> str:
    """What it is to do to the machine's first device.

    attack: a name in native/attacker/main.c. kind: the device's, "blk", "net" or "vsock". queue:
    of it, whose chains are wrong. write: a disk's chains write. storm: a name in storms.c.
    """
    words = {
        **{"attack": attack, "storm": storm, "kind": kind, "transport": transport, "ring": ring},
        **{"queue": queue, "cpus": cpus, "write": int(write), "ram": MEMORY_BYTES},
    }
    return " ".join(f"{name}={value}" for name, value in words.items())
