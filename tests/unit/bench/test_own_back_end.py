"""Our vhost-user back-end, a process of its own, under the driver of the benchmark."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from avmm.bench import blk_native
from avmm.bench.back_end import BackEnd
from avmm.bench.front_end import F_EVENT_IDX, F_INDIRECT_DESC, F_RING_PACKED
from avmm.bench.load import BlkWork, run_blk
from avmm.bench.record import OWN
from avmm.units import KIB, MIB

pytestmark = pytest.mark.slow  # starting a Python process

DISK_BYTES = 4 * MIB
WRITES = BlkWork(4 * KIB, 16, write=True, sequential=True)
READS = BlkWork(16 * KIB, 8)


@pytest.fixture
def back_end(tmp_path: Path) -> Iterator[BackEnd]:
    disk, path = tmp_path / "disk.img", str(tmp_path / "blk.sock")
    disk.write_bytes(bytes(DISK_BYTES))
    with BackEnd(OWN, blk_native.own_command(path, str(disk)), path) as running:
        yield running


@pytest.mark.parametrize("packed", [0, F_RING_PACKED], ids=["split", "packed"])
def test_what_is_written_is_read_back_by_every_kind_of_driver(
    back_end: BackEnd, tmp_path: Path, packed: int
) -> None:
    run_blk(
        back_end,
        WRITES,
        span_bytes=DISK_BYTES,
        requests=DISK_BYTES // WRITES.block_bytes,
        features=packed,
    )
    stamped = tmp_path / "expected"
    blk_native.fill(str(stamped), DISK_BYTES)
    written, expected = (tmp_path / "disk.img").read_bytes(), stamped.read_bytes()
    assert all(written[at : at + 8] == expected[at : at + 8] for at in range(0, DISK_BYTES, 512))
    for features in (0, F_EVENT_IDX, F_INDIRECT_DESC, F_EVENT_IDX | F_INDIRECT_DESC):
        for polling in (False, True):
            work = BlkWork(READS.block_bytes, READS.depth, polling=polling)
            run = run_blk(
                back_end,
                work,
                span_bytes=DISK_BYTES,
                requests=500,
                verify=True,
                features=features | packed,
            )
            assert run.rate > 0
            assert run.cpu_s_per_request is not None


def test_several_queues_are_served_at_once(back_end: BackEnd) -> None:
    queues = blk_native.queues_max(back_end)
    assert queues == blk_native.QUEUES_MAX
    blk_native.fill(str(Path(back_end.path).parent / "disk.img"), DISK_BYTES)
    work = BlkWork(4 * KIB, 32, queues)
    run_blk(back_end, work, span_bytes=DISK_BYTES, requests=2000, verify=True)
