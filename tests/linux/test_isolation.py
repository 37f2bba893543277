"""A stock guest in a worker process: every kind of device that it may have there, and its agent."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

import avmm
from avmm.units import MIB
from linux.guest import Guests
from linux.host import answered, assert_clean, random_file, read_from_ext4, sha256

ECHO, OURS, NOBODYS = 1000, 2000, 3000

SCRIPT = """
    echo "FACT root $(awk '$2 == "/" { print $1 }' /proc/mounts)"
    head -c 8388608 /dev/urandom >/data && sha256sum </data | cut -d ' ' -f 1 >/sum
    echo 3 >/proc/sys/vm/drop_caches
    [ "$(sha256sum </data | cut -d ' ' -f 1)" = "$(cat /sum)" ] && echo "FACT data same"
    ping -c 3 -W 30 10.98.0.1 >/dev/null && echo "FACT ping yes"
    echo "FACT rng $(cat /sys/class/misc/hw_random/rng_current)"
    head -c 64 /dev/hwrng | wc -c
    echo by hvc >/dev/hvc0
"""


async def test_a_guest_in_a_worker_uses_all_it_has(guests: Guests, root_disk: Path) -> None:
    options = {
        "disks": [avmm.Disk(str(root_disk), limit=avmm.RateLimit(bps="500M"))],
        "nets": [avmm.Tap("avti0", host="10.98.0.1/24", guest="10.98.0.2")],
        "rng": True,
        "console": True,
        "cpus": 2,
        "io_threads": 1,
    }
    async with guests.running(
        SCRIPT, append="root=/dev/vda", isolation="process", **options
    ) as guest:
        await guest.vm.console.expect(b"by hvc")
        await guest.vm.pause()
        counters = guest.vm.statistics().devices
        await guest.vm.resume()
        await guest.ended()
    assert guest.kind is avmm.ExitKind.POWEROFF
    assert guest.fact("root").endswith(("vda", "root"))
    assert guest.fact("data") == "same"
    assert guest.fact("ping") == "yes"
    assert "virtio" in guest.fact("rng")
    assert counters["net0"].counters["rx_packets"] >= 3
    assert_clean(root_disk)
    assert read_from_ext4(root_disk, "/sum")


async def test_the_agent_and_sockets_of_a_guest_in_a_worker(guests: Guests, tmp_path: Path) -> None:
    digest = random_file(tmp_path / "up", 8 * MIB)
    uds = tmp_path / "v"
    script = f"vsock serve {ECHO} echo & sleep 100000"
    options = {"agent": True, "vsock": avmm.Vsock(uds=str(uds)), "io_threads": 1}
    async with guests.running(script, isolation="process", memory="512M", **options) as guest:
        vm = guest.vm
        done = await vm.run(["sh", "-c", "cat; echo $A >&2; exit 7"], input=b"in", env={"A": "b"})
        assert (done.stdout, done.stderr, done.returncode) == (b"in", b"b\n", 7)
        with pytest.raises(FileNotFoundError):
            await vm.exec(["no-such-command"])
        assert await vm.ping() < 60
        await vm.set_clock(1_000_000_000)
        assert abs(await vm.agent.clock() - 1_000_000_000) < 100
        assert await vm.files.upload(tmp_path / "up", "/root/file") == 8 * MIB
        theirs = (await vm.run(["sha256sum", "/root/file"])).stdout.split()[0].decode()
        await vm.files.download("/root/file", tmp_path / "down")
        assert digest == theirs == sha256(tmp_path / "down")

        await guest.says("LISTENING")
        data = (tmp_path / "up").read_bytes()
        reader, writer = await vm.vsock.connect(ECHO)
        assert await answered(reader, writer, data) == data
        reader, writer = await asyncio.open_unix_connection(uds)
        writer.write(b"CONNECT %d\n" % ECHO)
        assert (await reader.readline()).startswith(b"OK ")
        assert await answered(reader, writer, data) == data
        with pytest.raises(ConnectionRefusedError):
            await vm.vsock.connect(NOBODYS)

        async def shout(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write((await reader.readline()).upper())
            writer.close()

        async with await vm.vsock.serve(OURS, shout):
            for command in (["vsock", "cat", str(OURS)],) * 3:
                assert (await vm.run(command, input=b"hello\n")).stdout == b"HELLO\n"
        refused = await vm.run(["vsock", "cat", str(OURS)], input=b"hello\n")
        assert refused.returncode != 0
        assert (await vm.shutdown()).kind is avmm.ExitKind.STOPPED
