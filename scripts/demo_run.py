"""The host's part of scripts/demo: runs `avmm run` and checks what the guest does.

usage: demo_run.py INITRD     (AVMM_CACHE names the folder of scripts/assets)
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

CACHE = Path(os.environ["AVMM_CACHE"])
HOST, GUEST = "172.31.77.1", "172.31.77.2"
IP_FREEBIND = 15  # linux/in.h; not in the socket module
SIZE = 4 * 1024 * 1024
TIMEOUT_S = 150


class Demo:
    """One boot; `facts` fills from the guest's DEMO lines."""

    def __init__(self, disk: Path, initrd: Path) -> None:
        self.command = [
            str(Path(sys.executable).with_name("avmm")), "run",
            "--kernel", str(CACHE / "kernels/cloud/vmlinuz"), "--initrd", str(initrd),
            "--cmdline", "console=ttyS0 quiet panic=-1", "--cpus", "2", "--memory", "512M",
            "--disk", str(disk), "--rng",
            "--net", f"tap=avmmdemo0,host={HOST}/24,guest={GUEST},mac=52:54:00:00:4d:01",
        ]  # fmt: skip
        self.facts: dict[str, str] = {}
        self.received = hashlib.sha256()
        self.sent = os.urandom(SIZE)
        self.console: list[str] = []
        self.failures: list[str] = []

    async def receive(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(65536):
            self.received.update(data)
        writer.close()

    async def reach_guest(self) -> None:
        """Ping the guest and send it SIZE bytes; it listens by now."""
        ping = await asyncio.create_subprocess_exec(
            str(CACHE / "busybox"), "ping", "-c", "1", "-W", "5", GUEST, stdout=subprocess.DEVNULL
        )
        self.facts["ping back"] = "ok" if await ping.wait() == 0 else "no answer"
        _, writer = await asyncio.open_connection(GUEST, 5003)
        writer.write(self.sent)
        await writer.drain()
        writer.close()
        await writer.wait_closed()

    async def boot(self) -> int:
        """Run the guest to its end; returns the exit status of avmm."""
        listener = socket.socket()
        listener.setsockopt(socket.IPPROTO_IP, IP_FREEBIND, 1)  # the TAP does not exist yet
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((HOST, 5001))
        server = await asyncio.start_server(self.receive, sock=listener)
        begin = time.monotonic()
        process = await asyncio.create_subprocess_exec(
            *self.command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE
        )
        assert process.stdout is not None
        try:
            async for raw in process.stdout:
                line = raw.decode(errors="replace").rstrip()
                self.console.append(line)
                if "AVMM-GUEST: userspace" in line:
                    self.facts["boot"] = f"{time.monotonic() - begin:.1f}"
                elif line.startswith("DEMO "):
                    _, key, value = line.split(" ", 2)
                    self.facts[key] = value
                    if key == "listening":
                        await self.reach_guest()
            return await process.wait()
        finally:
            server.close()
            if process.returncode is None:
                process.terminate()
                await process.wait()

    def check(self, text: str, seen: bool) -> None:
        print(f"  {'ok  ' if seen else 'FAIL'} {text}", flush=True)
        if not seen:
            self.failures.append(text)

    def report(self, status: int, disk: Path) -> None:
        facts = self.facts
        read = subprocess.run(
            ["debugfs", "-R", "cat /demo", str(disk)], capture_output=True, text=True, check=False
        ).stdout.strip()
        fsck = subprocess.run(["fsck.ext4", "-fn", str(disk)], capture_output=True, check=False)
        up = facts.get("up") == self.received.hexdigest()
        down = facts.get("down") == hashlib.sha256(self.sent).hexdigest()
        self.check(f"kernel: {facts.get('uname', 'not seen')}", "uname" in facts)
        self.check(f"CPUs: {facts.get('cpus', 'not seen')}", facts.get("cpus") == "2")
        self.check(f"file read back from the disk image: {read!r}", read == "written in the guest")
        self.check("file system clean", fsck.returncode == 0)
        self.check("ping guest to host", facts.get("ping") == "ok")
        self.check("ping host to guest", facts.get("ping back") == "ok")
        self.check("TCP guest to host, 4 MiB, same SHA-256", up)
        self.check("TCP host to guest, 4 MiB, same SHA-256", down)
        self.check(f"seconds to user space: {facts.get('boot', 'not seen')}", "boot" in facts)
        self.check(f"guest poweroff, avmm exit status {status}", status == 0)


async def main() -> int:
    with tempfile.TemporaryDirectory(prefix="avmm-demo.") as folder:
        disk = Path(folder) / "disk.ext4"
        shutil.copy(CACHE / "guest/root.ext4", disk)
        demo = Demo(disk, Path(sys.argv[1]))
        print("demo: avmm run: 2 CPUs, 512 MiB, one disk, one NIC", flush=True)
        try:
            async with asyncio.timeout(TIMEOUT_S):
                status = await demo.boot()
        except TimeoutError:
            print(f"demo: no end after {TIMEOUT_S} s")
            status = -1
        demo.report(status, disk)
        if demo.failures:
            print("demo: the console's last lines:", *demo.console[-15:], sep="\n  ")
        return 1 if demo.failures else 0


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
