"""examples/key_value_device.py on KVM: a guest of a few instructions calls it over its queue, and
a disk written in Python is read by another one."""

from __future__ import annotations

import asyncio
import importlib.util
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import avmm
from avmm.block.objects import HttpDisk, RamDisk
from avmm.virtio.transport import pci_common
from fakes.tiny_driver import COMMON, COPIER, DRIVER
from fakes.web_server import WebServer

Assemble = Callable[[str], Path]

EXAMPLES = Path(__file__).parents[2] / "examples"


def request(head: int, text: str) -> str:
    return f"descriptor {head}, text_{text}, (text_{text}_end-text_{text}), 1, {head + 1}\n"


def answer(head: int, at: int) -> str:
    return f"descriptor {head + 1}, {at:#x}, 64, 2, 0\n"


def texts(**of: str) -> str:
    lines = (f'text_{name}: .ascii "{text}"\ntext_{name}_end:' for name, text in of.items())
    return "\n".join(lines)


def load(name: str) -> Any:
    """An example, as a module."""
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def example() -> Any:
    return load("key_value_device")


def config(kernel: Path, **more: Any) -> avmm.Config:
    return avmm.Config(kernel=str(kernel), memory="4M", cmdline="", **more)


async def test_a_guest_calls_the_key_value_device(tiny_guest: Assemble, example: Any) -> None:
    body = (
        DRIVER
        + request(0, "set")
        + answer(0, 0x310000)
        + request(2, "get")
        + answer(2, 0x310100)
        + request(4, "host")
        + answer(4, 0x310200)
        + """
    offer 0
    await_all
    offer 2
    offer 4
    await_all
    print_answer 0x310000
    putc '|'
    print_answer 0x310100
    putc '|'
    print_answer 0x310200
    poweroff
"""
        + texts(set="SET colour green", get="GET colour", host="GET greeting")
    )
    device = example.KeyValue()
    device.store[b"greeting"] = b"hello from the host"
    async with avmm.MicroVM(config(tiny_guest(body), devices=[device])) as vm:
        assert (await vm.wait()).kind is avmm.ExitKind.POWEROFF
        assert vm.console.scrollback == b"OK|= green|= hello from the host"
        statistics = vm.statistics().devices["keyvalue0"]
    assert device.store[b"colour"] == b"green"
    assert statistics.counters == {"failed": 0, "refused": 0, "keys": 2}
    assert statistics.queues[0].used == 3


async def test_the_example_runs_as_a_program_does(
    tiny_guest: Assemble, example: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    body = (
        DRIVER
        + request(0, "host")
        + answer(0, 0x310000)
        + request(2, "del")
        + answer(2, 0x310100)
        + "offer 0\noffer 2\nawait_all\nprint_answer 0x310000\npoweroff\n"
        + texts(host="SET a b c", **{"del": "DEL greeting"})
    )
    assert await example.main(str(tiny_guest(body))) == {b"a": b"b c"}
    assert "OK\n" in capsys.readouterr().out


async def test_what_is_no_request_is_the_guests_fault(tiny_guest: Assemble, example: Any) -> None:
    body = (
        DRIVER
        + request(0, "odd")
        + answer(0, 0x310000)
        + f"""
    offer 0
    await_all
    movb {COMMON + pci_common.DEVICE_STATUS:#x}, %al
    test $0x40, %al
    jz 4f
    putc 'R'
4:  poweroff
"""
        + texts(odd="FLY to the moon")
    )
    async with avmm.MicroVM(config(tiny_guest(body), devices=[example.KeyValue()])) as vm:
        assert (await vm.wait()).kind is avmm.ExitKind.POWEROFF
        assert vm.console.scrollback == b"R"
        assert vm.statistics().devices["keyvalue0"].last_fault == "key-value"


# Reads sector 2, writes it to sector 7, prints it.
async def test_a_guest_reads_and_writes_a_disk_written_in_python(tiny_guest: Assemble) -> None:
    disk = RamDisk(4096, bytes(1024) + b"read by a guest")
    async with avmm.MicroVM(config(tiny_guest(COPIER), disks=[avmm.AsyncDisk(disk)])) as vm:
        assert (await vm.wait()).kind is avmm.ExitKind.POWEROFF
        assert vm.console.scrollback == b"read by a guest"
    assert disk.content[7 * 512 : 7 * 512 + 15] == b"read by a guest"


async def test_a_guest_has_a_disk_from_the_web_and_keeps_its_writes(
    tiny_guest: Assemble, capsys: pytest.CaptureFixture[str]
) -> None:
    server = WebServer(bytes(1024) + b"from the web".ljust(7 * 1024, b"\0"))
    async with server.running() as url:
        reason = await load("disk_from_the_web").main(str(tiny_guest(COPIER)), None, url)
    assert reason.kind is avmm.ExitKind.POWEROFF
    printed = capsys.readouterr().out
    assert "from the web" in printed
    assert "1 pages written" in printed


async def test_the_disk_from_the_web_is_the_file_with_the_writes_in_it() -> None:
    module = load("disk_from_the_web")
    model = bytearray(os.urandom(10 * 4096 + 512))
    async with WebServer(bytes(model)).running() as url, HttpDisk(url) as base:
        disk = module.KeepsWrites(base)
        for begin, size in ((512, 512), (4096, 4096), (8000 // 512 * 512, 9216), (40960, 512)):
            data = os.urandom(size)
            await disk.write(begin, data)
            model[begin : begin + size] = data
            assert await disk.read(0, disk.size) == model
            assert await disk.read(begin, size) == data


async def test_a_machine_ends_though_a_device_hangs(tiny_guest: Assemble) -> None:
    class Hangs(avmm.PythonDevice):
        virtio_id = 50

        async def handle(self, chain: avmm.Chain) -> None:
            begun.set_result(None)
            await loop.create_future()

    loop = asyncio.get_running_loop()
    begun: asyncio.Future[None] = loop.create_future()
    body = DRIVER + "descriptor 0, 0x310000, 64, 2, 0\noffer 0\nawait_all\n"
    async with avmm.MicroVM(config(tiny_guest(body), devices=[Hangs()])) as vm:
        await begun
        assert vm.state is avmm.State.RUNNING
    assert (await vm.wait()).kind is avmm.ExitKind.KILLED
