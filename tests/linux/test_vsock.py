"""vsock: streams both ways between a stock guest's programs and this process, or unix sockets."""

from __future__ import annotations

import asyncio
import hashlib
import os
from pathlib import Path
from typing import Literal

import pytest

from avmm import Vsock
from avmm.units import MIB
from linux.guest import Guests, emulated_cpu
from linux.host import answered

COUNT = 200
BULK_BYTES = (12 if emulated_cpu() else 32) * MIB
ECHO, ZERO, DEAF, NOBODY = 1000, 1001, 1002, 1003
OURS, OURS_ECHO, OURS_ENDLESS, OURS_UNIX = 2000, 2001, 2002, 2003

Isolation = Literal["process"] | None
anywhere = pytest.mark.parametrize(
    "isolation", [None, pytest.param("process", marks=pytest.mark.variant)], ids=["", "isolated"]
)

SERVERS = f"""
set -m
for what in echo:{ECHO} zero:{ZERO} deaf:{DEAF}; do
    vsock serve ${{what#*:}} ${{what%:*}} >/dev/null &
done
echo SERVING
read -r done
"""


async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(MIB):
        writer.write(data)
        await writer.drain()
    writer.write_eof()
    await reader.read()
    writer.close()


@anywhere
@pytest.mark.both_loops
async def test_the_host_connects_to_the_guests_programs(
    guests: Guests, tmp_path: Path, isolation: Isolation
) -> None:
    path = tmp_path / "v"
    options = {"vsock": Vsock(uds=str(path)), "memory": "512M"}
    async with guests.running(SERVERS, isolation=isolation, **options) as guest:
        await guest.says("SERVING")
        vsock = guest.vm.vsock

        async def one(size: int) -> None:
            data = os.urandom(size)
            streams = await vsock.connect(ECHO, timeout_s=60)
            assert hashlib.sha256(await answered(*streams, data)).digest() == (
                hashlib.sha256(data).digest()
            )

        await one(BULK_BYTES)
        await asyncio.gather(*(one(20_000) for _ in range(COUNT)))

        with pytest.raises(ConnectionRefusedError):
            await vsock.connect(NOBODY, timeout_s=60)

        # A program that never accepts: it is connected, and takes what its buffer holds.
        _, writer = await vsock.connect(DEAF, timeout_s=60)
        writer.write(bytes(MIB))
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(1):
                await writer.drain()
        writer.transport.abort()

        # A reader that does not read stops the guest, and goes on where it was.
        reader, writer = await vsock.connect(ZERO, timeout_s=60)
        assert await reader.readexactly(MIB) == bytes(MIB)
        await asyncio.sleep(0.5)
        before = guest.vm.statistics().devices["vsock0"].counters["rx_bytes"]
        await asyncio.sleep(0.5)
        assert guest.vm.statistics().devices["vsock0"].counters["rx_bytes"] == before
        assert await reader.readexactly(4 * MIB) == bytes(4 * MIB)
        writer.close()
        await writer.wait_closed()

        unix_reader, unix_writer = await asyncio.open_unix_connection(path)
        unix_writer.write(b"CONNECT %d\n" % ECHO)
        assert (await unix_reader.readline()).startswith(b"OK ")
        data = os.urandom(MIB)
        assert await answered(unix_reader, unix_writer, data) == data

        await guest.vm.console.write(b"done\n")
        await guest.ended()
    assert guest.status == 0
    assert not path.exists()


CLIENTS = f"""
echo "FACT cid $(vsock cat {OURS} </dev/null)"
vsock check {OURS_ECHO} {COUNT} 20000 && echo "FACT check ok"
head -c {BULK_BYTES} /dev/urandom >/up
echo "FACT up $(sha256sum </up)"
echo "FACT back $(vsock cat {OURS_ECHO} </up | sha256sum)"
echo "FACT unix $(head -c 1000000 /up | vsock cat {OURS_UNIX} | sha256sum)"
echo "FACT part $(head -c 1000000 /up | sha256sum)"
vsock cat {NOBODY} </dev/null 2>/err || echo "FACT refused $(cat /err)"
vsock zero {OURS_ENDLESS} 100000000000 &
echo FLOODING
wait
"""


@anywhere
@pytest.mark.both_loops
async def test_the_guests_programs_connect_to_the_host(
    guests: Guests, tmp_path: Path, isolation: Isolation
) -> None:
    path = tmp_path / "v"
    ends: list[BaseException] = []
    flood = asyncio.Event()

    async def hello(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"%d" % writer.get_extra_info("peername")[0])
        writer.close()

    async def endless(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while await reader.readexactly(MIB):
                flood.set()
        except (ConnectionError, asyncio.IncompleteReadError) as e:
            ends.append(e)
            raise

    vsock = Vsock(cid=42, uds=str(path))
    unix = await asyncio.start_unix_server(echo, f"{path}_{OURS_UNIX}")
    options = {"vsock": vsock, "memory": "512M"}
    async with unix, guests.running(CLIENTS, isolation=isolation, **options) as guest:
        servers = [
            await guest.vm.vsock.serve(port, callback)
            for port, callback in ((OURS, hello), (OURS_ECHO, echo), (OURS_ENDLESS, endless))
        ]
        await guest.says("FLOODING")
        async with asyncio.timeout(60):
            await flood.wait()
        assert guest.fact("cid") == "42"
        assert guest.fact("check") == "ok"
        assert guest.fact("back") == guest.fact("up")
        assert guest.fact("unix") == guest.fact("part")
        assert "reset" in guest.fact("refused") or "refused" in guest.fact("refused")
        await guest.vm.kill()
        for server in servers:
            await server.wait_closed()
    assert [type(end) for end in ends] == [ConnectionResetError]
