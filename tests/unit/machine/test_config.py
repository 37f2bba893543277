"""Configurations: one schema, and for each bad value a message that names it and the remedy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import avmm
from avmm.config import parse_option
from avmm.machine.config import Config
from avmm.machine.slots import assign_slots
from avmm.units import GIB, MIB

TOML = """
kernel = "k"
cpus = 2
memory = "1G"
rng = true
disks = ["a.img,ro", {path = "b.img", serial = "S1"}]
[[nets]]
name = "tap0"
host = "10.0.0.1/24"
guest = "10.0.0.2"
"""


def make(**values: Any) -> Config:
    return Config(**{"kernel": "k", **values})


def refused(**values: Any) -> str:
    with pytest.raises(avmm.ConfigError) as caught:
        make(**values)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_file_and_python_give_the_same(tmp_path: Path) -> None:
    path = tmp_path / "vm.toml"
    path.write_text(TOML)
    assert Config.from_file(str(path)) == make(
        cpus=2,
        memory="1G",
        rng=True,
        disks=[avmm.Disk("a.img", read_only=True), avmm.Disk("b.img", serial="S1")],
        nets=[avmm.Tap("tap0", host="10.0.0.1/24", guest="10.0.0.2")],
    )


def test_json_files_work_the_same(tmp_path: Path) -> None:
    path = tmp_path / "vm.json"
    path.write_text(json.dumps({"kernel": "k", "rng": {"id": "dice"}}))
    assert Config.from_file(str(path)) == make(rng=avmm.Rng(id="dice"))


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("vm.toml", 'kernel = "k"\ndiks = []', "did you mean 'disks'"),
        ("vm.toml", 'kernel = "k"\ndisks = [{pth = "x"}]', "did you mean 'path'"),
        ("vm.toml", 'kernel = "k"\ncpus = "two"', "cpus"),
        ("vm.toml", "kernel = ", "vm.toml"),
        ("vm.json", "[]", "JSON object"),
        ("vm.json", "{", "vm.json"),
        ("vm.yaml", "", "must end in .toml or .json"),
    ],
)
def test_bad_files_are_refused_by_name(tmp_path: Path, name: str, text: str, message: str) -> None:
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(avmm.ConfigError, match=message):
        Config.from_file(str(path))


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(avmm.ConfigError, match="No such file"):
        Config.from_file(str(tmp_path / "none.toml"))


@pytest.mark.parametrize("cpus", [0, -1, 256, 300])
def test_cpus_out_of_range_are_refused(cpus: int) -> None:
    assert refused(cpus=cpus) == f"cpus: {cpus} is not in 1 to 255"


@pytest.mark.parametrize(
    ("memory", "message"),
    [
        ("1M", "too small"),
        (512, "a bare number means bytes"),
        ("lots", "not a size"),
        (3 * MIB + 1, "not a multiple of 4K"),
        (-5, "too small"),
    ],
)
def test_bad_memory_sizes_are_refused(memory: str | int, message: str) -> None:
    assert message in refused(memory=memory)


def test_huge_pages_want_a_multiple_of_theirs() -> None:
    assert "multiple of 2M" in refused(memory="5M", hugepages=True)


def test_more_memory_than_the_host_has_is_refused() -> None:
    with pytest.raises(avmm.ConfigError, match="8G is more than the 4096M of this host"):
        make(memory="8G").check_host(total_bytes=4 * GIB)
    make(memory="4G").check_host(total_bytes=4 * GIB)


def test_what_may_come_once_is_refused_twice() -> None:
    disk, tap = avmm.Disk("/x"), avmm.Tap("tap0")
    assert "'/x' is given 2 times" in refused(disks=[disk, disk])
    assert "'tap0' is given 2 times" in refused(nets=[tap, tap])
    twice = [avmm.Disk("/x", id="a"), avmm.Disk("/y", id="a")]
    assert "device id 'a' is given 2 times" in refused(disks=twice)
    assert "blk1" in refused(disks=[avmm.Disk("/x", id="blk1"), avmm.Disk("/y")])


def test_a_disk_may_come_twice_read_only() -> None:
    disk = avmm.Disk("/x", read_only=True)
    assert [id for id, _ in make(disks=[disk, disk], rng=True).all_devices()] == [
        "blk0",
        "blk1",
        "rng0",
    ]


@pytest.mark.parametrize(("transport", "room"), [("pci", 31), ("mmio", 15)])
def test_there_are_as_many_slots_as_the_transport_has(transport: str, room: int) -> None:
    disks = [avmm.Disk("/x", read_only=True) for _ in range(room)]
    slots = assign_slots(make(transport=transport, disks=disks))
    assert [slot.id for slot in slots] == [f"blk{index}" for index in range(room)]
    with pytest.raises(avmm.ConfigError, match=f"{room + 1} devices: .* {room}"):
        assign_slots(make(transport=transport, disks=disks, rng=True))


@pytest.mark.parametrize(
    ("tap", "message"),
    [
        ({"name": "a" * 16}, "1 to 15 bytes, this one 16"),
        ({"name": "a/b"}, "no '/'"),
        ({"name": ""}, "1 to 15 bytes"),
        ({"name": "t", "host": "10.0.0.1"}, "prefix length is missing"),
        ({"name": "t", "host": "10.0.0.300/24"}, "10.0.0.300"),
        ({"name": "t", "guest": "10.0.0.2"}, "needs host="),
        ({"name": "t", "host": "10.0.0.1/24", "guest": "10.1.0.2"}, "not another address"),
        ({"name": "t", "host": "10.0.0.1/24", "guest": "10.0.0.1"}, "not another address"),
        ({"name": "t", "mac": "01:00:00:00:00:01"}, "not a unicast"),
        ({"name": "t", "mac": "52:54"}, "not a MAC"),
        ({"name": "t", "mtu": 12}, "mtu=12"),
        ({"name": "t", "queues": 0}, "queues=0 is not in 1 to 64"),
        ({"name": "t", "queue_size": 100}, "queue_size=100 is not a power of two"),
    ],
)
def test_bad_nics_are_refused(tap: dict[str, Any], message: str) -> None:
    with pytest.raises(avmm.ConfigError, match=message):
        avmm.Tap(**tap)


def test_a_serial_number_has_20_ascii_bytes_at_most() -> None:
    with pytest.raises(avmm.ConfigError, match="ASCII of up to 20"):
        avmm.Disk("/x", serial="a" * 21)


def test_a_negative_grace_is_refused() -> None:
    assert "negative" in refused(stop_grace_s=-1.0)


@pytest.mark.parametrize("share", [0.0, -0.2, 0.0001, 1.1, float("nan")])
def test_a_share_that_is_none_is_refused(share: float) -> None:
    assert "exit_share" in refused(exit_share=share)


def test_option_strings_are_parsed_by_the_structs_fields() -> None:
    assert parse_option("/x,ro,id=y", avmm.Disk, "--disk") == avmm.Disk(
        "/x", read_only=True, id="y"
    )
    assert parse_option("tap=t0,mtu=1400", avmm.Tap, "--net") == avmm.Tap("t0", mtu=1400)
    assert parse_option("/x,ro=on,direct=off", avmm.Disk, "--disk") == avmm.Disk(
        "/x", read_only=True
    )


def test_rate_limits_are_keys_of_their_device() -> None:
    limit = avmm.RateLimit(bps="100M", ops=500, ops_burst=20)
    text = "/x,bps=100M,ops=500,ops_burst=20"
    assert parse_option(text, avmm.Disk, "--disk") == avmm.Disk("/x", limit=limit)
    text = "t0,rx_bps=100M,rx_ops=500,rx_ops_burst=20,tx_ops=7"
    tap = avmm.Tap("t0", rx_limit=limit, tx_limit=avmm.RateLimit(ops=7))
    assert parse_option(text, avmm.Tap, "--net") == tap


def test_rate_limits_in_a_file_are_a_table_or_keys(tmp_path: Path) -> None:
    path = tmp_path / "vm.toml"
    path.write_text(
        'kernel = "k"\nnets = ["t0,tx_ops=7"]\n'
        '[[disks]]\npath = "/x"\nlimit = {bps = "1M", ops = 5}\n'
    )
    config = Config.from_file(str(path))
    assert config.disks == [avmm.Disk("/x", limit=avmm.RateLimit(bps="1M", ops=5))]
    assert config.nets == [avmm.Tap("t0", tx_limit=avmm.RateLimit(ops=7))]
    path.write_text('kernel = "k"\ndisks = [{path = "/x", limit = {iops = 5}}]\n')
    with pytest.raises(avmm.ConfigError, match=r"disks\[0\]\.limit: unknown key 'iops'.*'ops'"):
        Config.from_file(str(path))
    path.write_text('kernel = "k"\ndisks = [{path = "/x", limit = {ops = "5"}}]\n')
    with pytest.raises(avmm.ConfigError, match=r"disks\[0\]\.limit\.ops: '5' is not int"):
        Config.from_file(str(path))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("/x,rw", "unknown key 'rw'"),
        ("/x,seral=1", "did you mean 'serial'"),
        ("/x,engine=no", "no"),
        ("/x,ops=fast", "ops"),
        ("/x,bps=0", "bps: 0 is not in 1 to 1024T"),
        ("/x,rx_bps=1", "unknown key 'rx_bps'"),
        ("/x,queues=\udcff", "not UTF-8"),
    ],
)
def test_bad_option_strings_are_refused(text: str, message: str) -> None:
    with pytest.raises(avmm.ConfigError, match=message):
        parse_option(text, avmm.Disk, "--disk")


def test_guest_addresses_become_ip_parameters_in_order() -> None:
    nets = [avmm.Tap("a"), avmm.Tap("b", host="10.0.0.1/24", guest="10.0.0.2")]
    line = make(cmdline="quiet", nets=nets).full_cmdline()
    assert line == "quiet ip=10.0.0.2::10.0.0.1:255.255.255.0::eth1:off"


def test_a_console_on_virtio_is_the_kernels_unless_the_command_line_says_which() -> None:
    assert Config(kernel="k").full_cmdline() == "console=ttyS0"
    assert Config(kernel="k", console=True).full_cmdline() == "console=ttyS0 console=hvc0"
    named = Config(kernel="k", console=True, cmdline="console=hvc1 quiet")
    assert named.full_cmdline() == "console=hvc1 quiet"
    both = Config(
        kernel="k", console=avmm.VirtioConsole(id="c"), ports=avmm.Ports(["a"])
    ).all_devices()
    assert [id for id, _ in both] == ["c", "ports0"]
