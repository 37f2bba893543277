"""The agent as a program for guests, and the archive that adds it to an initramfs."""

from __future__ import annotations

import stat
from functools import cache
from pathlib import Path

from avmm.boot.cpio import Entry, archive
from avmm.errors import ConfigError

PROGRAM = Path(__file__).with_name("avmm-agent")
"""A static executable; an image that carries it starts it from its own init."""

RDINIT = "/avmm-agent-init"
"""What the kernel starts first: it starts the agent, then the initramfs's own init."""


def check_program() -> None:
    """Raises ConfigError("agent") when this avmm was built without the agent."""
    if not PROGRAM.exists():
        raise ConfigError(
            "agent",
            "agent: this avmm was built without its guest agent; install a static C library "
            "(Debian: libc6-dev) and build again",
        )


@cache
def agent_archive(next_init: str) -> bytes:
    """A cpio archive to stand behind an initramfs. next_init: that initramfs's own init."""
    check_program()
    return archive(
        [
            Entry("avmm-agent", stat.S_IFREG | 0o755, PROGRAM.read_bytes()),
            Entry(RDINIT.strip("/"), stat.S_IFLNK | 0o777, b"/avmm-agent"),
            Entry("avmm-agent-next", stat.S_IFLNK | 0o777, next_init.encode()),
        ]
    )
