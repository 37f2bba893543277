"""Three microVMs and a host in Python on one switch in this process: no TAP, no root.

Usage: python examples/three_vms.py KERNEL INITRD

The initial RAM disk must give a shell on the console, and understand the kernel's ip= (or set up
eth0 by itself). Each guest pings the Python host and sends a megabyte over TCP to the next guest;
all of it is in three_vms.pcap afterwards. One guest's link is slow.
"""

from __future__ import annotations

import asyncio
import ipaddress
import struct
import sys

import avmm

GUESTS = 3
HOST = ipaddress.IPv4Address("10.9.0.1")
MEGABYTE = 1_000_000
SHELL_LIMIT_S = 300.0


async def main(kernel: str, initrd: str, capture: str = "three_vms.pcap") -> list[int]:
    """How many bytes each guest got from another."""
    nics = [avmm.Nic(guest=f"10.9.0.{n + 2}/24") for n in range(GUESTS)]
    with avmm.Switch() as switch, switch.capture(capture):
        host = switch.port()
        for nic in nics[1:]:
            switch.attach(nic)
        switch.attach(nics[0], delay_s=0.005, jitter_s=0.001)
        async with asyncio.TaskGroup() as group:
            answering = group.create_task(be_a_host(host))
            received = await run_guests(kernel, initrd, nics)
            answering.cancel()
        print(switch.statistics())
    if received != [MEGABYTE] * GUESTS:
        raise RuntimeError(f"the guests received {received} bytes")
    return received


async def run_guests(kernel: str, initrd: str, nics: list[avmm.Nic]) -> list[int]:
    configs = [avmm.Config(kernel=kernel, initrd=initrd, nets=[nic]) for nic in nics]
    async with (
        avmm.MicroVM(configs[0]) as one,
        avmm.MicroVM(configs[1]) as two,
        avmm.MicroVM(configs[2]) as three,
    ):
        vms = [one, two, three]
        await asyncio.gather(*(shell(vm, f"ping -c 2 -W 10 {HOST}") for vm in vms))
        listen = "mkfifo /hold; nc -l -p 7 <>/hold >/got & sleep 1"
        await asyncio.gather(*(shell(vm, listen) for vm in vms))
        await asyncio.gather(
            *(
                shell(vm, f"head -c {MEGABYTE} /dev/zero | nc 10.9.0.{(n + 1) % GUESTS + 2} 7")
                for n, vm in enumerate(vms)
            )
        )
        sizes = [await shell(vm, "wait; wc -c </got") for vm in vms]
        return [int(text.split()[-1]) for text in sizes]


async def shell(vm: avmm.MicroVM, command: str) -> str:
    """Run a command in the shell on a guest's console; what it printed."""
    await vm.console.expect(rb"# (\x1b\[6n)?$", timeout=SHELL_LIMIT_S)
    await vm.console.write(f"{command}; echo status $?.\n".encode())
    match = await vm.console.expect(rb"(?s)\?\.\r?\n(.*?)status (\d+)\.", timeout=SHELL_LIMIT_S)
    if int(match[2]) != 0:
        raise RuntimeError(f"{command}: status {int(match[2])}")
    return match[1].decode()


async def be_a_host(port: avmm.Port) -> None:
    """Answer ARP and ping for HOST."""
    own = bytes.fromhex(port.mac.replace(":", ""))
    async for frame in port:
        kind, packet = frame[12:14], frame[14:]
        if kind == b"\x08\x06" and packet[6:8] == b"\0\1" and packet[24:28] == HOST.packed:
            reply = packet[:6] + b"\0\2" + own + HOST.packed + packet[8:18]
        elif kind == b"\x08\0" and packet[9] == 1 and packet[16:20] == HOST.packed:
            size = int.from_bytes(packet[2:4], "big")
            at = (packet[0] & 15) * 4
            if packet[at] != 8:  # no echo request
                continue
            header = packet[:12] + packet[16:20] + packet[12:16] + packet[20:at]
            echo = b"\0\0\0\0" + packet[at + 4 : size]
            reply = header + echo[:2] + struct.pack("<H", checksum(echo)) + echo[4:]
        else:
            continue
        await port.send(frame[6:12] + own + kind + reply)


def checksum(data: bytes) -> int:
    """Of the Internet protocols (RFC 1071), in little-endian order."""
    if len(data) % 2:
        data += b"\0"
    total: int = sum(struct.unpack(f"<{len(data) // 2}H", data))
    while total > 0xFFFF:
        total = (total & 0xFFFF) + (total >> 16)
    return total ^ 0xFFFF


if __name__ == "__main__":
    print(asyncio.run(main(*sys.argv[1:3])))
