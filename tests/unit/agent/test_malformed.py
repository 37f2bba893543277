"""The agent's program under bytes that no client of ours sends, built with sanitizers."""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from avmm.agent import protocol
from avmm.agent.client import Agent
from avmm.agent.protocol import HEAD, ExecFlag, Type, frame
from fakes.agent_program import AgentProgram, running, sanitized

SEED = 20261124
CONNECTIONS = 300
HELLO = frame(Type.HELLO, protocol.pack_hello())
EXEC = protocol.pack_exec(
    ["cat"], flags=ExecFlag(0), cwd="/", env={"A": "b"}, uid=protocol.NONE, gid=protocol.NONE,
    size=(24, 80),
)  # fmt: skip


@pytest.fixture(scope="module")
def checked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sanitized program."""
    return sanitized(tmp_path_factory.mktemp("agent"))


@pytest.fixture
def program(checked: Path, tmp_path: Path) -> Iterator[AgentProgram]:
    with running(tmp_path / "agent.sock", checked) as program:
        yield program


async def told(program: AgentProgram, data: bytes) -> bytes:
    """What the agent answers until it hangs up; it has to, on nonsense."""
    reader, writer = await asyncio.open_unix_connection(program.path)
    writer.write(data)
    try:
        async with asyncio.timeout(20):
            return await reader.read()
    except ConnectionError:
        return b""
    finally:
        writer.transport.abort()


async def works(program: AgentProgram) -> None:
    agent = Agent(program.connect())
    assert (await agent.run(["echo", "hello"])).stdout == b"hello\n"
    assert await agent.files.read("/proc/self/comm")
    await agent.closed()


@pytest.mark.parametrize(
    "data",
    [
        b"\0" * 100,
        b"\xff" * 100,
        b"CONNECT 1024\n",
        frame(Type.PING),
        frame(Type.HELLO, b"avmm"),
        HELLO + b"\xff" * 8,
        HELLO + HEAD.pack(protocol.FRAME_MAX_BYTES + 1, Type.EXEC),
        HELLO + HEAD.pack(0, Type.PING)[:5] + b"\1\0\0",
        HELLO + frame(Type.HELLO, protocol.pack_hello()),
        HELLO + frame(Type.SET_CLOCK, b"x"),
        HELLO + frame(Type.SHUTDOWN, b"x"),
        HELLO + frame(Type.OK),
        HELLO + frame(Type.EXEC),
        HELLO + frame(Type.EXEC, EXEC[:-1]),
        HELLO + frame(Type.EXEC, EXEC + b"x\0"),
        HELLO + frame(Type.EXEC, EXEC[:20] + struct.pack("<II", 0, 0) + EXEC[28:]),
        HELLO + frame(Type.EXEC, EXEC[:20] + struct.pack("<II", 1 << 31, 1 << 31) + EXEC[28:]),
        HELLO + frame(Type.EXEC, EXEC) + frame(Type.EXEC, EXEC),
        HELLO + frame(Type.EXEC, EXEC) + frame(Type.SIGNAL, b"x"),
        HELLO + frame(Type.EXEC, EXEC) + frame(Type.SIGNAL, struct.pack("<II", 0, 0)),
        HELLO + frame(Type.EXEC, EXEC) + frame(Type.WINDOW, struct.pack("<II", Type.STDIN, 1)),
        HELLO + frame(Type.EXEC, EXEC)
        + frame(Type.WINDOW, struct.pack("<II", Type.STDOUT, 0xFFFF_FFFF)),
        HELLO + frame(Type.READ, b"short"),
        HELLO + frame(Type.STAT, protocol.pack_file("/", span=(0, 0))[:-1]),
        HELLO + frame(Type.RENAME, protocol.pack_file("/", span=(0, 0))),
        HELLO + frame(Type.STAT, protocol.pack_file("/", "/", span=(0, 0))),
        HELLO + frame(Type.WRITE, protocol.pack_file("/dev/null", span=(0, 0))) + frame(Type.PING),
        HELLO + frame(Type.WRITE, protocol.pack_file("/dev/null", span=(0, 0))) + b"\xff" * 16,
    ],
)  # fmt: skip
async def test_nonsense_ends_its_connection_and_nothing_else(
    program: AgentProgram, data: bytes
) -> None:
    await told(program, data)
    await works(program)


async def test_more_stdin_than_the_window_ends_the_connection(program: AgentProgram) -> None:
    sleep = protocol.pack_exec(
        ["sleep", "1000"], flags=ExecFlag(0), cwd="", env=None, uid=protocol.NONE,
        gid=protocol.NONE, size=(0, 0),
    )  # fmt: skip
    reader, writer = await asyncio.open_unix_connection(program.path)
    writer.write(HELLO + frame(Type.EXEC, sleep))
    answer = await reader.readexactly(len(HELLO) + HEAD.size + 4)
    assert protocol.parse_head(answer[len(HELLO) :][: HEAD.size]) == (4, Type.STARTED)
    writer.write(frame(Type.STDIN, bytes(200_000)) * 2)
    with contextlib.suppress(ConnectionError):
        assert await reader.read() == b""
    writer.transport.abort()
    await works(program)


async def test_a_client_that_never_listens_is_not_listened_to(program: AgentProgram) -> None:
    pings = frame(Type.PING) * 1000
    sent = blocked = 0
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(program.path))
        client.setblocking(False)
        client.send(HELLO)
        while blocked < 5:
            try:
                sent += client.send(pings[sent % len(pings) :])  # where the last one was cut off
                blocked = 0
            except BlockingIOError:
                blocked += 1
            await works(program)
            assert sent < 5_000_000, "it takes all there is"


async def test_random_frames_do_no_harm(program: AgentProgram) -> None:
    """Seeded; with what a client may say in between, so that deep states are met as well."""
    rng = random.Random(SEED)

    async def one() -> None:
        reader, writer = await asyncio.open_unix_connection(program.path)
        writer.write(HELLO + b"".join(_random_frame(rng) for _ in range(rng.randrange(1, 12))))
        try:
            async with asyncio.timeout(0.02):
                await reader.read(100_000)
                await reader.read(100_000)
        except (TimeoutError, ConnectionError):
            pass
        writer.transport.abort()

    for _ in range(CONNECTIONS // 20):
        await asyncio.gather(*(one() for _ in range(20)))
    await works(program)


def _random_frame(rng: random.Random) -> bytes:
    # Nothing that could do harm to the machine the test runs on.
    harmless = [t for t in Type if t not in (Type.SHUTDOWN, Type.SET_CLOCK, Type.REMOVE)]
    type = rng.choice(harmless)
    path = rng.choice(["/dev/null", "/proc/self/status", "/usr/bin", "/no/file", "/dev/zero"])
    if rng.random() < 0.1:
        return rng.randbytes(rng.randrange(1, 40))
    if type is Type.EXEC:
        payload = bytearray(EXEC)
        for _ in range(rng.choice([0, 0, 1, 3])):
            payload[rng.randrange(28)] = rng.randrange(256)
        return frame(type, bytes(payload))
    if type in (Type.READ, Type.LIST, Type.STAT):
        span = (rng.getrandbits(64), rng.getrandbits(20))
        return frame(type, protocol.pack_file(path, span=span))
    if type in (Type.WRITE, Type.MKDIR, Type.CHMOD, Type.RENAME):
        return frame(type, protocol.pack_file("/dev/null/none", span=(0, 0)))
    if type is Type.SIGNAL:
        return frame(type, struct.pack("<II", rng.randrange(80), rng.randrange(2)))
    if type is Type.STDIN:
        return frame(type, rng.randbytes(rng.choice([0, 1, 70_000])))
    return frame(type, rng.randbytes(rng.choice([0, 4, 8, 16])))
