"""Rows of suite embed: the guest agent's program, at native speed, with no VM.

It runs here behind a unix socket. An echo is its answer to a ping, on the same connection; what a
command is measured by is the same one by asyncio, since most of its time is the kernel's. In a
guest, round_trips() and transfers() measure the same over vsock.
"""

from __future__ import annotations

import asyncio
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass

from avmm.agent.client import Agent
from avmm.agent.program import PROGRAM
from avmm.bench.record import OWN, Aim, Case
from avmm.bench.suite import Options
from avmm.loop import run as run_loop
from avmm.units import MIB

ECHO = "an echo"
LOCAL = "asyncio's subprocess"
FILE_BYTES = 64 * MIB


@dataclass(frozen=True, slots=True)
class RoundTrips:
    """Medians in seconds: of an echo by the agent, and of `true` as a command."""

    echo_s: float
    exec_s: float


def cases(suite: str, options: Options) -> Iterator[Case]:
    """See the suite protocol. Needs no rights."""
    if not PROGRAM.exists():
        options.leave_out(f"{suite} agent: this avmm was built without its guest agent")
        return
    yield from run_loop(_measure(suite, options))


async def round_trips(agent: Agent, seconds: float) -> RoundTrips:
    """Take turns for so long, and twice at least."""
    await agent.run(["true"])
    echoes: list[float] = []
    commands: list[float] = []
    end = time.perf_counter() + seconds
    while len(commands) < 2 or time.perf_counter() < end:
        echoes.append(await agent.ping())
        began = time.perf_counter()
        await agent.run(["true"])
        commands.append(time.perf_counter() - began)
    return RoundTrips(statistics.median(echoes), statistics.median(commands))


async def transfers(agent: Agent, path: str, size_bytes: int) -> tuple[float, float]:
    """Bytes a second of a file's content up, and down again."""
    data = bytes(size_bytes)
    began = time.perf_counter()
    await agent.files.write(path, data, atomic=False)
    middle = time.perf_counter()
    async for _ in agent.files.chunks(path):
        pass
    return size_bytes / (middle - began), size_bytes / (time.perf_counter() - middle)


async def _measure(suite: str, options: Options) -> list[Case]:
    with tempfile.TemporaryDirectory(prefix="avmm-bench-", dir="/dev/shm") as folder:
        path = os.path.join(folder, "agent.sock")
        program = await asyncio.create_subprocess_exec(str(PROGRAM), "--unix", path)
        agent = Agent(lambda: asyncio.open_unix_connection(path))
        try:
            trips = [await round_trips(agent, options.seconds) for _ in range(options.runs)]
            local = [await _local_s(options.seconds) for _ in range(options.runs)]
            moved = [
                await transfers(agent, os.path.join(folder, "file"), FILE_BYTES)
                for _ in range(options.runs)
            ]
        finally:
            await agent.closed()
            program.kill()
            await program.wait()
    series = {OWN: [t.exec_s for t in trips], ECHO: [t.echo_s for t in trips], LOCAL: local}
    aims = [Aim(LOCAL, 1.0)]
    up, down = ({OWN: [run[way] for run in moved]} for way in (0, 1))
    return [
        Case(suite, "exec true by the agent, no VM", "s", "lower", series, aims),
        Case(suite, "a file up by the agent, no VM", "B/s", "higher", up),
        Case(suite, "a file down by the agent, no VM", "B/s", "higher", down),
    ]


async def _local_s(seconds: float) -> float:
    taken: list[float] = []
    end = time.perf_counter() + seconds
    pipe, null = asyncio.subprocess.PIPE, asyncio.subprocess.DEVNULL
    while len(taken) < 2 or time.perf_counter() < end:
        began = time.perf_counter()
        process = await asyncio.create_subprocess_exec("true", stdin=null, stdout=pipe, stderr=pipe)
        await process.communicate()
        taken.append(time.perf_counter() - began)
    return statistics.median(taken)
