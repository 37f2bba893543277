"""The serial console, a console on virtio and its ports, at speed, both ways."""

from __future__ import annotations

import asyncio
import hashlib
import os
import re

import pytest

import avmm
from avmm.units import KIB, MIB
from linux.guest import BOOT_LIMIT_S, Guests, emulated_cpu

# Each byte is an exit of the guest or two: an emulated CPU needs a minute for 1 MiB.
BYTES = 64 * KIB if emulated_cpu() else MIB

SCRIPT = f"""
stty raw -echo
echo READY
head -c {BYTES} | sha256sum >/pasted
head -c {BYTES} /dev/urandom >/given
printf 'BEGIN:'
cat /given
stty sane
echo
echo "FACT pasted $(cut -d ' ' -f 1 /pasted)"
echo "FACT given $(sha256sum </given | cut -d ' ' -f 1)"
"""


async def test_paste_and_bulk_output_arrive_whole(guests: Guests) -> None:
    paste = os.urandom(BYTES)
    async with guests.running(SCRIPT) as guest:
        await guest.says("READY")
        await guest.vm.console.write(paste)
        await guest.ended()
    assert guest.status == 0
    assert guest.fact("pasted") == hashlib.sha256(paste).hexdigest()
    begin = re.search(rb"BEGIN:", guest.output)
    assert begin is not None
    given = bytes(guest.output[begin.end() : begin.end() + BYTES])
    assert guest.fact("given") == hashlib.sha256(given).hexdigest()


PORT_BYTES = 10 * MIB

PORTS = f"""
stty -F /dev/hvc0 raw -echo
while [ "$(stty -F /dev/hvc0 size)" != '41 99' ]; do echo >/dev/hvc0; sleep 0.1; done
echo "SIZE 41 99" >/dev/hvc0
setsid sh -c 'exec sh -i <>/dev/hvc0 >&0 2>&1' &
shell=$!
mkdir -p /dev/virtio-ports
for entry in /sys/class/virtio-ports/*; do
    ln -s "/dev/${{entry##*/}}" "/dev/virtio-ports/$(cat "$entry/name")"
done
head -c {PORT_BYTES} /dev/urandom >/given
cat /given >/dev/virtio-ports/up
head -c {PORT_BYTES} </dev/virtio-ports/down | sha256sum >/taken
echo "FACT given $(sha256sum </given | cut -d ' ' -f 1)"
echo "FACT taken $(cut -d ' ' -f 1 /taken)"
wait $shell
"""


@pytest.mark.parametrize("transport", ["pci", pytest.param("mmio", marks=pytest.mark.variant)])
async def test_a_shell_on_hvc0_and_ten_megabytes_each_way_through_ports(
    guests: Guests, transport: str
) -> None:
    config = {"console": True, "ports": avmm.Ports(["up", "down"]), "transport": transport}
    async with guests.running(PORTS, **config) as guest:
        vm, console = guest.vm, guest.vm.console
        console.resize(99, 41)
        await console.expect(b"SIZE 41 99", timeout=BOOT_LIMIT_S)
        # Before the guest reads it: a port that is not open here is at its end for Linux.
        opening = asyncio.create_task(vm.port("down").open())
        reader, _ = await vm.port("up").open()
        digest = hashlib.sha256()
        while data := await reader.read(MIB):
            digest.update(data)
        down = os.urandom(PORT_BYTES)
        _, writer = await opening
        writer.write(down)
        await writer.drain()
        await console.write(b"echo $((6 * 7)); exit\n")
        await console.expect(rb"42\r?\n", timeout=BOOT_LIMIT_S)
        writer.close()
        await guest.ended()
    assert guest.status == 0
    assert guest.fact("given") == digest.hexdigest()
    assert guest.fact("taken") == hashlib.sha256(down).hexdigest()
