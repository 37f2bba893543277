"""The agent acts in the root that PID 1 has, wherever it was started itself."""

from __future__ import annotations

import asyncio
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from avmm.agent.client import Agent
from avmm.agent.program import PROGRAM

NAMESPACES = ["unshare", "--pid", "--mount", "--fork", "--kill-child"]
FOLDERS = ("bin", "sbin", "usr", "lib", "lib64", "proc", "dev")


def may_not() -> str | None:
    """Why no namespaces can be made here."""
    tried = subprocess.run([*NAMESPACES, "true"], capture_output=True, text=True, check=False)
    return tried.stderr.strip() if tried.returncode else None


@contextmanager
def guest(socket: Path, new_root: Path, moves_on: Path) -> Iterator[None]:
    """PID 1 of a new namespace starts an agent, and changes its root when told to."""
    for name in FOLDERS:
        (new_root / name).mkdir(parents=True, exist_ok=True)
    binds = " && ".join(f"mount --rbind /{name} {new_root}/{name}" for name in FOLDERS)
    script = (
        f"{PROGRAM} --unix {socket} --init-root & {binds} && cat {moves_on} && "
        f"exec chroot {new_root} sleep 1000"
    )
    with subprocess.Popen([*NAMESPACES, "sh", "-c", script], stdout=subprocess.DEVNULL) as process:
        try:
            yield
        finally:
            process.kill()


async def test_the_agent_follows_init_to_another_root(tmp_path: Path) -> None:
    reason = may_not()
    if reason:
        pytest.skip(reason)
    new_root, moves_on = tmp_path / "root", tmp_path / "moves-on"
    os.mkfifo(moves_on)
    socket = tmp_path / "agent.sock"
    with guest(socket, new_root, moves_on):
        agent = Agent(lambda: asyncio.open_unix_connection(socket))
        await agent.ready()
        assert await agent.files.exists(tmp_path / "moves-on")
        moves_on.write_bytes(b"now")
        async with asyncio.timeout(20):
            while await agent.files.exists(tmp_path / "moves-on"):
                continue
        await agent.files.write("/kept", b"here")
        assert (new_root / "kept").read_bytes() == b"here"
        listed = await agent.run(["ls", "/"], check=True)
        assert set(listed.stdout.decode().split()) == {*FOLDERS, "kept"}
        await agent.closed()
