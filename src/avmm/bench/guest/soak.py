"""Two disks and two NICs of one guest at full load for minutes: data right, no stall, no growth.

The guest writes and reads back, sends and has sent back, and compares every byte; this side looks
at the counters of every device, and at what this process holds, once an interval.

python -m avmm.bench.guest.soak [--minutes M] [--cpus N] [--io-threads N] [--transport pci|mmio]
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import contextlib
import hashlib
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from avmm.bench.guest.kit import Kit
from avmm.errors import AvmmError, GuestFault
from avmm.loop import run
from avmm.machine.config import Config
from avmm.machine.lifecycle import State
from avmm.machine.machine import MicroVM
from avmm.machine.reason import ExitKind
from avmm.units import MIB
from avmm.virtio.devices.blk import Disk
from avmm.virtio.devices.net import Tap

PORT = 5001
FILE_BYTES, DISK_BYTES = 2 * MIB, 32 * MIB
NETS = ("172.31.81", "172.31.82")
MEMORY_GROWTH_MAX_KIB = 8 * 1024
"""After the first interval; an arena of the allocator more is no leak."""
_BOOT_LIMIT_S, _END_LIMIT_S = 180.0, 120.0
_SCRIPT = """
head -c {size} /dev/urandom >/f; s=$(sha256sum </f | cut -c 1-64); n=0
end=$(($(date +%s) + {seconds}))
on() {{ [ $(date +%s) -lt $end ]; }}
same() {{ cmp - /f >/dev/null 2>&1 || echo "SOAK bad $1 $n"; }}
disk() {{ while on; do at=$((n % {slots} * 32))
dd if=/f of=/dev/$1 bs=64k seek=$at conv=notrunc,fsync 2>/dev/null
dd if=/dev/$1 bs=64k skip=$at count=32 2>/dev/null | same $1
n=$((n + 1)); done; echo "SOAK done $1 $n $s"; }}
net() {{ while on; do nc $1 {port} </f | same $1; n=$((n + 1)); done; echo "SOAK done $1 $n $s"; }}
echo "SOAK begin"
{loads}
wait
"""


@dataclass(frozen=True, slots=True)
class Held:
    """What this process holds. anonymous_kib: its own memory, not the guest's, which is shared."""

    anonymous_kib: int
    descriptors: int
    threads: int


@dataclass(slots=True)
class Soak:
    """What came of it. rounds: by disk or host address, how often the file went and came back.
    problems: empty when all is well."""

    seconds: float = 0.0
    intervals: int = 0
    rounds: dict[str, int] = field(default_factory=dict)
    held: list[Held] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def held() -> Held:
    """As it is now."""
    status = Path("/proc/self/status").read_text()

    def number(key: str) -> int:
        return int(status.split(f"{key}:")[1].split()[0])

    return Held(number("RssAnon"), len(os.listdir("/proc/self/fd")), threads())


def threads() -> int:
    """Those of this process, but for io_uring's: the kernel makes and ends them by itself."""
    count = 0
    for task in Path("/proc/self/task").iterdir():
        with contextlib.suppress(OSError):  # it has ended meanwhile
            count += not (task / "comm").read_text().startswith("iou-")
    return count


def script(seconds: float) -> str:
    """The guest's."""
    loads = ["disk vda &", "disk vdb &", *(f"net {net}.1 &" for net in NETS)]
    return _SCRIPT.format(
        size=FILE_BYTES,
        seconds=round(seconds),
        slots=DISK_BYTES // FILE_BYTES,
        port=PORT,
        loads="\n".join(loads),
    )


async def soak(
    kernel: Path,
    initrd: Path,
    folder: Path,
    *,
    seconds: float,
    interval_s: float,
    say: Callable[[str], None] = lambda text: None,
    **options: Any,
) -> Soak:
    """Load one guest for so long. folder: for the disks' images. options: fields of Config."""
    images = [folder / f"soak{i}.img" for i in range(2)]
    for image in images:
        with image.open("wb") as file:
            file.truncate(DISK_BYTES)
    shape: dict[str, Any] = {"cpus": 2, "memory": "512M"}
    command = base64.b64encode(script(seconds).encode()).decode()
    config = Config(
        kernel=str(kernel),
        initrd=str(initrd),
        cmdline=f"console=ttyS0 quiet panic=-1 avmm.cmd={command}",
        disks=[Disk(str(image)) for image in images],
        nets=[
            Tap(f"avmmsoak{i}", host=f"{net}.1/24", guest=f"{net}.2") for i, net in enumerate(NETS)
        ],
        **shape | options,
    )
    result = Soak()
    async with MicroVM(config) as vm, contextlib.AsyncExitStack() as stack:
        for net in NETS:
            server = await asyncio.start_server(_echo, f"{net}.1", PORT)
            stack.callback(server.close)
        await vm.console.expect(rb"SOAK begin", timeout=_BOOT_LIMIT_S)
        reader, writer = vm.console.open(scrollback=False, hold=True)
        stack.callback(writer.close)
        saying = asyncio.create_task(reader.read())
        stack.callback(saying.cancel)
        began = time.monotonic()
        await _watch(vm, result, seconds, interval_s, say)
        async with asyncio.timeout(_END_LIMIT_S):
            reason = await vm.wait()
            said = await saying
        result.seconds = time.monotonic() - began
        if reason.kind is not ExitKind.POWEROFF:
            result.problems.append(
                f"the guest ended: {reason}\n{said[-2000:].decode('ascii', 'replace')}"
            )
    _judge_data(result, said.decode(errors="replace"), images)
    _judge_holdings(result)
    return result


