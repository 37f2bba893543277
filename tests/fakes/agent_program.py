"""The guest agent's own program on this machine, behind a Unix socket."""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from avmm.agent.connection import Connect
from avmm.agent.program import PROGRAM

SOURCES = Path(__file__).parents[2] / "native/agent"
_READY = b"listening\n"


@dataclass(frozen=True)
class AgentProgram:
    """A running agent, and where it listens."""

    process: subprocess.Popen[bytes]
    path: Path

    def connect(self) -> Connect:
        """What an Agent connects with."""
        return lambda: asyncio.open_unix_connection(self.path)

    def children(self) -> list[int]:
        """Processes it has started and not yet seen the end of."""
        pid = self.process.pid
        return [int(n) for n in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]

    def descriptors(self) -> int:
        """How many it has open."""
        return len(list(Path(f"/proc/{self.process.pid}/fd").iterdir()))


async def until(condition: Callable[[], bool]) -> None:
    """Until it holds: for what nothing can be awaited of, such as another process's end."""
    async with asyncio.timeout(20):
        while True:
            if condition():
                return
            await asyncio.sleep(0)


def is_gone(pid: int) -> bool:
    """Whether no process has that number, or one that only its parent has not taken note of."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    return True


def waits_for_reader(pid: int) -> bool:
    """Whether a command is stopped by a full pipe."""
    return "pipe" in Path(f"/proc/{pid}/wchan").read_text()


@contextlib.contextmanager
def running(path: Path, program: Path = PROGRAM) -> Iterator[AgentProgram]:
    """Start it; when the block ends it must still have been alive.

    It inherits ignored signals, as from a shell that starts it in the background.
    """
    ignoring = 'trap \'\' HUP INT QUIT TERM; exec "$0" "$@"'
    command = ["sh", "-c", ignoring, str(program), "--unix", str(path), "--announce"]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == _READY
            yield AgentProgram(process, path)
            assert process.poll() is None, "the agent died"
        finally:
            process.kill()


def sanitized(folder: Path) -> Path:
    """A build of it that stops at every fault of memory or arithmetic."""
    program = folder / "avmm-agent-sanitized"
    options = ["-std=gnu11", "-O1", "-g", "-fsanitize=address,undefined"]
    options += ["-fno-sanitize-recover=all", "-fno-omit-frame-pointer"]
    sources = [str(path) for path in sorted(SOURCES.glob("*.c"))]
    subprocess.run(["gcc", *options, "-o", str(program), *sources], check=True)
    return program
