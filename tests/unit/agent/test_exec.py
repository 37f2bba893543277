"""Commands by the agent's own program, with the rules of asyncio's subprocesses."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import re
import signal
import subprocess
from pathlib import Path

import pytest

from avmm import ConfigError, HostError
from avmm.agent.client import Agent
from avmm.agent.process import DEVNULL, PIPE, STDOUT, Process
from fakes.agent_program import AgentProgram, is_gone, until, waits_for_reader


async def test_run_gives_what_subprocess_run_gives(agent: Agent) -> None:
    script = "cat; echo problem >&2; exit 3"
    done = await agent.run(["sh", "-c", script], input=b"hello")
    assert (done.returncode, done.stdout, done.stderr) == (3, b"hello", b"problem\n")
    assert done.args == ["sh", "-c", script]
    with pytest.raises(subprocess.CalledProcessError) as caught:
        await agent.run(["false"], check=True)
    assert caught.value.returncode == 1


async def test_streams_are_read_line_by_line_while_the_command_runs(agent: Agent) -> None:
    async with await agent.exec(["cat"], stdin=PIPE) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        for word in (b"one\n", b"two\n"):
            process.stdin.write(word)
            assert await process.stdout.readline() == word
        assert process.returncode is None
        process.stdin.write_eof()
        assert await process.stdout.read() == b""
        assert await process.wait() == 0


async def test_a_signal_is_a_negative_return_code(agent: Agent) -> None:
    process = await agent.exec(["sleep", "1000"])
    process.terminate()
    assert await process.wait() == -signal.SIGTERM
    assert process.returncode == -signal.SIGTERM
    with pytest.raises(ProcessLookupError):
        process.kill()
    with pytest.raises(ValueError, match="no signal"):
        process.send_signal(99)


async def test_kill_takes_the_whole_group(agent: Agent) -> None:
    process = await agent.exec(["sh", "-c", "sleep 1000 & echo $!; wait"])
    assert process.stdout is not None
    grandchild = int(await process.stdout.readline())
    process.kill()
    assert await process.wait() == -signal.SIGKILL
    assert await process.stdout.read() == b""  # which nobody holds open any more
    await until(lambda: is_gone(grandchild))


async def test_a_command_that_cannot_be_started_raises_what_the_kernel_says(
    agent: Agent, tmp_path: Path
) -> None:
    plain = tmp_path / "plain"
    plain.write_text("")
    with pytest.raises(FileNotFoundError) as caught:
        await agent.exec(["no-such-command"])
    assert caught.value.filename == "no-such-command"
    with pytest.raises(PermissionError):
        await agent.exec([str(plain)])
    with pytest.raises(NotADirectoryError) as caught_cwd:
        await agent.exec(["true"], cwd=str(plain))
    assert caught_cwd.value.filename == str(plain)
    assert (await agent.run(["true"])).returncode == 0


@pytest.mark.parametrize(
    ("argv", "options", "message"),
    [
        ([], {}, "list of strings"),
        ("ls -l", {}, "list of strings"),
        (["a\0b"], {}, "NUL"),
        (["a"], {"env": {"A=B": "c"}}, "'A=B'"),
        (["a" * 300_000], {}, "at most 262144"),
        (["a"], {"stdin": STDOUT}, "stdin=-2"),
        (["a"], {"stdout": 5}, "stdout=5"),
        (["a"], {"user": -1}, "-1 is no user"),
        (["a"], {"user": "nobody-of-that-name"}, "'nobody-of-that-name'"),
    ],
)
async def test_what_cannot_be_is_refused_before_anything_happens(
    agent: Agent, argv: list[str], options: dict[str, object], message: str
) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        await agent.exec(argv, **options)  # type: ignore[arg-type]


async def test_environment_and_folder_are_the_commands_own(agent: Agent, tmp_path: Path) -> None:
    script = ["/bin/sh", "-c", 'echo "$A $B"; pwd']
    done = await agent.run(script, env={"A": "1"}, cwd=str(tmp_path))
    assert done.stdout == f"1 \n{tmp_path}\n".encode()
    inherited = await agent.run(["sh", "-c", "echo $PATH"])
    assert b"/bin" in inherited.stdout
    more = await agent.run(["env"], env_extra={"A": "1", "HOME": "/mine"})
    lines = more.stdout.splitlines()
    assert {b"A=1", b"HOME=/mine", b"PATH=" + inherited.stdout.strip()} <= set(lines)
    assert len({line.split(b"=")[0] for line in lines}) == len(lines)
    with pytest.raises(ConfigError, match="not both"):
        await agent.run(["env"], env={}, env_extra={"A": "1"})


@pytest.mark.skipif(os.geteuid() != 0, reason="changing users needs root")
async def test_a_user_brings_its_group(agent: Agent) -> None:
    ids = ["sh", "-c", "echo $(id -u) $(id -g) $(id -G)"]
    assert (await agent.run(ids, user=1234)).stdout == b"1234 1234 1234\n"
    assert (await agent.run(ids, user=1234, group=5)).stdout == b"1234 5 5\n"
    assert (await agent.run(ids, user="nobody")).stdout == b"65534 65534 65534\n"
    assert (await agent.run(ids, user="nobody", group="root")).stdout == b"65534 0 0\n"


async def test_streams_can_be_left_out_and_joined(agent: Agent) -> None:
    script = ["sh", "-c", "echo out; echo err >&2; cat"]
    assert await (await agent.exec(script, stderr=STDOUT)).communicate() == (b"out\nerr\n", None)
    assert await (await agent.exec(script, stdout=DEVNULL)).communicate() == (None, b"err\n")
    assert await (await agent.exec(script, stderr=DEVNULL)).communicate() == (b"out\n", None)
    process = await agent.exec(script, stdout=DEVNULL, stderr=DEVNULL)
    assert process.stdin is process.stdout is process.stderr is None
    assert await process.wait() == 0


async def test_a_terminal_has_a_size_that_changes(agent: Agent) -> None:
    script = "tty >/dev/null && stty size; read x; stty size; echo got $x"
    async with await agent.exec(["sh", "-c", script], tty=True, size=(30, 100)) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert await process.stdout.readline() == b"30 100\r\n"
        process.resize(50, 132)
        process.stdin.write(b"hello\n")
        assert await process.stdout.read() == b"hello\r\n50 132\r\ngot hello\r\n"
        assert await process.wait() == 0
    plain = await agent.exec(["true"])
    with pytest.raises(ConfigError, match="tty=True"):
        plain.resize(1, 1)
    await plain.wait()


async def test_the_end_of_input_reaches_a_terminals_reader(agent: Agent) -> None:
    process = await agent.exec(["cat"], tty=True)
    assert await process.communicate(b"line\n") == (b"line\r\nline\r\n", None)
    assert process.returncode == 0


async def test_ctrl_c_on_a_terminal_is_a_signal(agent: Agent) -> None:
    process = await agent.exec(["sh", "-c", "echo ready; exec sleep 1000"], tty=True)
    assert process.stdin is not None
    assert process.stdout is not None
    await process.stdout.readline()
    process.stdin.write(b"\x03")
    assert await process.wait() == -signal.SIGINT


async def test_a_command_ignores_no_signal_that_the_agent_inherited_so(agent: Agent) -> None:
    for number in (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM):
        done = await agent.run(["sh", "-c", f"kill -{number:d} $$; exit 1"])
        assert done.returncode == -number


async def test_much_output_arrives_whole(agent: Agent) -> None:
    size = 20_000_000
    script = ["sh", "-c", f"head -c {size} /dev/zero & head -c {size} /dev/zero >&2; wait"]
    done = await agent.run(script)
    assert (done.stdout, done.stderr) == (bytes(size), bytes(size))


async def test_much_input_arrives_whole(agent: Agent) -> None:
    data = os.urandom(5_000_000)
    done = await agent.run(["cat"], input=data)
    assert done.stdout == data


async def test_a_reader_that_does_not_read_stops_the_command_and_nothing_else(
    agent: Agent,
) -> None:
    process = await agent.exec(["sh", "-c", "echo problem >&2; exec cat /dev/zero"])
    assert process.stdout is not None
    assert process.stderr is not None
    await until(lambda: waits_for_reader(process.pid))
    buffered = len(process.stdout._buffer)  # type: ignore[attr-defined]
    assert buffered <= 512 * 1024
    assert await process.stderr.readline() == b"problem\n"
    assert (await agent.run(["echo", "hello"])).stdout == b"hello\n"
    assert len(await process.stdout.readexactly(4_000_000)) == 4_000_000
    process.kill()
    assert await process.wait() == -signal.SIGKILL
    process.close()


async def test_a_command_that_does_not_read_stops_its_writer(agent: Agent) -> None:
    process = await agent.exec(["sleep", "1000"], stdin=PIPE)
    assert process.stdin is not None
    process.stdin.write(bytes(2_000_000))
    drained = asyncio.ensure_future(process.stdin.drain())
    await agent.ping()
    assert not drained.done()
    process.kill()
    with pytest.raises(ConnectionError):
        await drained


async def test_a_command_that_closes_its_stdin_ends_the_writers_wait(agent: Agent) -> None:
    process = await agent.exec(["sh", "-c", "exec <&-; echo closed; sleep 1000"], stdin=PIPE)
    assert process.stdin is not None
    assert process.stdout is not None
    await process.stdout.readline()
    process.stdin.write(bytes(1_000_000))
    with pytest.raises(ConnectionError):
        await process.stdin.drain()
    process.kill()
    await process.wait()


async def test_output_beyond_the_limit_kills_the_command(agent: Agent) -> None:
    with pytest.raises(HostError, match="more than 100000 bytes") as caught:
        await agent.run(["yes"], output_max=100_000)
    assert caught.value.kind == "output-limit"


async def test_a_timeout_kills_the_command(agent: Agent, program: AgentProgram) -> None:
    with pytest.raises(TimeoutError):
        await agent.run(["sleep", "1000"], timeout=0.05)
    await until(lambda: not program.children())


@pytest.mark.parametrize("how", ["run", "communicate", "block", "wait"])
async def test_a_cancelled_task_takes_its_command_along(
    agent: Agent, program: AgentProgram, how: str
) -> None:
    started: asyncio.Queue[int] = asyncio.Queue()

    async def work() -> None:
        script = ["sh", "-c", "sleep 1000 & echo $$; wait"]
        if how == "run":
            started.put_nowait(0)
            await agent.run(script)
        process = await agent.exec(script)
        started.put_nowait(process.pid)
        if how == "communicate":
            await process.communicate()
        elif how == "block":
            async with process:
                await asyncio.Event().wait()
        else:
            await process.wait()

    task = asyncio.create_task(work())
    pid = await started.get()
    await until(lambda: bool(program.children()))
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await until(lambda: not program.children() and (not pid or is_gone(pid)))
    await until(lambda: not agent._sessions and not agent._busy)


async def test_a_cancelled_start_leaves_nothing(agent: Agent, program: AgentProgram) -> None:
    await agent.ready()
    for turns in range(12):
        task = asyncio.create_task(agent.run(["sleep", "1000"]))
        for _ in range(turns):
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    await agent.run(["true"])
    await until(lambda: not program.children())


async def test_a_process_nobody_holds_is_killed(agent: Agent) -> None:
    process: Process | None = await agent.exec(["sleep", "1000"])
    assert process is not None
    pid = process.pid
    process = None
    gc.collect()
    await until(lambda: is_gone(pid))


async def test_a_cancelled_wait_only_stops_waiting(agent: Agent) -> None:
    process = await agent.exec(["cat"], stdin=PIPE)
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(process.wait(), 0.01)
    assert await process.communicate(b"still here") == (b"still here", b"")
    assert process.returncode == 0


async def test_a_hundred_commands_at_once(agent: Agent, program: AgentProgram) -> None:
    await agent.ready()
    before = program.descriptors()
    done = await asyncio.gather(*(agent.run(["echo", str(n)]) for n in range(100)))
    assert [int(d.stdout) for d in done] == list(range(100))
    async with asyncio.timeout(20):
        while program.descriptors() > before + 3:  # the connections kept for the next ones
            await agent.ping()


async def test_connections_are_used_again(agent: Agent) -> None:
    opened = 0
    connect = agent._connect

    async def counted() -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        nonlocal opened
        opened += 1
        return await connect()

    agent._connect = counted
    for _ in range(5):
        await agent.run(["cat"], input=b"x" * 1000)
        await agent.ping()
        with pytest.raises(FileNotFoundError):
            await agent.files.read("/no/such/file")
        with pytest.raises(FileNotFoundError):
            await agent.exec(["no-such-command"])
    assert opened == 1


async def test_more_connections_than_there_can_be_are_refused(
    agent: Agent, program: AgentProgram
) -> None:
    held = [await agent.exec(["cat"], stdin=PIPE) for _ in range(256)]
    with pytest.raises(HostError, match="256 connections") as caught:
        await agent.exec(["true"])
    assert caught.value.kind == "agent-busy"
    held.pop().close()
    async with asyncio.timeout(20):
        while True:
            with contextlib.suppress(HostError):
                await agent.run(["true"])
                break
    for process in held:
        process.close()


async def test_closing_the_agent_ends_what_runs(program: AgentProgram) -> None:
    agent = Agent(program.connect())
    process = await agent.exec(["sleep", "1000"])
    waiting = asyncio.create_task(process.communicate())
    await asyncio.sleep(0)
    await agent.closed()
    with pytest.raises(HostError) as caught:
        await waiting
    assert caught.value.kind == "agent-lost"
    await until(lambda: not program.children())
