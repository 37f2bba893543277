"""Disks: a root file system, data both ways, read-only, discard."""

from __future__ import annotations

from pathlib import Path

import pytest

from avmm import Disk, ExitKind
from avmm.units import MIB
from avmm.virtio import features
from linux.guest import Guests
from linux.host import assert_clean, random_file, read_from_ext4, sha256

DATA_BYTES = 64 * MIB
RING_PACKED_BIT = features.RING_PACKED.bit_length() - 1
PART_BYTES, PIECE_BYTES = 8 * MIB, 65536
PIECES = PART_BYTES // PIECE_BYTES
HOLE_START_BYTES, HOLE_BYTES = 4 * MIB, 8 * MIB

DATA = f"""
sum() {{ sha256sum | cut -d ' ' -f 1; }}
cd /sys/block
echo "FACT sizes $(cat vda/size vdb/size vdc/size | xargs)"
echo "FACT packed $(cut -c {RING_PACKED_BIT + 1} vda/device/features)"
echo "FACT serial $(cat vda/serial)"
echo "FACT ro $(cat vda/ro vdb/ro | xargs)"
echo "FACT in $(sum </dev/vdb)"
dd if=/dev/vda of=/dev/vdb bs=4096 count=1 2>/dev/null && echo "FACT refused no"
head -c {DATA_BYTES} /dev/urandom >/data
echo "FACT out $(sum </data)"
dd if=/data of=/dev/vda bs=1M 2>/dev/null && rm /data
sync
echo 3 >/proc/sys/vm/drop_caches
echo "FACT again $(sum </dev/vda)"
blkdiscard -o {HOLE_START_BYTES} -l {HOLE_BYTES} /dev/vdc && echo "FACT discarded yes"
"""

QUEUES = f"""
echo "FACT queues $(ls /sys/block/vda/mq | xargs)"
cd /sys/block/vda/queue
echo "FACT block $(cat logical_block_size physical_block_size minimum_io_size | xargs)"
write() {{
    head -c {PART_BYTES} /dev/urandom >/part$1
    taskset $(($1 % 2 + 1)) dd if=/part$1 of=/dev/vda bs={PIECE_BYTES} \\
        seek=$(($1 * {PIECES})) conv=notrunc,fsync 2>/dev/null
}}
check() {{
    taskset $((2 - $1 % 2)) dd if=/dev/vda bs={PIECE_BYTES} skip=$(($1 * {PIECES})) \\
        count={PIECES} 2>/dev/null | cmp - /part$1 && echo "FACT same $1"
}}
for i in 0 1 2 3; do write $i & done; wait
echo "FACT wrote $(cat /part0 /part1 /part2 /part3 | sha256sum | cut -d ' ' -f 1)"
echo 3 >/proc/sys/vm/drop_caches
for i in 0 1 2 3; do check $i & done; wait
"""


async def test_root_file_system_is_used_and_left_clean(guests: Guests, root_disk: Path) -> None:
    script = """
        echo "FACT root $(awk '$2 == "/" { print $1, $3 }' /proc/mounts)"
        mkdir /made && cd /made
        for i in $(seq 200); do echo "$i" >"file$i"; done
        rm file1?? && mv file7 seven
        head -c 8388608 /dev/urandom >data && sha256sum <data >sum"""
    disks = [Disk(str(root_disk))]
    guest = await guests.boot(script, disks=disks, append="root=/dev/vda")
    assert guest.kind is ExitKind.POWEROFF
    assert guest.fact("root").endswith("ext4")
    assert_clean(root_disk)
    assert read_from_ext4(root_disk, "/made/seven") == b"7\n"
    data = root_disk.with_name("data")
    data.write_bytes(read_from_ext4(root_disk, "/made/data"))
    assert read_from_ext4(root_disk, "/made/sum").split()[0].decode() == sha256(data)


@pytest.mark.parametrize(
    ("engine", "ring", "transport"),
    [
        pytest.param("io_uring", "packed", "pci", marks=pytest.mark.variant),
        ("threads", "split", "mmio"),
    ],
)
async def test_data_is_the_same_on_both_sides(
    guests: Guests, tmp_path: Path, engine: str, ring: str, transport: str
) -> None:
    written, given, holed = (tmp_path / name for name in ("written", "given", "holed"))
    with written.open("wb") as file:
        file.truncate(DATA_BYTES)
    given_sum = random_file(given, DATA_BYTES)
    random_file(holed, 16 * MIB)
    before, blocks = holed.read_bytes(), holed.stat().st_blocks
    disks = [
        Disk(str(written), serial="written-by-guest", engine=engine),
        Disk(str(given), read_only=True, engine=engine),
        Disk(str(holed), engine=engine),
    ]
    shape = {"cpus": 2, "memory": "512M", "ring": ring, "transport": transport}
    guest = await guests.boot(DATA, disks=disks, **shape)
    assert guest.fact("packed") == str(int(ring == "packed"))

    sectors = [size // 512 for size in (DATA_BYTES, DATA_BYTES, 16 * MIB)]
    assert guest.fact("sizes") == " ".join(map(str, sectors))
    assert guest.fact("serial") == "written-by-guest"
    assert guest.fact("in") == given_sum
    assert guest.fact("out") == guest.fact("again") == sha256(written)

    assert guest.fact("ro") == "0 1"
    assert guest.facts("refused") == []
    assert sha256(given) == given_sum

    assert guest.fact("discarded") == "yes"
    end = HOLE_START_BYTES + HOLE_BYTES
    after = holed.read_bytes()
    assert after[:HOLE_START_BYTES] == before[:HOLE_START_BYTES]
    assert not any(after[HOLE_START_BYTES:end])
    assert after[end:] == before[end:]
    assert (blocks - holed.stat().st_blocks) * 512 >= HOLE_BYTES


async def test_each_vcpu_has_a_queue_of_its_own(guests: Guests, tmp_path: Path) -> None:
    path = tmp_path / "disk.img"
    with path.open("wb") as file:
        file.truncate(4 * PART_BYTES)
    guest = await guests.boot(QUEUES, disks=[Disk(str(path))], cpus=2, io_threads=2, memory="512M")
    assert guest.fact("queues") == "0 1"
    assert guest.fact("block") == f"512 4096 {path.stat().st_blksize}"
    assert guest.fact("wrote") == sha256(path)
    assert sorted(guest.facts("same")) == ["0", "1", "2", "3"]
    statistics = guest.vm.statistics()
    assert all(queue.chains > 0 for queue in statistics.devices["blk0"].queues)
    assert all(home.runs > 0 for home in statistics.homes[1:])
