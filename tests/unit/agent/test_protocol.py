"""Packing and unpacking without an agent: whatever bytes come, an answer or a GuestFault."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from avmm import AvmmError, ConfigError, GuestFault, HostError
from avmm.agent import protocol
from avmm.agent.client import Agent
from avmm.agent.protocol import HEAD, Type, frame

UNPACKERS: list[Callable[[bytes], object]] = [
    protocol.unpack_clock,
    protocol.unpack_stat,
    lambda data: list(protocol.unpack_entries(data)),
    protocol.unpack_error,
    protocol.unpack_window,
    protocol.unpack_number,
    protocol.unpack_exited,
]
HELLO = frame(Type.HELLO, protocol.pack_hello())


@given(st.binary(max_size=300))
def test_unpacking_gives_an_answer_or_a_fault(data: bytes) -> None:
    for unpack in UNPACKERS:
        with contextlib.suppress(GuestFault):
            unpack(data)
    if len(data) >= HEAD.size:
        with contextlib.suppress(GuestFault):
            assert protocol.parse_head(data[: HEAD.size])[0] <= protocol.FRAME_MAX_BYTES


NAMES = st.binary(min_size=1, max_size=40).filter(lambda name: not set(name) & set(b"\0/"))


@given(st.lists(NAMES))
def test_entries_survive_the_way(names: list[bytes]) -> None:
    packed = b"".join(protocol._STAT.pack(*range(9)) + name + b"\0" for name in names)
    found = [e.name.encode(errors="surrogateescape") for e in protocol.unpack_entries(packed)]
    assert found == names


@given(st.integers(-(2**62), 2**62))
def test_times_survive_the_way(time_ns: int) -> None:
    assert protocol.unpack_clock(protocol.pack_clock(time_ns)) == time_ns


@pytest.mark.parametrize(
    ("how", "value", "code"), [(0, 0, 0), (0, 255, 255), (1, 9, -9), (1, 64, -64)]
)
def test_return_codes_are_those_of_subprocess(how: int, value: int, code: int) -> None:
    assert protocol.unpack_exited(protocol._PAIR.pack(how, value)) == code


@pytest.mark.parametrize("number", [0, 4096, 0xFFFF_FFFF])
def test_an_error_no_kernel_has_is_a_fault(number: int) -> None:
    with pytest.raises(GuestFault):
        protocol.unpack_error(protocol.pack_number(number) + b"x")
    assert protocol.unpack_error(protocol.pack_number(2) + b"x") == (2, "x")


@asynccontextmanager
async def answering(*answers: bytes, close: bool = True) -> AsyncIterator[Agent]:
    """A client of an agent that answers a ping, and later connections with these bytes."""
    writers: list[asyncio.StreamWriter] = []

    async def connect() -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        ours, theirs = _pipe()
        writers.append(theirs)
        if len(writers) == 1:
            theirs.feed(HELLO + frame(Type.OK, protocol.pack_clock(0)))
            theirs.feed_more = list(answers)
        return ours.reader, ours  # type: ignore[return-value]

    def _pipe() -> tuple[Any, Any]:
        end = _End(close)
        return end, end

    agent = Agent(connect, ready_timeout_s=5)
    try:
        yield agent
    finally:
        await agent.closed()


class _End:
    """A writer whose transport is itself; the agent's next answer comes at each request."""

    def __init__(self, close: bool) -> None:
        self.reader = asyncio.StreamReader()
        self.feed_more: list[bytes] = []
        self.transport = self
        self._close = close
        self._closed = False
        self._requests = 0

    def feed(self, data: bytes) -> None:
        self.reader.feed_data(data)

    def write(self, data: bytes) -> None:
        self._requests += data[4] != Type.HELLO
        if self._requests > 1 and self.feed_more and not self._closed:  # behind the first ping
            self.feed(self.feed_more.pop(0))
            if self._close and not self.feed_more:
                self._closed = True
                self.reader.feed_eof()

    async def drain(self) -> None:
        await asyncio.sleep(0)

    def is_closing(self) -> bool:
        return self._closed

    def abort(self) -> None:
        if not self._closed:
            self._closed = True
            self.reader.feed_eof()


STARTED = frame(Type.STARTED, protocol.pack_number(77))


