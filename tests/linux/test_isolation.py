"""A stock guest in a worker process: every kind of device that it may have there, and its agent."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

import avmm
from avmm.machine.isolation import remote
from avmm.machine.isolation.cgroup import limits_of, own_group
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


FILL = """
    echo UP
    head -c 200000000 /dev/zero >/fill
"""
SMALL = {"memory.max": 160 * MIB, "pids.max": 500}
TINY = {"memory.max": 4 * MIB, "pids.max": 500}


@pytest.fixture
def group() -> Path:
    """Ours, which hands on controllers."""
    own = own_group()
    controllers = "" if own is None else (own / "cgroup.subtree_control").read_text()
    if own is None or not {"memory", "pids"} <= set(controllers.split()):
        pytest.skip(f"control group {own}: memory and pids are not handed on")
    return own


@pytest.fixture
def delegated(group: Path) -> Iterator[Path]:
    """As systemd makes it for Delegate=memory pids and DelegateSubgroup=program, and we in it."""
    unit = group / "unit"
    unit.mkdir()
    (unit / "program").mkdir()
    os.setxattr(unit, "user.delegate", b"1")
    (unit / "program/cgroup.procs").write_text("0")
    try:
        yield unit
    finally:
        (group / "cgroup.procs").write_text("0")
        (unit / "program").rmdir()
        unit.rmdir()


def pid_of(vm: avmm.MicroVM) -> int:
    machine = vm._machine
    assert isinstance(machine, remote.RemoteMachine)
    return machine.process.pid


def group_of(vm: avmm.MicroVM) -> Path:
    """Where its worker really is."""
    inside = Path(f"/proc/{pid_of(vm)}/cgroup").read_text().strip().partition("::/")[2]
    return Path("/sys/fs/cgroup", inside)


def groups_in(parent: Path) -> list[Path]:
    return list(parent.glob("avmm-*"))


async def in_its_group(guests: Guests, parent: Path) -> None:
    """A guest whose worker is in a group with its limits, and no longer."""
    async with guests.running("sleep 100000", isolation="process") as guest:
        path = group_of(guest.vm)
        assert path == parent / f"avmm-{pid_of(guest.vm)}"
        limits = limits_of(guest.vm.config)
        assert {file: int((path / file).read_text()) for file in limits} == limits
        assert int((path / "memory.current").read_text()) > 16 * MIB  # the guest's is in it
        await guest.vm.kill()
        assert not path.exists()


async def test_a_worker_is_in_a_control_group_with_its_limits(guests: Guests, group: Path) -> None:
    await in_its_group(guests, group)


async def test_a_group_above_that_is_delegated_takes_workers(
    guests: Guests, delegated: Path
) -> None:
    assert (delegated / "cgroup.subtree_control").read_text() == ""
    await in_its_group(guests, delegated)


async def test_a_worker_beyond_its_memory_is_one_microvms_error(
    guests: Guests, group: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with guests.running("echo UP; read x; echo ON", isolation="process") as other:
        await other.says("UP")
        monkeypatch.setattr(remote, "limits_of", lambda _: SMALL)
        async with guests.running(FILL, isolation="process", memory="512M") as guest:
            await guest.says("UP")
            path = group_of(guest.vm)
            reason = await guest.ended()
            assert not path.exists()
            assert reason.kind is avmm.ExitKind.ERROR
            assert isinstance(reason.error, avmm.HostError)
            assert reason.error.kind == "worker-died"
            assert "killed by SIGKILL, since it reached its memory limit, 160 MiB" in reason.detail
        assert group_of(other.vm).exists()
        await other.vm.console.write(b"x\n")
        assert (await other.ended()).kind is avmm.ExitKind.POWEROFF
    assert "ON" in other.text


async def test_a_worker_beyond_its_memory_at_its_start_is_a_failed_start(
    guests: Guests, group: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "limits_of", lambda _: TINY)
    with pytest.raises(avmm.HostError, match="reached its memory limit, 4 MiB") as raised:
        await avmm.MicroVM(guests.config(), isolation="process").start()
    assert raised.value.kind == "worker-died"
    assert groups_in(group) == []


async def test_a_start_that_is_cancelled_leaves_no_control_group(
    guests: Guests, group: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    send = remote._send
    seen: list[Path] = []

    async def cancelled(*arguments: object) -> None:
        seen.extend(groups_in(group))
        starting.cancel()
        await send(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(remote, "_send", cancelled)
    starting = asyncio.create_task(avmm.MicroVM(guests.config(), isolation="process").start())
    with contextlib.suppress(asyncio.CancelledError):
        await starting
    assert starting.cancelled()
    assert len(seen) == 1
    assert not seen[0].exists()
