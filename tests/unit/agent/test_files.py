"""Files by the agent's own program."""

from __future__ import annotations

import asyncio
import hashlib
import os
import stat
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from avmm import HostError
from avmm.agent.client import Agent
from avmm.agent.files import Files
from fakes.agent_program import AgentProgram, is_gone, running, until


@pytest.fixture
def files(agent: Agent) -> Files:
    return agent.files


async def test_what_is_written_is_read(files: Files, tmp_path: Path) -> None:
    path = tmp_path / "file"
    for data in (b"", b"hello", os.urandom(3_000_000)):
        assert await files.write(path, data) == len(data)
        assert path.read_bytes() == data
        assert await files.read(path) == data
    assert await files.read(path, offset=1_000_000, size=5) == data[1_000_000:1_000_005]
    assert stat.S_IMODE(path.stat().st_mode) == 0o644


async def test_modes_are_kept_or_set(files: Files, tmp_path: Path) -> None:
    path = tmp_path / "tool"
    await files.write(path, b"1", mode=0o750)
    assert stat.S_IMODE(path.stat().st_mode) == 0o750
    await files.write(path, b"2")
    assert stat.S_IMODE(path.stat().st_mode) == 0o750
    await files.chmod(path, 0o600)
    assert stat.S_IMODE((await files.stat(path)).mode) == 0o600


async def test_a_link_stays_and_what_it_points_to_is_replaced(files: Files, tmp_path: Path) -> None:
    (tmp_path / "real").write_bytes(b"old")
    (tmp_path / "link").symlink_to("real")
    await files.write(tmp_path / "link", b"new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real").read_bytes() == b"new"
    assert (await files.stat(tmp_path / "link", follow=False)).is_link
    assert (await files.stat(tmp_path / "link")).is_file


