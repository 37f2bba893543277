"""The guest agent in stock guests: avmm adds it to their initramfs by itself."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import sys
import time
from pathlib import Path

import pytest

import avmm
from avmm.agent.process import PIPE
from avmm.units import MIB
from linux.guest import Assets, Guests
from linux.host import assert_clean, random_file, read_from_ext4, sha256

HANG = "sleep 100000"
EXEC_ROUNDS = 30


async def test_commands_run_as_in_a_subprocess(guests: Guests) -> None:
    async with guests.running(HANG, agent=True) as guest:
        vm = guest.vm
        done = await vm.run(["uname", "-r"], check=True)
        assert done.stdout.decode().strip() == guests.assets.version("cloud")
        assert await vm.ping() < 60
        process = await vm.exec(["sh", "-c", "cat; echo $A >&2; pwd >&2; exit 7"], stdin=PIPE,
                                env={"A": "b", "PATH": "/bin"}, cwd="/proc")  # fmt: skip
        assert await process.communicate(b"hello") == (b"hello", b"b\n/proc\n")
        assert process.returncode == 7
        ids = await vm.run(["sh", "-c", "echo $(id -u) $(id -g)"], user=1234, group=5)
        assert ids.stdout == b"1234 5\n"
        with pytest.raises(FileNotFoundError):
            await vm.exec(["no-such-command"])

        terminal = await vm.exec(["sh", "-c", "stty size; read x; stty size"], tty=True)
        assert terminal.stdin is not None
        assert terminal.stdout is not None
        assert await terminal.stdout.readline() == b"24 80\r\n"
        terminal.resize(50, 132)
        terminal.stdin.write(b"\n")
        assert b"50 132\r\n" in await terminal.stdout.read()

        task = asyncio.create_task(vm.run(["sleep", "77777"]))
        await _until_runs(vm, b"77777", True)
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        await _until_runs(vm, b"77777", False)

        await vm.set_clock(1_000_000_000)
        assert abs(await vm.agent.clock() - 1_000_000_000) < 100
        assert (await vm.shutdown()).kind is avmm.ExitKind.STOPPED
        with pytest.raises(avmm.ConfigError):
            await vm.run(["true"])


async def _until_runs(vm: avmm.MicroVM, what: bytes, runs: bool) -> None:
    async with asyncio.timeout(60):
        while True:
            if (what in (await vm.run(["ps"])).stdout) is runs:
                return


async def test_a_hundred_mebibytes_go_up_and_down_whole(guests: Guests, tmp_path: Path) -> None:
    size = 100 * MIB
    digest = random_file(tmp_path / "up", size)
    async with guests.running(HANG, agent=True, memory="768M") as guest:
        vm = guest.vm
        await vm.agent.ready()
        began = time.perf_counter()
        assert await vm.files.upload(tmp_path / "up", "/root/file", mode=0o640) == size
        up = time.perf_counter() - began
        theirs = (await vm.run(["sha256sum", "/root/file"])).stdout.split()[0].decode()
        began = time.perf_counter()
        assert await vm.files.download("/root/file", tmp_path / "down") == size
        down = time.perf_counter() - began
        assert digest == theirs == sha256(tmp_path / "down")
        print(f"MEASURED up {100 / up:.1f} MiB/s, down {100 / down:.1f} MiB/s")
        assert (await vm.files.stat("/root/file")).mode & 0o7777 == 0o640
        names = {entry.name for entry in await vm.files.list("/root")}
        assert names == {"file"}
        await vm.files.remove("/root", recursive=True)
        assert not await vm.files.exists("/root")


@pytest.mark.variant
async def test_an_exec_costs_not_much_more_than_an_echo(guests: Guests) -> None:
    """Prints what `avmm bench embed` measures; the ratio is no check here, on any machine."""
    async with guests.running("vsock serve 5000 echo & " + HANG, agent=True) as guest:
        await guest.says("LISTENING")
        vm = guest.vm
        await vm.run(["true"])
        reader, writer = await vm.vsock.connect(5000)
        echo, pings, runs = [], [], []
        for _ in range(EXEC_ROUNDS):
            began = time.perf_counter()
            writer.write(b"x")
            await reader.readexactly(1)
            echo.append(time.perf_counter() - began)
            pings.append(await vm.ping())
            began = time.perf_counter()
            await vm.run(["true"], check=True)
            runs.append(time.perf_counter() - began)
        writer.close()
        middle = EXEC_ROUNDS // 2
        e, p, r = (sorted(times)[middle] * 1e3 for times in (echo, pings, runs))
        print(f"MEASURED echo {e:.2f} ms, ping {p:.2f} ms, exec true {r:.2f} ms: {r / e:.1f}x")


async def test_the_agent_goes_where_init_goes(guests: Guests, root_disk: Path) -> None:
    """Started in the initramfs, it acts in the root file system of a disk after switch_root."""
    disks = [avmm.Disk(str(root_disk))]
    async with guests.running("echo UP; " + HANG, append="root=/dev/vda", disks=disks,
                              agent=True) as guest:  # fmt: skip
        await guest.says("UP")
        vm = guest.vm
        assert not await vm.files.exists("/modules.list")  # of the initramfs
        mounts = (await vm.run(["cat", "/proc/mounts"], check=True)).stdout.decode()
        assert "/dev/vda / ext4" in mounts
        data = os.urandom(300_000)
        await vm.files.write("/root/kept", data)
        await vm.shutdown()
    assert guest.kind is avmm.ExitKind.STOPPED
    assert_clean(root_disk)
    assert hashlib.sha256(read_from_ext4(root_disk, "/root/kept")).digest() == (
        hashlib.sha256(data).digest()
    )


@pytest.mark.parametrize(
    "isolate", [(), pytest.param(("--isolate",), marks=pytest.mark.variant)], ids=["", "isolated"]
)
async def test_exec_and_cp_by_the_command_line(
    assets: Assets, tmp_path: Path, isolate: tuple[str, ...]
) -> None:
    env = {**os.environ, "XDG_RUNTIME_DIR": str(tmp_path)}

    async def avmm_command(*arguments: str) -> asyncio.subprocess.Process:
        command = (sys.executable, "-m", "avmm", *arguments)
        pipe = asyncio.subprocess.PIPE
        return await asyncio.create_subprocess_exec(
            *command, env=env, stdin=pipe, stdout=pipe, stderr=pipe
        )

    async def done(*arguments: str, input: bytes = b"") -> tuple[int | None, bytes, bytes]:
        process = await avmm_command(*arguments)
        out, err = await process.communicate(input)
        return process.returncode, out, err

    vm = await avmm_command(
        *("run", "--name", "box", "--agent", "--kernel", str(assets.kernel("cloud", "vmlinux"))),
        *("--initrd", str(assets.initrd("cloud")), "--cmdline", "console=ttyS0 quiet panic=-1"),
        *isolate,
    )
    try:
        assert vm.stdout is not None
        await vm.stdout.readuntil(b"AVMM-GUEST: userspace")
        command = ("sh", "-c", "cat; uname -n >&2; exit 5")
        code, out, err = await done("exec", "box", "--", *command, input=b"given")
        assert (code, out) == (5, b"given"), err
        assert err == b"(none)\n"
        assert (await done("exec", "box", "--", "sh", "-c", "kill -TERM $$"))[0] == 128 + 15
        assert (await done("exec", "box", "--", "no-such"))[0] == 127
        digest = random_file(tmp_path / "up", 5 * MIB)
        assert await done("cp", str(tmp_path / "up"), "box:/root/file") == (0, b"", b"")
        assert (await done("exec", "box", "--", "sha256sum", "/root/file"))[1].startswith(
            digest.encode()
        )
        assert await done("cp", "box:/root/file", str(tmp_path / "down")) == (0, b"", b"")
        assert sha256(tmp_path / "down") == digest
    finally:
        vm.terminate()
        try:
            async with asyncio.timeout(30):
                await vm.communicate()
        finally:
            if vm.returncode is None:
                vm.kill()
                await vm.wait()
