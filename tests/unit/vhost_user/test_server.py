"""A server's life: its socket, its clean-up, its command."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from avmm.cli.main import main
from avmm.errors import ConfigError, HostError
from avmm.vhost_user import server as server_module
from avmm.vhost_user.server import VhostUserServer
from avmm.virtio.devices.blk import Disk
from avmm.virtio.devices.net import Tap
from fakes.blk_driver import IN, OK, BlkDriver
from fakes.front_end import front_end
from fakes.mmio_driver import settle
from fakes.refused_accept import Refusing
from linux.holdings import Holdings


def exists(path: str | Path) -> bool:
    return os.path.exists(path)


async def test_a_server_gives_everything_back(image: Path, socket_path: str) -> None:
    before = Holdings.now()
    async with VhostUserServer(Disk(str(image)), socket_path) as server:
        async with front_end(socket_path) as end:
            await end.start()
            assert (await BlkDriver(end).request(IN, read_bytes=512))[0] == OK
            assert server.statistics().connected
        async with front_end(socket_path) as end:
            await end.negotiate()
        statistics = server.statistics()
        assert statistics.connections == 2
        assert statistics.device.counters["reads"] == 1
        assert [home.name for home in statistics.homes] == ["loop", "io0"]
    assert not exists(socket_path)
    assert not Holdings.now().beyond(before)


async def test_a_server_ends_under_a_connected_front_end(image: Path, socket_path: str) -> None:
    before = Holdings.now()
    async with VhostUserServer(Disk(str(image)), socket_path):
        connection = front_end(socket_path)
        end = await connection.__aenter__()
        await end.start()
    assert await end.closed()
    await connection.__aexit__(None, None, None)
    assert not Holdings.now().beyond(before)


async def test_a_stale_socket_is_replaced(image: Path, socket_path: str) -> None:
    left = socket.socket(socket.AF_UNIX)
    left.bind(socket_path)
    left.close()
    async with VhostUserServer(Disk(str(image)), socket_path), front_end(socket_path) as end:
        await end.negotiate()


async def test_a_socket_in_use_is_not(image: Path, socket_path: str) -> None:
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(socket_path)
        other.listen()
        before = Holdings.now()
        with pytest.raises(ConfigError, match="another process listens"):
            await VhostUserServer(Disk(str(image)), socket_path).__aenter__()
        assert exists(socket_path)
        assert not Holdings.now().beyond(before)


async def test_a_file_in_the_sockets_place_is_kept(image: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no socket"):
        await VhostUserServer(Disk(str(image)), str(image)).__aenter__()
    assert exists(image)


async def test_another_socket_in_its_place_is_kept(image: Path, socket_path: str) -> None:
    async with VhostUserServer(Disk(str(image)), socket_path):
        os.unlink(socket_path)
        other = socket.socket(socket.AF_UNIX)
        other.bind(socket_path)
    assert exists(socket_path)
    other.close()


@pytest.mark.parametrize("path", ["/nonexistent/folder/s", "/tmp/" + "x" * 200, "/proc/s"])
async def test_places_where_no_socket_can_be(image: Path, path: str) -> None:
    with pytest.raises(ConfigError, match="Socket"):
        await VhostUserServer(Disk(str(image)), path).__aenter__()


async def test_a_disk_that_cannot_be_opened_leaves_nothing(socket_path: str) -> None:
    before = Holdings.now()
    with pytest.raises(ConfigError, match="No such file"):
        await VhostUserServer(Disk("/nonexistent"), socket_path).__aenter__()
    assert not exists(socket_path)
    assert not Holdings.now().beyond(before)


@pytest.mark.parametrize("options", [{"io_threads": -1}, {"io_threads": 65}, {"io_poll_us": -1}])
def test_numbers_out_of_range(options: dict[str, int]) -> None:
    with pytest.raises(ConfigError):
        VhostUserServer(Disk("x"), "s", **options)  # type: ignore[arg-type]


def test_the_kernels_vhost_is_for_our_own_guests() -> None:
    with pytest.raises(ConfigError, match="own guests"):
        VhostUserServer(Tap("tap0", vhost=True), "s")


async def test_what_fails_on_the_host_ends_the_wait(image: Path, socket_path: str) -> None:
    async with VhostUserServer(Disk(str(image)), socket_path) as server:
        server.device.context.on_error(HostError("blk", op="I/O"))
        with pytest.raises(HostError):
            await server.wait()


async def test_a_connection_without_a_descriptor_leaves_the_loop_to_others(
    image: Path, socket_path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server_module, "_REST_S", 3600.0)
    refusing = Refusing(monkeypatch, 1000)
    async with VhostUserServer(Disk(str(image)), socket_path) as server:
        waiting = asyncio.ensure_future(server.wait())
        _, writer = await asyncio.open_unix_connection(socket_path)
        await settle()
        assert refusing.refused == 1
        assert not waiting.done()
        waiting.cancel()
        writer.close()


async def test_a_connection_without_a_descriptor_is_served_when_there_is_one(
    image: Path, socket_path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server_module, "_REST_S", 0.0)
    refusing = Refusing(monkeypatch, 3)
    async with (
        VhostUserServer(Disk(str(image)), socket_path),
        front_end(socket_path) as end,
    ):
        await end.start()
        assert (await BlkDriver(end).request(IN, read_bytes=512))[0] == OK
        assert refusing.refused == 3


@pytest.mark.parametrize(
    "arguments",
    [
        ["blk", "--socket", "s"],
        ["blk", "--disk", "x"],
        ["net", "--socket", "s"],
        ["blk", "--socket", "s", "--disk", "x", "--io-threads", "many"],
        [],
    ],
)
def test_options_that_are_missing_or_wrong(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["vhost-user", *arguments])
    assert ended.value.code == 2
    assert "usage" in capsys.readouterr().err


def test_a_bad_disk_is_exit_code_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--socket", str(tmp_path / "s"), "--disk", str(tmp_path / "none")]
    assert main(["vhost-user", "blk", *arguments]) == 2
    assert "No such file" in capsys.readouterr().err


@asynccontextmanager
async def command(*arguments: str) -> AsyncIterator[asyncio.subprocess.Process]:
    """`avmm vhost-user`, once it listens."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "avmm", "vhost-user", *arguments, "-v"),
        stderr=asyncio.subprocess.PIPE,
    )
    assert process.stderr is not None
    try:
        while b"listening" not in (line := await process.stderr.readline()):
            assert line, "it ended"
        yield process
    finally:
        if process.returncode is None:
            process.kill()
            await process.communicate()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_signal_ends_the_command(
    image: Path, tmp_path: Path, number: signal.Signals
) -> None:
    path = f"{tmp_path}/s"
    async with (
        command("blk", "--socket", path, "--disk", str(image), "--stats") as process,
        front_end(path) as end,
    ):
        await end.start()
        assert (await BlkDriver(end).request(IN, read_bytes=512))[0] == OK
        process.send_signal(number)
        _, err = await process.communicate()
        assert process.returncode == 0
        statistics = json.loads(err.splitlines()[-1])
        assert statistics["device"]["counters"]["reads"] == 1
        assert await end.closed()
    assert not exists(path)
