"""The agent's real program on a Unix socket, and a client for it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import pytest_asyncio

from avmm.agent.client import Agent
from fakes.agent_program import AgentProgram, running


@pytest.fixture
def program(tmp_path: Path) -> Iterator[AgentProgram]:
    with running(tmp_path / "agent.sock") as program:
        yield program


@pytest_asyncio.fixture
async def agent(program: AgentProgram) -> AsyncIterator[Agent]:
    agent = Agent(program.connect(), ready_timeout_s=20)
    yield agent
    await agent.closed()
