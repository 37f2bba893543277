"""Disks written in Python: in memory, over a base image, over HTTP, and with faults."""

from __future__ import annotations

import asyncio
import os
import random
import shutil
import ssl
import subprocess
import threading
from pathlib import Path
from typing import Any

import pytest

from avmm.block.objects import FaultRates, FaultyDisk, HttpDisk, OverlayDisk, RamDisk, overlay
from avmm.block.objects.http import BLOCK_BYTES
from avmm.block.objects.overlay import CLUSTER_BYTES
from avmm.block.source import check_source, read_from, write_to
from avmm.errors import ConfigError, HostError
from avmm.units import KIB, MIB
from fakes.web_server import WebServer

SIZE = 1 * MIB + 512


def make_base(tmp_path: Path, size: int = SIZE) -> Path:
    path = tmp_path / "base.img"
    path.write_bytes(random.Random(1).randbytes(size))
    return path


async def all_of(disk: Any) -> bytes:
    return bytes(await read_from(disk, 0, disk.size))


async def exercise(disk: Any, model: bytearray, seed: int, rounds: int = 60) -> None:
    """Random writes, reads and trims, some at once, against a plain array."""
    choice = random.Random(seed)

    def place() -> tuple[int, int]:
        size = choice.choice((512, 4096, 65536, 200 * 512))
        return choice.randrange((len(model) - size) // 512 + 1) * 512, size

    for _ in range(rounds):
        begin, size = place()
        what = choice.random()
        if what < 0.5:
            data = choice.randbytes(size)
            half = size // 1024 * 512
            await asyncio.gather(
                *(
                    write_to(disk, begin + at, part)
                    for at, part in ((0, data[:half]), (half, data[half:]))
                    if part
                )
            )
            model[begin : begin + size] = data
        elif what < 0.7:
            await disk.discard(begin, size)
            model[begin : begin + size] = bytes(size)
        else:
            assert await read_from(disk, begin, size) == model[begin : begin + size]
    assert await all_of(disk) == model


async def test_a_ram_disk_is_what_was_written_to_it() -> None:
    disk = RamDisk(SIZE, b"begins with this")
    check_source(disk, "ram", read_only=False)
    model = bytearray(b"begins with this".ljust(SIZE, b"\0"))
    assert disk.content == model
    await exercise(disk, model, seed=3)


@pytest.mark.parametrize(("size", "content"), [(0, b""), (1000, b""), (512, bytes(513))])
def test_a_ram_disk_has_a_size_that_disks_can_have(size: int, content: bytes) -> None:
    with pytest.raises(ConfigError, match=f"RamDisk: size {size}"):
        RamDisk(size, content)


async def test_an_overlay_is_the_base_until_it_is_written_and_never_writes_it(
    tmp_path: Path,
) -> None:
    base = make_base(tmp_path)
    before = base.read_bytes()
    async with OverlayDisk(str(base), str(tmp_path / "o.cow")) as disk:
        check_source(disk, "overlay", read_only=False)
        assert disk.size == SIZE
        assert await all_of(disk) == before
        assert disk.changed_bytes == 0
        await exercise(disk, bytearray(before), seed=4)
        assert disk.changed_bytes > 0
    assert base.read_bytes() == before


async def test_an_overlay_keeps_what_was_flushed(tmp_path: Path) -> None:
    base = make_base(tmp_path)
    model = bytearray(base.read_bytes())
    for seed in range(3):
        async with OverlayDisk(str(base), str(tmp_path / "o.cow")) as disk:
            assert await all_of(disk) == model
            await exercise(disk, model, seed=seed, rounds=20)


async def test_an_overlay_that_was_not_flushed_is_as_at_its_last_flush(tmp_path: Path) -> None:
    base = make_base(tmp_path)
    path = tmp_path / "o.cow"
    disk = OverlayDisk(str(base), str(path))
    await write_to(disk, 0, b"a" * 512)
    await disk.flush()
    await write_to(disk, CLUSTER_BYTES * 3, b"b" * 512)
    disk.close()  # as if the process had been killed
    expected = b"a" * 512 + base.read_bytes()[512:]
    async with OverlayDisk(str(base), str(path)) as again:
        assert await all_of(again) == expected


async def test_an_overlay_takes_only_the_room_of_what_differs(tmp_path: Path) -> None:
    base = make_base(tmp_path, 16 * MIB)
    path = tmp_path / "o.cow"
    async with OverlayDisk(str(base), str(path)) as disk:
        await write_to(disk, 5 * MIB, b"x" * 512)
        await disk.discard(8 * MIB, 4 * MIB)
        await disk.flush()
        assert path.stat().st_blocks * 512 <= 4 * CLUSTER_BYTES
        assert bytes(await read_from(disk, 8 * MIB, 4 * MIB)) == bytes(4 * MIB)


async def test_a_commit_moves_the_changes_into_the_base(tmp_path: Path) -> None:
    base = make_base(tmp_path)
    model = bytearray(base.read_bytes())
    path = tmp_path / "o.cow"
    async with OverlayDisk(str(base), str(path)) as disk:
        await exercise(disk, model, seed=5, rounds=10)
        assert await disk.commit() >= disk.changed_bytes == 0
        assert await all_of(disk) == model
        assert base.read_bytes() == model
        await exercise(disk, model, seed=6, rounds=10)
    async with OverlayDisk(str(base), str(path)) as disk:
        assert await all_of(disk) == model


async def test_one_base_serves_many_overlays_and_each_overlay_one(tmp_path: Path) -> None:
    base = make_base(tmp_path)
    first = OverlayDisk(str(base), str(tmp_path / "1.cow"))
    second = OverlayDisk(str(base), str(tmp_path / "2.cow"))
    await write_to(first, 0, b"1" * 512)
    await write_to(second, 0, b"2" * 512)
    assert bytes(await read_from(first, 0, 1)) == b"1"
    with pytest.raises(ConfigError, match="in use by another microVM"):
        OverlayDisk(str(base), str(tmp_path / "1.cow"))
    with pytest.raises(ConfigError, match="in use"):
        await first.commit()
    assert bytes(await read_from(first, 0, 1)) == b"1"
    first.close()
    second.close()


@pytest.mark.parametrize("spoil", ["magic", "size", "short"])
def test_an_overlay_of_something_else_is_refused(tmp_path: Path, spoil: str) -> None:
    base, path = make_base(tmp_path), tmp_path / "o.cow"
    OverlayDisk(str(base), str(path)).close()
    if spoil == "magic":
        with path.open("r+b") as file:
            file.write(b"qcow")
    elif spoil == "short":
        os.truncate(path, path.stat().st_size - 512)
    else:
        base.write_bytes(bytes(2 * SIZE))
    with pytest.raises(ConfigError, match=r"o\.cow is (not an overlay|of a base of|cut short)"):
        OverlayDisk(str(base), str(path))


async def test_a_cancelled_call_ends_when_its_thread_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entered, release = threading.Event(), threading.Event()
    write_whole = overlay._write_whole

    def slow(*args: Any) -> None:
        entered.set()
        release.wait(20)
        write_whole(*args)

    async with OverlayDisk(str(make_base(tmp_path)), str(tmp_path / "o.cow")) as disk:
        monkeypatch.setattr(overlay, "_write_whole", slow)
        task = asyncio.create_task(write_to(disk, 0, b"x" * CLUSTER_BYTES))
        await asyncio.to_thread(entered.wait, 20)
        task.cancel()
        for _ in range(10):
            await asyncio.sleep(0)
        assert not task.done()
        release.set()
        await asyncio.wait([task])
        assert task.cancelled()


@pytest.fixture
def server() -> WebServer:
    return WebServer(random.Random(2).randbytes(4 * BLOCK_BYTES + 512))


async def test_an_http_disk_is_the_file_on_the_server(server: WebServer) -> None:
    async with server.running() as url, HttpDisk(url) as disk:
        check_source(disk, "http", read_only=True)
        assert disk.size == len(server.data)
        assert await all_of(disk) == server.data
        for begin, size in ((0, 512), (BLOCK_BYTES - 512, 1024), (disk.size - 512, 512)):
            assert await disk.read(begin, size) == server.data[begin : begin + size]
        statistics = disk.statistics()
        assert (statistics.misses, statistics.hits) == (5, 4)
        assert statistics.bytes == disk.size


async def test_the_cache_is_bounded_and_keeps_what_was_used_last(server: WebServer) -> None:
    async with server.running() as url, HttpDisk(url, cache_bytes=2 * BLOCK_BYTES) as disk:
        for index in (0, 1, 0, 2, 0, 1):
            await disk.read(index * BLOCK_BYTES, 512)
        assert [begin // BLOCK_BYTES for begin, _ in server.asked[1:]] == [0, 1, 2, 1]


async def test_readers_of_one_block_ask_once_and_one_may_go(server: WebServer) -> None:
    async with server.running() as url, HttpDisk(url) as disk:
        server.gate = asyncio.Event()
        readers = [asyncio.create_task(disk.read(512 * i, 512)) for i in range(8)]
        for _ in range(5):
            await asyncio.sleep(0)
        readers[0].cancel()
        server.gate.set()
        await asyncio.wait(readers)
        assert readers[0].cancelled()
        assert [await one for one in readers[1:]] == [
            server.data[512 * i : 512 * i + 512] for i in range(1, 8)
        ]
        assert len(server.asked) == 2


async def test_a_connection_is_used_again_and_replaced_when_closed(server: WebServer) -> None:
    async with server.running() as url, HttpDisk(url) as disk:
        await disk.read(0, 512)
        assert server.connections == 1
        server.hang_up()
        await disk.read(BLOCK_BYTES, 512)
        assert server.connections == 2


@pytest.mark.parametrize("fault", ["etag", "cut", "status"])
async def test_what_is_not_the_file_any_more_is_an_error(server: WebServer, fault: str) -> None:
    async with server.running() as url, HttpDisk(url) as disk:
        await disk.read(0, 512)
        if fault == "etag":
            server.etag = '"2"'
        elif fault == "cut":
            server.cut = server.close_after = True
        else:
            server.ranges = False
        with pytest.raises(OSError, match=r"disk\.img"):
            await disk.read(BLOCK_BYTES, 512)
        assert await disk.read(0, 512) == server.data[:512], "from the cache"


async def test_a_server_that_does_not_answer_is_given_up(server: WebServer) -> None:
    async with server.running() as url, HttpDisk(url, timeout_s=0.01) as disk:
        server.gate = asyncio.Event()
        with pytest.raises(TimeoutError):
            await disk.read(0, 512)
        server.gate.set()


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("ftp://x/y", "not an http"),
        ("http:///y", "not an http"),
        ("disk.img", "not an http"),
        ("http://x:65536/y", "[Pp]ort"),
        ("http://[::1/y", "Invalid IPv6"),
        ("http://x/\N{DEGREE SIGN}", "ASCII"),
    ],
)
def test_an_http_disk_needs_a_url(url: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        HttpDisk(url)


async def test_a_server_without_ranges_is_refused_and_none_is_a_hosts_error(
    server: WebServer,
) -> None:
    server.ranges = False
    async with server.running() as url:
        with pytest.raises(ConfigError, match="has to know ranges"):
            async with HttpDisk(url):
                pass
    with pytest.raises(HostError, match=r"disk\.img"):
        async with HttpDisk(url):
            pass


def certificate(folder: Path) -> tuple[Path, Path]:
    """One for 127.0.0.1 that signs itself, and its key; skips where there is no openssl."""
    if (openssl := shutil.which("openssl")) is None:
        pytest.skip("openssl is not installed")
    made, key = folder / "certificate.pem", folder / "key.pem"
    options = "req -x509 -nodes -days 1 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -subj /CN=test"
    subprocess.run(
        [openssl, *options.split(), "-addext", "subjectAltName=IP:127.0.0.1",
         "-out", made, "-keyout", key], check=True, capture_output=True,
    )  # fmt: skip
    return made, key


async def test_a_server_on_tls_is_read_when_its_certificate_is_trusted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, key = certificate(tmp_path)
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(made, key)
    server = WebServer(random.Random(4).randbytes(2 * BLOCK_BYTES), tls)
    async with server.running() as url:
        with pytest.raises(HostError, match="certificate"):
            await HttpDisk(url).__aenter__()
        monkeypatch.setenv("SSL_CERT_FILE", str(made))
        async with HttpDisk(url) as disk:
            assert await all_of(disk) == server.data


async def outcomes(disk: FaultyDisk) -> list[str]:
    found = []
    for i in range(200):
        try:
            await disk.write(512 * i, bytes([i]) * 2048)
            await disk.flush()
            await disk.read(512 * i, 512)
        except OSError as e:
            found.append(str(e))
        else:
            found.append("done")
    return found


async def test_the_same_seed_makes_the_same_faults() -> None:
    rates = FaultRates(read_error=0.1, write_error=0.1, torn_write=0.1, flush_error=0.1)
    disks = [FaultyDisk(RamDisk(SIZE), rates, seed=seed) for seed in (7, 7, 8)]
    check_source(disks[0], "faulty", read_only=False)
    first, same, other = [await outcomes(disk) for disk in disks]
    assert first == same != other
    assert all(disks[0].counts[name] > 0 for name in ("read_error", "torn_write", "flush_error"))


async def test_a_torn_write_is_there_in_part() -> None:
    base = RamDisk(64 * KIB)
    disk = FaultyDisk(base, FaultRates(torn_write=1.0), seed=1)
    with pytest.raises(OSError, match=r"on purpose after \d+ bytes") as caught:
        await disk.write(0, b"t" * 64 * KIB)
    part = int(str(caught.value).split()[-2])
    assert 0 < part < 64 * KIB
    assert part % 512 == 0
    assert base.content == b"t" * part + bytes(64 * KIB - part)


async def test_faults_can_be_switched_off() -> None:
    disk = FaultyDisk(RamDisk(SIZE), FaultRates(write_error=1.0), seed=1)
    with pytest.raises(OSError, match="on purpose"):
        await disk.write(0, bytes(512))
    disk.rates = FaultRates()
    await disk.write(0, b"w" * 512)
    await disk.discard(512, 512)
    assert await disk.read(0, 1024) == b"w" * 512 + bytes(512)


async def test_delayed_calls_overtake_one_another() -> None:
    disk = FaultyDisk(RamDisk(SIZE), FaultRates(delay=1.0, delay_s=0.02), seed=1)
    ended: list[int] = []

    async def read(index: int) -> None:
        await disk.read(0, 512)
        ended.append(index)

    await asyncio.gather(*map(read, range(20)))
    assert sorted(ended) == list(range(20)) != ended


def test_rates_are_checked() -> None:
    with pytest.raises(ConfigError, match=r"torn_write: 1\.5 is not in 0 to 1"):
        FaultRates(torn_write=1.5)
    with pytest.raises(ConfigError, match="FaultyDisk: str: it has no size"):
        FaultyDisk("disk.img", FaultRates(), seed=0)
