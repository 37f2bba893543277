"""A program whose isolated microVM has a NIC on a TAP: python -m fakes.isolated_nic KERNEL

In a network namespace of its own; exit status 77: there can be none here. The kernel takes one
frame and prints its payload; what it printed is printed.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import socket
import sys
from pathlib import Path

import avmm
from avmm.hostnet.tap import TUN_PATH

NAME = "avt0"
TYPE = 0x88B5  # for experiments
CANNOT = 77
_CLONE_NEWNET = 0x40000000


async def main(kernel: str) -> None:
    nic = avmm.Tap(NAME, host="10.99.0.1/24", rx_limit=avmm.RateLimit(ops=1000))
    config = avmm.Config(kernel=kernel, memory="4M", cmdline="", nets=[nic], io_threads=1)
    vm = avmm.MicroVM(config, isolation="process")
    events = vm.events()
    async with vm:
        vm.set_nic_limits("net0", rx=None, tx=avmm.RateLimit(bps="1M"))
        vm.set_link("net0", False)
        vm.set_link("net0", True)
        seen: list[avmm.Event] = []
        while len(seen) < 3:
            event = await anext(events)
            if isinstance(event, avmm.DriverReady | avmm.LinkChanged):
                seen.append(event)
        links = [event.up for event in seen if isinstance(event, avmm.LinkChanged)]
        assert links == [False, True], seen
        with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0) as wire:
            wire.bind((NAME, TYPE))
            wire.send(b"\xff" * 6 + b"\x02\0\0\0\0\1" + TYPE.to_bytes(2, "big") + b"by wire\0" * 8)
        await vm.wait()
        counters = vm.statistics().devices["net0"].counters
        print(vm.console.scrollback.decode(), counters["rx_packets"])
    assert NAME not in [name for _, name in socket.if_nameindex()]


if __name__ == "__main__":
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(_CLONE_NEWNET) != 0 or not os.access(TUN_PATH, os.R_OK | os.W_OK):
        raise SystemExit(CANNOT)
    # The kernel would look for neighbours before we send anything.
    for interfaces in ("default", "all"):
        with contextlib.suppress(FileNotFoundError):
            Path(f"/proc/sys/net/ipv6/conf/{interfaces}/disable_ipv6").write_text("1")
    asyncio.run(main(sys.argv[1]))
