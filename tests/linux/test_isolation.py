"""A stock guest in a worker process: every kind of device that it may have there."""

from __future__ import annotations

from pathlib import Path

import avmm
from linux.guest import Guests
from linux.host import assert_clean, read_from_ext4

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