async def _echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(ConnectionError):  # the guest's end, in the middle of a round
        while data := await reader.read(256 * 1024):
            writer.write(data)
            await writer.drain()
        writer.close()
        await writer.wait_closed()


async def _watch(
    vm: MicroVM, result: Soak, seconds: float, interval_s: float, say: Callable[[str], None]
) -> None:
    """Look at progress and holdings once an interval, up to the end of the load."""
    before, began = _progress(vm), time.monotonic()
    last = int(seconds / interval_s)
    for index in range(1, last + 1):
        # By the clock: the guest ends by its own, and late intervals would add up.
        await asyncio.sleep(began + index * interval_s - time.monotonic())
        # Its clock may be a little ahead, so that it has ended by the last look.
        if vm.state is not State.RUNNING and index < last:
            gone_s = index * interval_s
            result.problems.append(f"the guest was gone after {gone_s:.0f} s of {seconds:.0f}")
            return
        now = _progress(vm)
        for device, count in now.items():
            if count == before[device]:
                result.problems.append(
                    f"{device} stood still in interval {result.intervals}, at {count}"
                )
        moved = ", ".join(f"{device} {now[device] - before[device]}" for device in now)
        before = now
        result.intervals += 1
        result.held.append(held())
        say(f"{result.intervals * interval_s:.0f} s: {moved}; {result.held[-1]}")


def _progress(vm: MicroVM) -> dict[str, int]:
    """Bytes of each disk, packets of each NIC, both ways; GuestFault when a device has failed."""
    found = {}
    for name, device in vm.statistics().devices.items():
        if device.faults:
            raise GuestFault("soak", f"{name}: {device.last_fault}")
        counters = device.counters
        keys = ("read_bytes", "write_bytes") if device.type == "blk" else _PACKETS
        found[name] = sum(counters[key] for key in keys)
    return found


_PACKETS = ("rx_packets", "tx_packets")


def _judge_data(result: Soak, text: str, images: Sequence[Path]) -> None:
    result.problems += re.findall(r"SOAK bad .*", text)
    done = re.findall(r"SOAK done (\S+) (\d+) (\w{64})", text)
    result.rounds = {name: int(rounds) for name, rounds, _ in done}
    for name in ("vda", "vdb", *(f"{net}.1" for net in NETS)):
        if result.rounds.get(name, 0) < 1:
            result.problems.append(f"{name}: no round came to its end")
    sums = {name: digest for name, _, digest in done}
    for name, image in zip(("vda", "vdb"), images, strict=True):
        if name in sums and not _holds_file(image, result.rounds[name], sums[name]):
            result.problems.append(f"{name}: its image does not hold what the guest wrote")


def _holds_file(image: Path, rounds: int, digest: str) -> bool:
    """Whether the image has the file in every slot that was written."""
    data = image.read_bytes()
    slots = min(rounds, DISK_BYTES // FILE_BYTES)
    return all(
        hashlib.sha256(data[at : at + FILE_BYTES]).hexdigest() == digest
        for at in range(0, slots * FILE_BYTES, FILE_BYTES)
    )


def _judge_holdings(result: Soak) -> None:
    """The first interval may still warm up; connections come and go, a few at a time."""
    if len(result.held) < 2:
        return
    first, *rest = result.held
    worst = max(rest, key=lambda h: h.anonymous_kib).anonymous_kib
    if worst - first.anonymous_kib > MEMORY_GROWTH_MAX_KIB:
        result.problems.append(f"memory grew from {first.anonymous_kib} to {worst} KiB")
    if len({h.threads for h in result.held}) > 1:
        result.problems.append(f"threads changed: {[h.threads for h in result.held]}")
    descriptors = [h.descriptors for h in result.held]
    if max(descriptors) - min(descriptors) > 2 * len(NETS):
        result.problems.append(f"descriptors changed: {descriptors}")


def main() -> int:
    """Say what happens on stderr; 0 when all is well."""
    parser = argparse.ArgumentParser(prog="scripts/soak")
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--interval", type=float, default=10.0, metavar="SECONDS")
    parser.add_argument("--cpus", type=int, default=2)
    parser.add_argument("--io-threads", type=int, default=0)
    parser.add_argument("--transport", choices=("pci", "mmio"), default="pci")
    asked = parser.parse_args()

    def say(text: str) -> None:
        print(f"soak: {text}", file=sys.stderr, flush=True)

    try:
        kit = Kit.find()
        with tempfile.TemporaryDirectory(prefix="avmm-soak.") as folder:
            result = run(
                soak(
                    kit.kernel,
                    kit.initrd,
                    Path(folder),
                    seconds=asked.minutes * 60,
                    interval_s=asked.interval,
                    say=say,
                    cpus=asked.cpus,
                    io_threads=asked.io_threads,
                    transport=asked.transport,
                )
            )
    except (AvmmError, TimeoutError) as e:
        say(f"failed: {e or 'the guest did not come to its end'}")
        return 1
    say(f"{result.seconds:.0f} s, rounds of {FILE_BYTES // MIB} MiB each: {result.rounds}")
    for problem in result.problems:
        say(f"PROBLEM: {problem}")
    say("all is well" if not result.problems else f"{len(result.problems)} problems")
    return 1 if result.problems else 0


if __name__ == "__main__":
    sys.exit(main())
