"""virtio-pci as stock kernels see it: functions, vectors, a vector that moves, drivers that go."""

from __future__ import annotations

from pathlib import Path

import pytest

from avmm import Disk, Tap
from avmm.units import MIB
from linux.guest import Guests
from linux.host import random_file

HOST, GUEST = "172.31.9.1", "172.31.9.2"

LOOK = f"""
sum() {{ head -c 4194304 /dev/vda | sha256sum | cut -d ' ' -f 1; }}
vector() {{ sed -n "s/^ *\\([0-9]*\\):.*$1\\$/\\1/p" /proc/interrupts; }}
count() {{ awk -v n="$1" '$NF ~ n {{ sum += $2 + $3 }} END {{ print sum + 0 }}' /proc/interrupts; }}
for d in /sys/bus/pci/devices/*; do
    echo "FACT function $(cd $d && echo ${{d##*/}} $(cat vendor device class))"
done
echo "FACT sum $(sum)"
ping -c 2 -W 10 {HOST} >/dev/null && echo "FACT ping ok"
head -c 64 /dev/hwrng >/dev/null
for name in $(awk '/PCI-MSI/ {{ print $NF }}' /proc/interrupts); do echo "FACT vector $name"; done
echo "FACT disk $(count virtio0-req)"
for cpu in 2 1 2; do echo $cpu >/proc/irq/$(vector virtio1-input.0)/smp_affinity; done
before=$(count virtio1-input.0)
ping -c 2 -W 10 {HOST} >/dev/null
echo "FACT moved $(cat /proc/irq/$(vector virtio1-input.0)/effective_affinity)"
echo "FACT more $(($(count virtio1-input.0) - before))"
cd /sys/bus/pci
echo 0000:00:01.0 >drivers/virtio-pci/unbind
[ ! -e /dev/vda ] && echo "FACT gone yes"
echo 0000:00:01.0 >drivers/virtio-pci/bind
echo "FACT sum $(sum)"
echo 1 >devices/0000:00:01.0/remove
echo 1 >rescan
echo "FACT sum $(sum)"
dmesg | grep -iE "(pci|virtio).*(can't|fail|conflict|no space|not claimed|broken|timeout)" |
    while read -r line; do echo "FACT complaint $line"; done
"""

FUNCTIONS = [
    "0000:00:00.0 0x1b36 0x0008 0x060000",
    "0000:00:01.0 0x1af4 0x1042 0x018000",
    "0000:00:02.0 0x1af4 0x1041 0x020000",
    "0000:00:03.0 0x1af4 0x1044 0xff0000",
]
VECTORS = {
    *("virtio0-config", "virtio0-req.0", "virtio0-req.1"),
    *("virtio1-config", "virtio1-input.0", "virtio1-output.0"),
    *("virtio2-config", "virtio2-input"),
}


@pytest.mark.parametrize("flavour", ["cloud", pytest.param("generic", marks=pytest.mark.variant)])
async def test_each_queue_has_its_vector_wherever_the_driver_goes(
    guests: Guests, tmp_path: Path, flavour: str
) -> None:
    image = tmp_path / "disk.img"
    random_file(image, 4 * MIB)
    guest = await guests.boot(
        LOOK,
        flavour=flavour,
        transport="pci",
        cpus=2,
        disks=[Disk(str(image), read_only=True)],
        nets=[Tap("avmmt0", host=f"{HOST}/24", guest=GUEST)],
        rng=True,
    )
    assert guest.facts("function") == FUNCTIONS
    assert set(guest.facts("vector")) >= VECTORS
    assert guest.fact("ping") == "ok"
    assert guest.fact("gone") == "yes"
    assert int(guest.fact("moved"), 16) == 2
    assert int(guest.fact("disk")) > 0
    assert int(guest.fact("more")) > 0
    assert len(guest.facts("sum")) == 3
    assert len(set(guest.facts("sum"))) == 1
    assert guest.facts("complaint") == []
    statistics = guest.vm.statistics()
    assert {name: device.ignored for name, device in statistics.devices.items()} == {
        "blk0": 0,
        "net0": 0,
        "rng0": 0,
    }
    # Most of a boot's register accesses are PCI configuration, which is no work for Python.
    assert sum(v.registers for v in statistics.vcpus) > 2 * sum(v.mmio for v in statistics.vcpus)
