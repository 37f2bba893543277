"""The machine the guest sees: CPUs, memory, clock."""

from __future__ import annotations

import re
import time

import pytest

from avmm.units import GIB, MIB
from linux.guest import Guests, emulated_in_threads

SHAPE = """
grep -E '^(processor|physical id|core id|cpu cores|siblings)' /proc/cpuinfo
grep 'System RAM' /proc/iomem
grep MemTotal /proc/meminfo
echo "FACT clock $(cat /sys/devices/system/clocksource/clocksource0/current_clocksource)"
"""
HIGH = """
free() { awk '/zone +Normal/ { n = 1 } n && /pages free/ { print $3; exit }' /proc/zoneinfo; }
mount -t tmpfs -o size=90% tmpfs /mnt
a=$(free)
echo "FACT written $(head -c 16777216 /dev/urandom | tee /mnt/f | sha256sum)"
echo "FACT used $((a - $(free)))"
echo "FACT read $(sha256sum </mnt/f)"
"""


def ram_ranges(text: str) -> list[tuple[int, int]]:
    """First and last byte of each range in /proc/iomem."""
    found = re.findall(r"^([0-9a-f]+)-([0-9a-f]+) : System RAM", text, re.MULTILINE)
    return [(int(first, 16), int(last, 16)) for first, last in found]


@pytest.mark.parametrize(("cpus", "memory"), [(1, 128 * MIB), (2, 512 * MIB), (4, 5 * GIB)])
async def test_guest_sees_its_cpus_as_one_package_and_its_memory(
    guests: Guests, cpus: int, memory: int
) -> None:
    guest = await guests.boot(SHAPE, cpus=cpus, memory=memory)

    def column(name: str) -> list[str]:
        return re.findall(rf"^{name}\s*: (\d+)$", guest.text, re.MULTILINE)

    assert column("processor") == [str(cpu) for cpu in range(cpus)]
    assert set(column("physical id")) == {"0"}
    assert sorted(column("core id")) == [str(cpu) for cpu in range(cpus)]
    assert set(column("cpu cores")) == set(column("siblings")) == {str(cpus)}

    ranges = ram_ranges(guest.text)
    total = sum(last + 1 - first for first, last in ranges)
    assert memory - 2 * MIB < total <= memory
    available = int(re.findall(r"^MemTotal: +(\d+) kB", guest.text, re.MULTILINE)[0]) * 1024
    assert memory * 0.55 < available < memory
    assert guest.fact("clock") == "kvm-clock"
    assert any(first == 4 * GIB for first, _ in ranges) is (memory > 4 * GIB)


async def test_memory_above_4_gib_is_used_and_keeps_its_bytes(guests: Guests) -> None:
    guest = await guests.boot(HIGH, cpus=1 if emulated_in_threads() else 4, memory=5 * GIB)
    assert int(guest.fact("used")) * 4096 > 15 * MIB
    assert guest.fact("read") == guest.fact("written")


async def test_guest_has_entropy_and_the_right_time(guests: Guests) -> None:
    script = """
        echo "FACT source $(cat /sys/class/misc/hw_random/rng_current)"
        for i in 1 2; do echo "FACT random $(head -c 4096 /dev/hwrng | sha256sum)"; done
        echo "FACT bytes $(head -c 4096 /dev/hwrng | wc -c)"
        echo "FACT date $(date +%s)"
        echo "FACT rtc $(cat /sys/class/rtc/rtc0/since_epoch)"
        echo TOLD"""
    async with guests.running(script, rng=True) as guest:
        await guest.says("TOLD")
        now = time.time()
        await guest.ended()
    assert guest.status == 0
    assert guest.fact("source").startswith("virtio_rng")
    assert guest.fact("bytes") == "4096"
    first, second = guest.facts("random")
    assert first != second
    assert abs(int(guest.fact("date")) - now) < 5
    assert abs(int(guest.fact("rtc")) - now) < 5
