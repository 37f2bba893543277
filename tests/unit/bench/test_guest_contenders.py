"""Each contender's command line for the same machine, and what its guest is told to do."""

from __future__ import annotations

import base64
import io
import tarfile
from pathlib import Path

import pytest

from avmm.bench.guest import contenders, ground, rows, turns
from avmm.bench.guest.contenders import Contender, Disk, Machine
from avmm.bench.guest.kit import Kit
from avmm.bench.guest.meter import Sample
from avmm.bench.guest.session import Boundary
from avmm.bench.record import BEST, Aim
from avmm.bench.suite import Options
from avmm.cli.main import _parser
from avmm.cli.run import make_config
from avmm.errors import HostError
from avmm.virtio.devices.vsock import Vsock

MACHINE = Machine(
    Path("/k/vmlinuz"),
    Path("/k/initrd.img"),
    "console=ttyS0 quiet",
    2,
    512,
    (Disk(Path("/dev/nullb0"), direct=True), Disk(Path("/tmp/results.img"))),
    ("tapx",),
    Path("/tmp/vsock"),
)
QEMUS = (contenders.QEMU, contenders.QEMU_MICROVM, contenders.QEMU_VHOST)


def values(words: list[str], option: str) -> list[str]:
    return [words[at + 1] for at, word in enumerate(words) if word == option]


@pytest.mark.parametrize("own", [contenders.AVMM, contenders.AVMM_THREAD])
def test_our_own_command_is_a_configuration_of_the_machine(own: Contender) -> None:
    assert own.is_own
    words = own.command(MACHINE)
    assert words[1:3] == ["-m", "avmm"]
    config = make_config(_parser().parse_args(words[3:]))
    assert (config.kernel, config.initrd) == ("/k/vmlinuz", "/k/initrd.img")
    assert (config.cpus, config.memory, config.cmdline) == (2, "512M", "console=ttyS0 quiet")
    assert [(d.path, d.direct) for d in config.disks] == [
        ("/dev/nullb0", True),
        ("/tmp/results.img", False),
    ]
    assert [net.name for net in config.nets] == ["tapx"]
    assert isinstance(config.vsock, Vsock)
    assert (config.vsock.cid, config.vsock.uds) == (contenders.CID, "/tmp/vsock")
    assert config.io_threads == (1 if own is contenders.AVMM_THREAD else 0)


@pytest.mark.parametrize("qemu", QEMUS, ids=lambda c: c.name)
def test_qemu_boots_the_same_machine(qemu: Contender) -> None:
    words = qemu.command(MACHINE)
    for option, value in (
        *(("-kernel", "/k/vmlinuz"), ("-initrd", "/k/initrd.img"), ("-smp", "2"), ("-m", "512")),
        ("-append", "console=ttyS0 quiet"),
    ):
        assert values(words, option) == [value]
    first, second = values(words, "-drive")
    assert "file=/dev/nullb0" in first
    assert "cache=none,aio=io_uring" in first
    assert "file=/tmp/results.img" in second
    assert "cache=none" not in second
    disks = [d for d in values(words, "-device") if "virtio-blk" in d]
    assert ["iothread=io0" in d for d in disks] == [True, False]
    assert values(words, "-object") == ["iothread,id=io0"]
    vsock = [d for d in values(words, "-device") if "vsock" in d]
    assert [d.partition(",")[2] for d in vsock] == [f"guest-cid={contenders.CID}"]


def test_qemus_differ_in_machine_bus_and_vhost() -> None:
    q35, microvm, vhost = (qemu.command(MACHINE) for qemu in QEMUS)
    assert values(q35, "-M")[0].startswith("q35,")
    assert values(microvm, "-M")[0].startswith("microvm,")
    nics = [next(d for d in values(w, "-device") if "virtio-net" in d) for w in (q35, microvm)]
    assert nics[0].startswith("virtio-net-pci,")
    assert nics[1].startswith("virtio-net-device,")
    assert "vhost=off" in values(q35, "-netdev")[0]
    assert "vhost=on" in values(vhost, "-netdev")[0]
    assert values(microvm, "-global") == ["virtio-mmio.force-legacy=false"]
    assert values(q35, "-global") == []


