"""What a microVM does inside its guest, by the agent there."""

from __future__ import annotations

import subprocess
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Unpack

from avmm.errors import ConfigError

if TYPE_CHECKING:
    from avmm.agent.client import Agent
    from avmm.agent.files import Files
    from avmm.agent.process import ExecOptions, Process


class GuestCalls(ABC):
    """The part of MicroVM that needs Config(agent=True).

    A guest that is still on its way up is waited for, 60 s at most: agent.ready() has a limit of
    the caller's own. Without the agent every call raises ConfigError("agent") at once; for what
    goes wrong with it see Agent.
    """

    @property
    def agent(self) -> Agent:
        """The agent itself: ready(), clock(), and all of the below."""
        return self._agent("agent")

    @property
    def files(self) -> Files:
        """The guest's files."""
        return self._agent("files").files

    async def exec(self, argv: Sequence[str], **options: Unpack[ExecOptions]) -> Process:
        """Start a command in the guest; as asyncio.create_subprocess_exec(), see ExecOptions.

        A command that cannot be started raises OSError as the guest's kernel has it, such as
        FileNotFoundError. Cancelled, it leaves no process behind.
        """
        return await self._agent("exec").exec(argv, **options)

    async def run(
        self,
        argv: Sequence[str],
        *,
        input: bytes | None = None,
        timeout: float | None = None,
        check: bool = False,
        output_max: int | None = None,
        **options: Unpack[ExecOptions],
    ) -> subprocess.CompletedProcess[bytes]:
        """Run a command in the guest to its end; as subprocess.run(capture_output=True).

        timeout: seconds, then TimeoutError. check: raises subprocess.CalledProcessError for an
        exit status other than 0. output_max: bytes of stdout, and of stderr (64 MiB), beyond which
        HostError("output-limit") is raised. On every early way out the command is killed.
        """
        return await self._agent("run").run(
            argv, input=input, timeout=timeout, check=check, output_max=output_max, **options
        )

    async def ping(self) -> float:
        """Seconds to the agent and back."""
        return await self._agent("ping").ping()

    async def set_clock(self, time_s: float | None = None) -> None:
        """Set the guest's time: seconds since 1970, the host's own when not given."""
        await self._agent("set_clock").set_clock(time_s)

    @abstractmethod
    def _agent(self, call: str) -> Agent:
        """The agent, or ConfigError."""

    @staticmethod
    def _no_agent(call: str) -> ConfigError:
        return ConfigError(
            "agent", f"{call}: this microVM has no guest agent; use Config(agent=True)"
        )
