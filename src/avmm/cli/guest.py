"""How `avmm exec` and `avmm cp` reach the agent of a microVM that another process runs."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from avmm.agent.client import Agent
from avmm.agent.protocol import AGENT_PORT
from avmm.cli.instance import find
from avmm.errors import ConfigError


@asynccontextmanager
async def agent_of(name: str, timeout_s: float) -> AsyncIterator[Agent]:
    """The agent in the microVM of that name; timeout_s: to wait for one that is still booting.

    Raises ConfigError("instance" | "agent").
    """
    path = find(name).vsock_path
    if not path.exists():
        raise ConfigError(
            "agent", f"The microVM {name} has no sockets to its guest; start it with --agent"
        )
    agent = Agent(lambda: _connect(path), timeout_s)
    try:
        yield agent
    finally:
        await agent.closed()


async def _connect(path: Path) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Through the socket, by Firecracker's convention. Raises ConnectionError."""
    reader, writer = await asyncio.open_unix_connection(path)
    try:
        writer.write(b"CONNECT %d\n" % AGENT_PORT)
        answer = await reader.readline()
        if not answer.startswith(b"OK "):
            raise ConnectionRefusedError("the guest does not listen there")
    except BaseException:
        writer.transport.abort()
        raise
    return reader, writer
