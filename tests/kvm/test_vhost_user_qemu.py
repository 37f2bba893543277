"""Our devices in another VMM's guest: a stock kernel in QEMU, over vhost-user.

QEMU emulates the CPU, so this needs no KVM at all. One boot asks everything.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from avmm.units import MIB
from linux.guest import BOOT_LIMIT_S, Assets
from linux.host import assert_clean, random_file, read_from_ext4

NAMESPACE = f"avmm-vu-{os.getpid()}"
HOST, GUEST, PORT = "10.99.0.1", "10.99.0.2", 5001
FILE_BYTES = 4 * MIB

# The disk's server is replaced while the guest writes: once it ends by itself, once it is killed.
SCRIPT = f"""
set -e
test "$(cat /sys/block/vda/serial)" = served
test "$(ls /sys/block/vda/mq | wc -l)" = 2
head -c {FILE_BYTES} /dev/urandom >/run/a
sum() {{ sha256sum | cut -d ' ' -f 1; }}
mount -t ext4 /dev/vda /mnt
cp /run/a /mnt/a
umount /mnt
mount -t ext4 /dev/vda /mnt
echo "FACT written $(sum </run/a)"
echo "FACT read $(sum </mnt/a)"
ifconfig eth0 {GUEST} up
ping -c 2 -W 10 {HOST} >/dev/null && echo "FACT ping ok"
wget -q -O /run/down http://{HOST}:{PORT}/sent
echo "FACT down $(sum </run/down)"
for p in RESTART KILL; do
    echo $p
    for i in 1 2 3 4 5; do cp /run/a /mnt/$p$i; sync; done