@pytest.mark.parametrize(
    "nonsense",
    [
        b"\xff" * 100,
        HEAD.pack(protocol.FRAME_MAX_BYTES + 1, Type.STDOUT),
        HEAD.pack(0, 0x99),
        frame(Type.OK),
        STARTED,
        frame(Type.STDOUT, bytes(200_000)) * 2,
        frame(Type.STDOUT) + frame(Type.STDOUT, b"more"),
        frame(Type.EXITED, b"short"),
        frame(Type.EXITED, protocol._PAIR.pack(7, 7)),
        frame(Type.EXITED, protocol._PAIR.pack(0, 0)) * 2,
        frame(Type.WINDOW, protocol.pack_window(Type.STDIN, 1)),
        frame(Type.WINDOW, b""),
        frame(Type.END),
        frame(Type.ERROR, b""),
    ],
)
async def test_nonsense_for_a_running_command_is_a_guest_fault(nonsense: bytes) -> None:
    async with answering(STARTED + nonsense) as agent:
        process = await agent.exec(["x"])

        async def end() -> None:
            await process.communicate()
            await process.wait()

        with pytest.raises(GuestFault) as caught:
            await end()
        assert caught.value.kind == "agent-protocol"
        assert not agent._idle


async def test_an_agent_that_goes_away_is_a_host_error_of_its_own_kind() -> None:
    async with answering(STARTED + frame(Type.STDOUT, b"part")) as agent:
        process = await agent.exec(["x"])
        for call in (process.wait, process.communicate):
            with pytest.raises(HostError) as caught:
                await call()
            assert caught.value.kind == "agent-lost"
        assert process.returncode is None


CALLS: list[Callable[[Agent], Awaitable[object]]] = [
    lambda agent: agent.run(["x"], input=b"y"),
    lambda agent: agent.files.read("/x"),
    lambda agent: agent.files.write("/x", b"data"),
    lambda agent: agent.files.list("/x"),
    lambda agent: agent.files.stat("/x"),
    lambda agent: agent.clock(),
]


@given(st.lists(st.sampled_from(list(Type)), max_size=8), st.binary(max_size=64))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_whatever_an_agent_says_a_call_ends_in_order(types: list[Type], payload: bytes) -> None:
    answer = b"".join(frame(type, payload) for type in types) + payload

    async def talk() -> None:
        for call in CALLS:
            async with answering(STARTED + answer if call is CALLS[0] else answer) as agent:
                with contextlib.suppress(AvmmError, OSError):
                    await call(agent)
                assert not agent._busy

    asyncio.run(talk())


async def test_another_version_is_told_apart() -> None:
    async def connect() -> tuple[Any, Any]:
        end = _End(False)
        end.feed(frame(Type.HELLO, protocol._HELLO.pack(b"avmm", 7)))
        return end.reader, end

    with pytest.raises(HostError, match="version 7") as caught:
        await Agent(connect).ready(5)
    assert caught.value.kind == "agent-version"


async def test_something_else_on_the_port_is_told_apart() -> None:
    async def connect() -> tuple[Any, Any]:
        end = _End(False)
        end.feed(b"SSH-2.0-OpenSSH\r\n")
        return end.reader, end

    with pytest.raises(GuestFault) as caught:
        await Agent(connect).ready(5)
    assert caught.value.kind == "agent-protocol"


async def test_an_agent_that_never_comes_is_waited_for_with_a_bound() -> None:
    async def connect() -> tuple[Any, Any]:
        raise ConnectionRefusedError(111, "Connection refused")

    with pytest.raises(HostError, match=r"0\.05 s.*Connection refused") as caught:
        await Agent(connect, ready_timeout_s=0.05).exec(["true"])
    assert caught.value.kind == "agent-timeout"


async def test_an_agent_that_was_closed_refuses_at_once() -> None:
    async with answering() as agent:
        await agent.ready()
        agent.close()
        with pytest.raises(HostError, match="has ended"):
            await agent.exec(["true"])


@pytest.mark.parametrize("id", ["-1", "x", "", "4294967295", "9" * 5000])
async def test_a_number_that_no_user_has_is_an_error(id: str) -> None:
    line = f"somebody:x:{id}:5::/:\n".encode()
    read = frame(Type.OK, bytes(protocol._STAT.size)) + frame(Type.DATA, line) + frame(Type.END)
    async with answering(read) as agent:
        with pytest.raises(ConfigError, match="number"):
            await agent.exec(["x"], user="somebody")
