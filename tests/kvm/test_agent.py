"""A guest whose agent never answers, or that has none: defined ends, and nothing left."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
import uvloop

import avmm
from linux.holdings import Holdings

Assemble = Callable[[str], Path]
HALT = "cli\n1: hlt\njmp 1b"


@pytest.fixture(autouse=True)
async def nothing_left() -> AsyncIterator[None]:
    """Each test gives back all it held, down to the loop's tasks."""
    uvloop.new_event_loop().close()  # libuv's own pipe, once a process
    before = Holdings.now()
    yield
    assert Holdings.now().beyond(before) == {}
    assert asyncio.all_tasks() == {asyncio.current_task()}


def microvm(kernel: Path, *, agent: bool = True) -> avmm.MicroVM:
    return avmm.MicroVM(avmm.Config(kernel=str(kernel), memory="4M", cmdline="", agent=agent))


async def test_without_an_agent_every_call_says_so_at_once(tiny_guest: Assemble) -> None:
    async with microvm(tiny_guest(HALT), agent=False) as vm:
        for call in (vm.exec(["ls"]), vm.run(["ls"]), vm.ping(), vm.set_clock(), vm.shutdown()):
            with pytest.raises(avmm.ConfigError, match="agent=True") as caught:
                await call
            assert caught.value.kind == "agent"
        with pytest.raises(avmm.ConfigError, match="agent=True"):
            _ = vm.files


async def test_a_guest_that_is_not_running_has_no_agent_either(tiny_guest: Assemble) -> None:
    vm = microvm(tiny_guest(HALT))
    with pytest.raises(avmm.ConfigError) as caught:
        await vm.exec(["ls"])
    assert caught.value.kind == "state"
    async with vm:
        pass
    with pytest.raises(avmm.ConfigError) as caught:
        await vm.exec(["ls"])
    assert caught.value.kind == "state"


async def test_an_agent_that_never_comes_is_waited_for_with_a_bound(tiny_guest: Assemble) -> None:
    async with microvm(tiny_guest(HALT)) as vm:
        with pytest.raises(avmm.HostError, match="vsock modules") as caught:
            await vm.agent.ready(timeout=0.05)
        assert caught.value.kind == "agent-timeout"


@pytest.mark.parametrize("ending", ["killed", "cancelled", "left"])
async def test_an_exec_that_waits_ends_with_the_guest(tiny_guest: Assemble, ending: str) -> None:
    async with microvm(tiny_guest(HALT)) as vm:
        waiting = asyncio.create_task(vm.exec(["ls"]))
        await asyncio.sleep(0)
        if ending == "killed":
            await vm.kill()
            with pytest.raises(avmm.HostError) as caught:
                await waiting
            assert caught.value.kind == "agent-lost"
        elif ending == "cancelled":
            waiting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await waiting
    if ending == "left":
        with pytest.raises(avmm.HostError):
            await waiting