def test_kvmtool_takes_part_when_there_is_a_binary(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.delenv("AVMM_KVMTOOL", raising=False)
    assert "AVMM_KVMTOOL" in (contenders.KVMTOOL.missing() or "")
    monkeypatch.setenv("AVMM_KVMTOOL", "/opt/lkvm")
    assert contenders.KVMTOOL.missing() is None
    words = contenders.KVMTOOL.command(MACHINE)
    assert words[:2] == ["/opt/lkvm", "run"]
    assert values(words, "--disk") == ["/dev/nullb0,direct", "/tmp/results.img"]
    assert values(words, "--network") == ["mode=tap,tapif=tapx,guest_mac=52:54:00:00:4b:01"]


def test_who_is_not_asked_for_stays_out_and_who_cannot_is_named() -> None:
    told: list[str] = []
    lame = Contender("lame", "qemu", lambda machine: [], lambda: "no leg")
    options = Options(peers=("qemu", "kvmtool"), leave_out=told.append)
    everybody = (contenders.AVMM, lame, contenders.QEMU_MICROVM)
    assert turns.taking_part(everybody, options) == [contenders.AVMM]
    assert told == ["lame: no leg"]


def test_the_guests_script_fits_a_kernel_command_line_and_holds_every_row() -> None:
    for group in (rows.BLK, rows.NET, rows.VSOCK):
        text = rows.cmdline(group, 2.5)
        assert len(text) < 2047 - 200
        script = base64.b64decode(text.rpartition("avmm.cmd=")[2]).decode().splitlines()
        assert script[0] == ". /bench/lib"
        assert script[-1] == "report"
        assert [line.split()[1] for line in script[1:-1]] == [row.key for row in group]
        assert ("ip=" in text) == (group is rows.NET)


def test_a_report_is_read_from_a_disk_larger_than_it(tmp_path: Path) -> None:
    disk = tmp_path / "results.img"
    ground.clear(disk)
    with pytest.raises(HostError, match="no report"):
        turns.read_report(disk)
    with disk.open("r+b") as file, tarfile.open(fileobj=file, mode="w") as archive:
        entry = tarfile.TarInfo("./ping")
        entry.size = 5
        archive.addfile(entry, io.BytesIO(b"hello"))
    assert disk.stat().st_size == ground.RESULTS_BYTES
    assert turns.read_report(disk) == {"ping": "hello"}


def test_a_row_is_charged_with_what_happened_between_its_boundaries() -> None:
    row = next(row for row in rows.NET if row.key == "pup")
    queue = {"kicks": 7}
    own = [
        {"devices": {"net0": {"type": "net", "queues": [queue, {"kicks": n}]}}} for n in (100, 300)
    ]
    before = Boundary("", 0, Sample(1.0, 5000), own[0])
    after = Boundary("pup", 0, Sample(3.0, 5500), own[1])
    files = {
        "pup": '{"sent": 1200, "received": 1000, "ns": 500000000}',
        "pup.before": " 25:   10  IO-APIC 16-edge  virtio0\n",
        "pup.after": " 25:  110  IO-APIC 16-edge  virtio0\n",
    }
    measured = turns._measure(row, files, before, after)
    assert measured.reading.value == 2000
    costs = measured.costs
    assert costs.cpu_s_per_request == pytest.approx(0.002)
    assert costs.kicks_per_request == pytest.approx(0.2)
    assert costs.interrupts_per_request == pytest.approx(0.1)
    assert costs.exits_per_request == pytest.approx(0.5)
    with pytest.raises(ValueError, match="status 143"):
        turns._measure(row, files, before, Boundary("pup", 143, after.sample))


def test_results_become_a_case_of_those_who_ran() -> None:
    results = turns.Results()
    row = rows.BLK[0]
    assert results.case("s", row, {"avmm": "avmm"}, []) is None
    costs = turns.Costs(kicks_per_request=1.0)
    for value in (10.0, 30.0):
        results.add("avmm", row.key, turns.Measured(turns.Reading(value), costs))
    series = {"avmm": "avmm", "qemu": "qemu"}
    case = results.case("s", row, series, [Aim(BEST, 1.2)])
    assert case is not None
    assert case.series == {"avmm": [10.0, 30.0]}
    assert case.costs["avmm"].kicks_per_request == 1.0


def test_what_fails_is_tried_once_more_and_told() -> None:
    told: list[str] = []
    answers = iter([HostError("bench-guest", op="hung"), "fine"])

    def attempt() -> str:
        answer = next(answers)
        if isinstance(answer, HostError):
            raise answer
        return answer

    options = Options(leave_out=told.append)
    assert turns.again(attempt, options) == "fine"
    assert told == ["hung"]


def test_without_its_files_a_suite_says_what_makes_them(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("AVMM_CACHE", str(tmp_path))
    with pytest.raises(HostError, match="scripts/assets"):
        Kit.find()
    monkeypatch.delenv("AVMM_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(HostError, match=str(tmp_path / "avmm")):
        Kit.find()
