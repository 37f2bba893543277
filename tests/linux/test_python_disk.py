"""Disks written in Python under stock kernels: ext4 on them, and what a faulty one does to it."""

from __future__ import annotations

from pathlib import Path

import pytest

from avmm import AsyncDisk, ExitKind
from avmm.block.objects import FaultRates, FaultyDisk, OverlayDisk, RamDisk
from avmm.block.source import read_from
from avmm.units import MIB
from linux.guest import Guests
from linux.host import assert_clean, read_from_ext4, sha256

FAULTY_BYTES = 16 * MIB
FILE_BYTES = 8 * MIB

SCRIPT = f"""
sum() {{ sha256sum | cut -d ' ' -f 1; }}
fill() {{
    mkdir "$1/made" && cd "$1/made" || exit 1
    for i in $(seq 200); do echo "$i" >"file$i"; done
    rm file1?? && mv file7 seven
    head -c {FILE_BYTES} /dev/urandom >data
    echo "FACT $2 $(sum <data)"
    cd /
}}
echo "FACT root $(awk '$2 == "/" {{ print $1, $3 }}' /proc/mounts)"
mkdir /over && mount -t ext4 /dev/vdb /over || exit 1
fill / ram & fill /over overlay; wait
dd if=/dev/zero of=/dev/vdc bs=4096 count=4 conv=fsync 2>/dev/null || echo "FACT wrote no"
dd if=/dev/vdd of=/dev/null bs=4096 count=1 2>/dev/null || echo "FACT read no"
sync
echo 3 >/proc/sys/vm/drop_caches
echo "FACT again $(sum </made/data) $(sum </over/made/data)"
dmesg | grep -c "I/O error" | sed 's/^/FACT errors /'
umount /over
"""


def loaded(image: Path) -> RamDisk:
    return RamDisk(image.stat().st_size, image.read_bytes())


@pytest.mark.parametrize(
    ("transport", "ring"),
    [("pci", "packed"), pytest.param("mmio", "split", marks=pytest.mark.variant)],
)
async def test_ext4_on_disks_written_in_python(
    guests: Guests, root_disk: Path, tmp_path: Path, transport: str, ring: str
) -> None:
    base_sum = sha256(root_disk)
    ram = loaded(root_disk)
    bad_writes = FaultyDisk(RamDisk(FAULTY_BYTES), FaultRates(write_error=1.0), seed=1)
    bad_reads = FaultyDisk(RamDisk(FAULTY_BYTES), FaultRates(read_error=1.0), seed=2)
    async with OverlayDisk(str(root_disk), str(tmp_path / "changes.cow")) as overlay:
        disks = [AsyncDisk(disk) for disk in (ram, overlay, bad_writes, bad_reads)]
        guest = await guests.boot(
            SCRIPT,
            disks=disks,
            append="root=/dev/vda",
            memory="512M",
            cpus=2,
            transport=transport,
            ring=ring,
        )
        changed = tmp_path / "changed.ext4"
        changed.write_bytes(await read_from(overlay, 0, overlay.size))
    assert guest.kind is ExitKind.POWEROFF
    assert guest.fact("root").endswith("ext4")

    written = tmp_path / "ram.ext4"
    written.write_bytes(ram.content)
    sums = []
    for image, name in ((written, "ram"), (changed, "overlay")):
        assert_clean(image)
        assert read_from_ext4(image, "/made/seven") == b"7\n"
        data = tmp_path / "data"
        data.write_bytes(read_from_ext4(image, "/made/data"))
        sums.append(sha256(data))
        assert guest.fact(name) == sums[-1]
    assert guest.fact("again") == " ".join(sums)
    assert sha256(root_disk) == base_sum, "the base is only read"

    assert guest.fact("wrote") == "no"
    assert guest.fact("read") == "no"
    assert int(guest.fact("errors")) >= 2
    assert bad_writes.counts["write_error"] > 0
    assert bad_reads.counts["read_error"] > 0
    counters = guest.vm.statistics().devices["blk0"].counters
    assert counters["writes"] > 0
    assert counters["flushes"] > 0
    assert counters["errors"] == counters["failed"] == 0
