"""Why a microVM ended."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

from avmm.errors import AvmmError


class ExitKind(enum.Enum):
    """POWEROFF, REBOOT, CRASH: the guest's doing. STOPPED, KILLED: the owner's. ERROR: avmm or
    the host could not go on."""

    POWEROFF = "poweroff"
    REBOOT = "reboot"
    CRASH = "crash"
    STOPPED = "stopped"
    KILLED = "killed"
    ERROR = "error"


@dataclass(frozen=True, slots=True)
class ExitReason:
    """kind for programs, detail for people. error: with ERROR, what it was, where that is known;
    it does not count when reasons are compared."""

    kind: ExitKind
    detail: str
    error: AvmmError | None = field(default=None, compare=False)

    def __str__(self) -> str:
        return f"{self.kind.value}: {self.detail}"
