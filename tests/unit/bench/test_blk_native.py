"""The native block suite, but for its measuring."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from avmm.bench import back_end, blk_native
from avmm.bench.load import BlkWork, Run, costs
from avmm.bench.record import LIMIT, Aim, Costs
from avmm.errors import HostError
from avmm.native import lib
from avmm.units import KIB, MIB


def test_the_rows_are_the_promised_ones_each_once() -> None:
    rows = blk_native.rows()
    names = [row.name for row in rows]
    assert len(set(names)) == len(names)
    for kind in ("randread", "randwrite"):
        for depth in (1, 4, 32, 128):
            assert f"4k {kind} QD{depth} 1 queue event" in names
            assert f"4k {kind} QD{depth} 1 queue polled" in names
            assert f"4k {kind} QD{depth} 2 queues event" in names
    assert "256k seqread QD8 1 queue event" in names


def test_the_rows_with_a_target_have_it() -> None:
    rows = {row.name: row for row in blk_native.rows()}
    peer = blk_native.PEER
    assert rows["4k randread QD32 1 queue event"].aims == (Aim(peer, 1.5), Aim(LIMIT, 0.75))
    assert rows["4k randread QD32 1 queue event"].cpu_aim == 0.8
    assert rows["4k randread QD1 1 queue polled"].aims == (Aim(peer, 1.5),)
    assert rows["4k randwrite QD32 1 queue event"].aims == (Aim(peer, 1.5),)
    assert rows["256k seqread QD8 1 queue event"].aims == (Aim(peer, 1.1),)
    assert rows["4k randread QD128 1 queue event"].aims == ()


def test_a_filled_file_bears_its_stamps(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    blk_native.fill(str(path), 1 * MIB)
    data = path.read_bytes()
    assert len(data) == 1 * MIB
    for sector in (0, 1, 2047):
        stamp = int.from_bytes(data[512 * sector :][:8], "little")
        assert stamp == lib.av_load_stamp(sector)


def test_costs_are_medians_of_what_was_measured() -> None:
    runs = [Run(1.0, cpu_s_per_request=value) for value in (1.0, 5.0, 2.0)]
    assert costs(runs) == Costs(cpu_s_per_request=2.0)


def test_requests_have_room_for_their_data_and_their_notes() -> None:
    assert BlkWork(4 * KIB, 32).room_bytes == 4096 + 32 * 4096
    assert BlkWork(512, 128).room_bytes == 8192 + 128 * 4096


def test_a_back_end_that_ends_at_once_says_why(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "import sys; sys.exit('no such disk')"]
    with pytest.raises(HostError, match="Starting it: no such disk"):
        back_end.BackEnd("it", command, str(tmp_path / "s"))


def test_a_missing_tool_is_named_with_its_package() -> None:
    with pytest.raises(HostError, match="apt-get install nothing"):
        back_end.tool("no-such-tool", "nothing")
