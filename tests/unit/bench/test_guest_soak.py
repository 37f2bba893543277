"""How a soak is judged, and what its guest is told to do."""

from __future__ import annotations

import base64
import hashlib
import subprocess
from pathlib import Path

import pytest

from avmm.bench.guest import soak
from avmm.bench.guest.soak import DISK_BYTES, FILE_BYTES, Held, Soak

FILE = hashlib.shake_128(b"soak").digest(FILE_BYTES)
SUM = hashlib.sha256(FILE).hexdigest()


@pytest.fixture
def images(tmp_path: Path) -> list[Path]:
    paths = [tmp_path / "a.img", tmp_path / "b.img"]
    for path in paths:
        path.write_bytes(FILE * 3 + bytes(DISK_BYTES - 3 * FILE_BYTES))
    return paths


def said(vda: int = 3, vdb: int = 2, extra: str = "") -> str:
    rounds = {"vda": vda, "vdb": vdb, "172.31.81.1": 4, "172.31.82.1": 5}
    lines = [f"SOAK done {name} {n} {SUM}\r" for name, n in rounds.items()]
    return "\n".join([*lines, extra])


def problems(text: str, images: list[Path]) -> list[str]:
    result = Soak()
    soak._judge_data(result, text, images)
    return result.problems


def test_data_that_is_right_is_no_problem(images: list[Path]) -> None:
    assert problems(said(), images) == []


def test_what_the_guest_read_wrongly_is_a_problem(images: list[Path]) -> None:
    assert problems(said(extra="SOAK bad vdb 7\n"), images) == ["SOAK bad vdb 7"]


def test_an_image_without_what_was_written_is_a_problem(images: list[Path]) -> None:
    assert problems(said(vda=4), images) == ["vda: its image does not hold what the guest wrote"]


def test_a_load_that_never_came_around_is_a_problem(images: list[Path]) -> None:
    text = said().replace("SOAK done 172.31.82.1", "SOAK lost 172.31.82.1")
    assert problems(text, images) == ["172.31.82.1: no round came to its end"]


@pytest.mark.parametrize(
    ("last", "problem"),
    [
        (Held(1000 + 4096, 42, 5), None),
        (Held(1000 + 9000, 40, 5), "memory grew from 1000 to 10000 KiB"),
        (Held(1000, 40, 6), "threads changed: [5, 5, 6]"),
        (Held(1000, 45, 5), "descriptors changed: [40, 40, 45]"),
    ],
)
def test_what_the_process_holds_has_to_stay(last: Held, problem: str | None) -> None:
    result = Soak(held=[Held(1000, 40, 5), Held(1200, 40, 5), last])
    soak._judge_holdings(result)
    assert result.problems == ([problem] if problem else [])


def test_this_process_holds_something() -> None:
    now = soak.held()
    assert now.anonymous_kib > 1000
    assert now.descriptors >= 3
    assert now.threads >= 1


def test_the_script_is_shell_and_fits_a_command_line() -> None:
    text = soak.script(600)
    assert len(base64.b64encode(text.encode())) < 1500
    subprocess.run(["sh", "-n"], input=text, text=True, check=True)
