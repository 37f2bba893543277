"""Values of a wrong type: refused at construction, by path, value and what is expected."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import pytest

import avmm
from avmm.config import Checked, convert
from avmm.machine.config import Config


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"cpus": "2"}, "Config: cpus: '2' is not int"),
        ({"cpus": True}, "Config: cpus: True is not int"),
        ({"cpus": 1.0}, "Config: cpus: 1.0 is not int"),
        ({"kernel": Path("/k")}, "Config: kernel: PosixPath('/k') is not str"),
        ({"kernel": "a\0b"}, "Config: kernel: 'a\\x00b' has a NUL in it"),
        ({"initrd": b"/i"}, "Config: initrd: b'/i' is not str or None"),
        ({"memory": 1.5e9}, "Config: memory: 1500000000.0 is not str or int"),
        ({"hugepages": 1}, "Config: hugepages: 1 is not bool"),
        ({"disks": "a.img"}, "Config: disks: 'a.img' is not list of Disk"),
        ({"disks": [avmm.Disk("x"), "a.img"]}, "Config: disks[1]: 'a.img' is not Disk"),
        ({"nets": [1]}, "Config: nets[0]: 1 is not Tap"),
        ({"nets": [avmm.Disk("x")]}, "is not Tap"),
        ({"rng": "on"}, "Config: rng: 'on' is not bool or Rng"),
        ({"transport": "isa"}, "Config: transport: 'isa' is not 'pci' or 'mmio'"),
        ({"stop_grace_s": None}, "Config: stop_grace_s: None is not float"),
        ({"stop_grace_s": float("nan")}, "no time"),
        ({"cmdline": ["quiet"] * 100}, "..."),
    ],
)
def test_a_config_refuses(values: dict[str, Any], message: str) -> None:
    with pytest.raises(avmm.ConfigError) as caught:
        Config(**{"kernel": "k", **values})
    assert message in str(caught.value)
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize(
    ("struct", "values", "message"),
    [
        (avmm.Disk, {"path": 3}, "Disk: path: 3 is not str"),
        (avmm.Disk, {"path": "x", "queues": "2"}, "Disk: queues: '2' is not int or None"),
        (avmm.Disk, {"path": "x", "engine": "aio"}, "is not 'auto' or 'io_uring' or 'threads'"),
        (avmm.Tap, {"name": None}, "Tap: name: None is not str"),
        (avmm.Tap, {"name": "t", "mtu": "1500"}, "Tap: mtu: '1500' is not int or None"),
        (avmm.Rng, {"home": 1}, "Rng: home: 1 is not 'auto' or 'loop' or 'thread'"),
    ],
)
def test_a_device_refuses(struct: Any, values: dict[str, Any], message: str) -> None:
    with pytest.raises(avmm.ConfigError) as caught:
        struct(**values)
    assert message in str(caught.value)
    assert caught.value.kind == "value"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"disks": ["a.img", {"path": 3}]}, "vm.toml: disks[1].path: 3 is not str"),
        ({"disks": [{"serial": "x"}]}, "vm.toml: disks[0].path is missing"),
        ({"disks": [{"path": "x", "ids": "y"}]}, "vm.toml: disks[0]: unknown key 'ids'"),
        ({"nets": [1]}, "vm.toml: nets[0]: 1 is not Tap"),
        ({"rng": {"home": "x"}}, "vm.toml: rng.home: 'x' is not 'auto'"),
        ({"cpus": "two"}, "vm.toml: cpus: 'two' is not int"),
        ({"cpuz": 2}, "vm.toml: unknown key 'cpuz'; did you mean 'cpus'?"),
    ],
)
def test_plain_values_are_refused_by_their_whole_path(values: dict[str, Any], message: str) -> None:
    with pytest.raises(avmm.ConfigError) as caught:
        Config.from_values({"kernel": "k", **values}, "vm.toml")
    assert message in str(caught.value)


def test_a_missing_value_is_named() -> None:
    with pytest.raises(avmm.ConfigError, match=r"^vm.toml: kernel is missing$"):
        Config.from_values({}, "vm.toml")


def test_a_whole_number_is_a_time() -> None:
    assert Config(kernel="k", stop_grace_s=3).stop_grace_s == 3


class Inner(Checked, frozen=True):
    names: list[str] | None = None


class Outer(Checked, frozen=True):
    inner: Inner | list[Inner] | None = None
    mode: Literal[1, "one"] = 1
    anything: Any = None


def test_values_inside_of_unions_are_found() -> None:
    with pytest.raises(avmm.ConfigError, match=r"names\[1\]: 2 is not str"):
        Inner(names=["a", 2])  # type: ignore[list-item]
    with pytest.raises(avmm.ConfigError, match=r"inner\[0\]: 1 is not Inner"):
        Outer(inner=[1])  # type: ignore[list-item]
    with pytest.raises(avmm.ConfigError, match=r"inner: 1 is not Inner or list of Inner or None"):
        Outer(inner=1)  # type: ignore[arg-type]
    with pytest.raises(avmm.ConfigError, match=r"mode: True is not 1 or 'one'"):
        Outer(mode=True)  # type: ignore[arg-type]
    assert convert({"anything": object, "mode": "one"}, Outer, "").mode == "one"
