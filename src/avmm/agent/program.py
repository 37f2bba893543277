"""The agent as a program for guests, and the archive that adds it to an initramfs."""

from __future__ import annotations

import os
import stat
from functools import cache
from pathlib import Path

from avmm.boot.cpio import Entry, archive
from avmm.descriptors import Opener, closing_fd, open_path
from avmm.errors import ConfigError, HostError

PROGRAM = Path(__file__).with_name("avmm-agent")
"""A static executable; an image that carries it starts it from its own init."""

RDINIT = "/avmm-agent-init"
"""What the kernel starts first: it starts the agent, then the initramfs's own init."""

_PIECE_BYTES = 1 << 20


def check_program() -> None:
    """Raises ConfigError("agent") when this avmm was built without the agent."""
    if not PROGRAM.exists():
        raise ConfigError(
            "agent",
            "agent: this avmm was built without its guest agent; install a static C library "
            "(Debian: libc6-dev) and build again",
        )


def open_program(opener: Opener = open_path) -> int:
    """A descriptor of it, for the caller to close. Raises HostError("agent")."""
    try:
        return opener(str(PROGRAM), os.O_RDONLY)
    except OSError as e:
        raise HostError("agent", op="open", path=str(PROGRAM), errno=e.errno) from e


@cache
def agent_archive(next_init: str) -> bytes:
    """A cpio archive to stand behind an initramfs. next_init: that initramfs's own init."""
    check_program()
    return archive_by(open_path, next_init)


def archive_by(opener: Opener, next_init: str) -> bytes:
    """The same, of a program that `opener` gives. Raises HostError("agent")."""
    # Not by open(), which asks whether it is a terminal: a worker may not.
    with closing_fd(open_program(opener)) as fd:
        pieces = list(iter(lambda: os.read(fd, _PIECE_BYTES), b""))
    return archive(
        [
            Entry("avmm-agent", stat.S_IFREG | 0o755, b"".join(pieces)),
            Entry(RDINIT.strip("/"), stat.S_IFLNK | 0o777, b"/avmm-agent"),
            Entry("avmm-agent-next", stat.S_IFLNK | 0o777, next_init.encode()),
        ]
    )