done
dd if=/run/a of=/dev/vdb bs=64k 2>/dev/null
sync
echo 3 >/proc/sys/vm/drop_caches
for file in /mnt/[RK]*; do cmp /run/a $file; done
umount /mnt
echo "FACT packed $(sum </dev/vdb)"
echo GROW
until [ $(cat /sys/block/vdb/size) = {2 * FILE_BYTES // 512} ]; do usleep 10000; done
echo "FACT whole ok"
"""


def why_not_here() -> str | None:
    """Why this machine cannot run the test; None when it can."""
    if os.geteuid() != 0:
        return "a network namespace needs root"
    if not shutil.which("qemu-system-x86_64"):
        return "qemu-system-x86_64 (qemu-system-x86) is not installed"
    assets = Assets.locate()
    for path in (assets.root, assets.kernel("cloud", "vmlinux"), assets.initrd("cloud")):
        if not path.exists():
            return f"{path} is missing; run scripts/assets"
    return None


@pytest.fixture
def namespace() -> Iterator[str]:
    """A network namespace: the TAP and the guest's address are nobody else's business."""
    subprocess.run(["ip", "netns", "add", NAMESPACE], check=True)
    yield NAMESPACE
    subprocess.run(["ip", "netns", "delete", NAMESPACE], check=True)


@dataclass
class Guest:
    """QEMU with its console on its stdout."""

    process: asyncio.subprocess.Process
    lines: list[str] = field(default_factory=list)

    async def says(self, text: str) -> None:
        """Wait for a line of the console."""
        assert self.process.stdout is not None
        while not self.lines or self.lines[-1] != text:
            line = await self.process.stdout.readline()
            assert line, f"the guest never said {text!r}"
            self.lines.append(line.decode(errors="replace").strip())

    def fact(self, name: str) -> str:
        """What the script reported."""
        for line in self.lines:
            if line.startswith(f"FACT {name} "):
                return line.removeprefix(f"FACT {name} ")
        raise AssertionError(f"no {name}")


@asynccontextmanager
async def process(*command: str, **options: Any) -> AsyncIterator[asyncio.subprocess.Process]:
    """A child that does not outlive the test."""
    child = await asyncio.create_subprocess_exec(*command, **options)
    try:
        yield child
    finally:
        with contextlib.suppress(ProcessLookupError):
            child.kill()
        await child.communicate()


@asynccontextmanager
async def server(
    *arguments: str, netns: str | None = None
) -> AsyncIterator[asyncio.subprocess.Process]:
    """`avmm vhost-user`, listening."""
    prefix = ("ip", "netns", "exec", netns) if netns else ()
    command = (sys.executable, "-m", "avmm", "vhost-user", *arguments, "-v")
    async with process(*prefix, *command, stderr=asyncio.subprocess.PIPE) as child:
        assert child.stderr is not None
        while b"listening" not in (line := await child.stderr.readline()):
            assert line, "the server ended"
        yield child


def qemu(assets: Assets, blk: str, packed: str, net: str) -> list[str]:
    script = base64.b64encode(SCRIPT.encode()).decode()
    cmdline = f"console=ttyS0 quiet panic=-1 avmm.cmd={script}"
    assert len(cmdline) < 2048
    return [
        "qemu-system-x86_64", "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot",
        "-accel", "tcg", "-M", "q35,memory-backend=mem", "-cpu", "max", "-smp", "2", "-m", "256",
        "-object", "memory-backend-memfd,id=mem,size=256M,share=on",
        "-kernel", str(assets.kernel("cloud", "vmlinux")),
        "-initrd", str(assets.initrd("cloud")), "-append", cmdline, "-serial", "stdio",
        "-chardev", f"socket,id=blk,path={blk},reconnect=1",
        "-device", "vhost-user-blk-pci,chardev=blk,num-queues=2",
        "-chardev", f"socket,id=packed,path={packed}",
        "-device", "vhost-user-blk-pci,chardev=packed,num-queues=1,packed=on",
        # Without KVM, QEMU 7.2 follows a null pointer when a NIC of vhost-user has MSI-X.
        "-chardev", f"socket,id=net,path={net}", "-netdev", "vhost-user,id=net,chardev=net",
        "-device", "virtio-net-pci,netdev=net,vectors=0",
    ]  # fmt: skip


@pytest.mark.slow
@pytest.mark.skipif(why_not_here() is not None, reason=str(why_not_here()))
def test_a_qemu_guest_uses_our_disk_and_our_nic(tmp_path: Path, namespace: str) -> None:
    assets = Assets.locate()
    disk = Path(shutil.copy(assets.root, tmp_path / "disk.img"))
    served = tmp_path / "served"
    served.mkdir()
    sent = random_file(served / "sent", FILE_BYTES)
    blk, packed, net = f"{tmp_path}/blk", f"{tmp_path}/packed", f"{tmp_path}/net"
    second_disk = tmp_path / "second.img"
    second_disk.write_bytes(bytes(FILE_BYTES))
    blk_server = (
        *("blk", "--socket", blk, "--disk", str(disk)),
        *("--serial", "served", "--num-queues", "2", "--io-threads", "2"),
    )

    async def run() -> Guest:
        async with AsyncExitStack() as stack, asyncio.timeout(BOOT_LIMIT_S):
            first = await stack.enter_async_context(server(*blk_server))
            other = await stack.enter_async_context(
                server("blk", "--socket", packed, "--disk", str(second_disk))
            )
            await stack.enter_async_context(
                server("net", "--socket", net, "--tap", "tap0", "--host", f"{HOST}/24",
                       netns=namespace)
            )  # fmt: skip
            await stack.enter_async_context(
                process("ip", "netns", "exec", namespace, sys.executable, "-m", "http.server",
                        "--bind", HOST, "--directory", str(served), str(PORT),
                        stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.DEVNULL)
            )  # fmt: skip
            guest = Guest(
                await stack.enter_async_context(
                    process(*qemu(assets, blk, packed, net), stdout=asyncio.subprocess.PIPE)
                )
            )
            await guest.says("RESTART")
            first.send_signal(signal.SIGTERM)
            await first.communicate()
            assert first.returncode == 0
            second = await stack.enter_async_context(server(*blk_server))
            await guest.says("KILL")
            second.kill()
            await second.communicate()
            await stack.enter_async_context(server(*blk_server))
            await guest.says("GROW")
            os.truncate(second_disk, 2 * FILE_BYTES)
            other.send_signal(signal.SIGUSR1)
            await guest.says("AVMM-EXIT: 0")
            return guest

    guest = asyncio.run(run())
    assert guest.fact("written") == guest.fact("read")
    assert guest.fact("written") == hashlib.sha256(read_from_ext4(disk, "/a")).hexdigest()
    assert guest.fact("packed") == guest.fact("written")
    assert guest.fact("down") == sent
    assert guest.fact("ping") == guest.fact("whole") == "ok"
    assert_clean(disk)