async def test_a_file_is_old_or_new_and_never_in_between(files: Files, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    seen: list[bytes] = []

    async def pieces() -> AsyncIterator[bytes]:
        for _ in range(3):
            yield bytes(500_000)
            seen.append(path.read_bytes())

    await files.write(path, pieces())
    assert set(seen) == {b"old"}
    assert path.read_bytes() == bytes(1_500_000)
    assert sorted(os.listdir(tmp_path)) == ["agent.sock", "file"]


@pytest.mark.parametrize("ending", ["raises", "cancelled"])
async def test_a_write_that_is_given_up_leaves_the_old_file(
    agent: Agent, tmp_path: Path, ending: str, program: AgentProgram
) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    reached = asyncio.Event()

    async def pieces() -> AsyncIterator[bytes]:
        yield bytes(1_000_000)
        reached.set()
        if ending == "raises":
            raise ZeroDivisionError
        await asyncio.Event().wait()

    task = asyncio.create_task(agent.files.write(path, pieces()))
    await reached.wait()
    if ending == "cancelled":
        task.cancel()
    with pytest.raises((ZeroDivisionError, asyncio.CancelledError)):
        await task
    await until(lambda: not program.children())
    assert sorted(os.listdir(tmp_path)) == ["agent.sock", "file"]
    assert path.read_bytes() == b"old"


async def test_writing_in_place_appends_and_refuses_what_is_there(
    files: Files, tmp_path: Path
) -> None:
    path = tmp_path / "log"
    await files.write(path, b"one", append=True)
    inode = path.stat().st_ino
    await files.write(path, b"two", append=True)
    assert path.read_bytes() == b"onetwo"
    await files.write(path, b"three", atomic=False)
    assert (path.read_bytes(), path.stat().st_ino) == (b"three", inode)
    for atomic in (True, False):
        with pytest.raises(FileExistsError):
            await files.write(path, b"four", new=True, atomic=atomic)
    assert path.read_bytes() == b"three"


async def test_errors_are_the_guests_own(agent: Agent, tmp_path: Path) -> None:
    files = agent.files
    with pytest.raises(FileNotFoundError) as caught:
        await files.read("/no/such/file")
    assert caught.value.filename == "/no/such/file"
    with pytest.raises(IsADirectoryError):
        await files.read(tmp_path)
    with pytest.raises(IsADirectoryError):
        await files.write(tmp_path, b"")
    with pytest.raises(FileNotFoundError):
        await files.write(tmp_path / "no" / "file", bytes(3_000_000))
    with pytest.raises(NotADirectoryError):
        await files.list(tmp_path / "agent.sock")
    with pytest.raises(FileNotFoundError):
        await files.remove(tmp_path / "nothing")
    with pytest.raises(OSError, match="not empty"):
        await files.remove(tmp_path)
    with pytest.raises(OSError, match="No space left"):
        await files.write("/dev/full", bytes(2_000_000), atomic=False)
    with pytest.raises(ValueError, match="cannot be the path"):
        await files.read("")
    assert await files.read("/proc/self/comm") == b"avmm-agent\n"


async def test_a_folder_is_listed_with_the_state_of_its_files(files: Files, tmp_path: Path) -> None:
    for number in range(2000):
        (tmp_path / f"file-{number}").touch()
    (tmp_path / "file-7").write_bytes(b"1234567")
    (tmp_path / "folder").mkdir()
    (tmp_path / os.fsdecode(b"not-\xff-utf8")).touch()
    entries = {entry.name: entry.stat for entry in await files.list(tmp_path)}
    assert sorted(entries) == sorted(os.listdir(tmp_path))
    assert entries["folder"].is_dir
    found, expected = entries["file-7"], os.stat(tmp_path / "file-7")
    assert (found.size_bytes, found.inode, found.uid) == (7, expected.st_ino, expected.st_uid)
    assert found.modified_ns == expected.st_mtime_ns


async def test_folders_are_made_and_removed(files: Files, tmp_path: Path) -> None:
    deep = tmp_path / "a/b/c"
    with pytest.raises(FileNotFoundError):
        await files.mkdir(deep)
    await files.mkdir(deep, parents=True)
    await files.mkdir(deep, parents=True)
    with pytest.raises(FileExistsError):
        await files.mkdir(deep)
    (deep / "file").touch()
    (tmp_path / "a/link").symlink_to(tmp_path)
    await files.remove(tmp_path / "a", recursive=True)
    await files.remove(tmp_path / "a", recursive=True, missing_ok=True)
    assert os.listdir(tmp_path) == ["agent.sock"]


async def test_names_change(files: Files, tmp_path: Path) -> None:
    await files.write(tmp_path / "old", b"x")
    await files.rename(tmp_path / "old", tmp_path / "new")
    assert not await files.exists(tmp_path / "old")
    assert await files.exists(tmp_path / "new")
    assert not await files.exists(tmp_path / "new" / "below")


async def test_files_go_up_and_down_whole(files: Files, tmp_path: Path) -> None:
    source, there, back = tmp_path / "source", tmp_path / "there", tmp_path / "back"
    source.write_bytes(os.urandom(5_000_001))
    source.chmod(0o755)
    assert await files.upload(source, there) == 5_000_001
    assert await files.download(there, back) == 5_000_001
    digests = {hashlib.sha256(p.read_bytes()).hexdigest() for p in (source, there, back)}
    assert len(digests) == 1
    assert {stat.S_IMODE(p.stat().st_mode) for p in (source, there, back)} == {0o755}


async def test_a_download_that_fails_keeps_the_old_target(files: Files, tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.write_bytes(b"old")
    with pytest.raises(FileNotFoundError):
        await files.download("/no/such/file", target)
    assert target.read_bytes() == b"old"
    assert sorted(os.listdir(tmp_path)) == ["agent.sock", "target"]


async def test_a_slow_reader_stops_the_agent(agent: Agent) -> None:
    chunks = agent.files.chunks("/dev/zero")
    assert len(await anext(chunks)) > 0
    assert (await agent.run(["echo", "hello"])).stdout == b"hello\n"
    await chunks.aclose()


async def test_reading_without_end_meets_a_limit(files: Files) -> None:
    assert await files.read("/dev/zero", size=1000) == bytes(1000)


async def test_a_file_too_large_to_hold_is_refused(
    files: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("avmm.agent.files.READ_MAX_BYTES", 1_000_000)
    with pytest.raises(HostError, match="download") as caught:
        await files.read("/dev/zero")
    assert caught.value.kind == "file-size"


async def test_a_file_that_blocks_does_not_outlive_the_agent(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    with running(tmp_path / "agent.sock") as program:
        agent = Agent(program.connect(), ready_timeout_s=20)
        reading = asyncio.create_task(agent.files.read(tmp_path / "fifo"))
        await until(lambda: len(program.children()) == 1)
        (worker,) = program.children()
    with pytest.raises(HostError):
        await reading
    await agent.closed()
    await until(lambda: is_gone(worker))


async def test_a_file_that_blocks_does_not_block_the_agent(agent: Agent, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    reading = asyncio.create_task(agent.files.read(tmp_path / "fifo"))
    assert (await agent.run(["echo", "hello"])).stdout == b"hello\n"
    reading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reading
