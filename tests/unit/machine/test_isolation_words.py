"""What a worker says, where it is not ours any more: the program keeps its memory and its turns."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import os
from contextlib import AsyncExitStack
from typing import Any

import pytest

from avmm.errors import HostError
from avmm.legacy.serial16550 import SerialStatistics
from avmm.log import LINE_MAX
from avmm.machine.config import Config
from avmm.machine.isolation import consoles
from avmm.machine.isolation import messages as say
from avmm.machine.isolation.remote import RemoteMachine
from avmm.machine.reason import ExitKind
from avmm.machine.statistics import MachineStatistics
from avmm.virtio.device import DeviceStatistics
from fakes.mmio_driver import settle


def machine() -> RemoteMachine:
    nobody: Any = None
    return RemoteMachine(Config(kernel="none"), nobody, nobody, AsyncExitStack())


def test_a_name_that_a_worker_makes_up_is_not_kept(caplog: pytest.LogCaptureFixture) -> None:
    before = set(logging.root.manager.loggerDict)
    heard = machine()
    for name in ("avmm.made.up", "a." * 5000 + "a", "root", ""):
        heard._dispatch(say.Log(name, logging.ERROR, f"said by {name[:12]}"))
    assert set(logging.root.manager.loggerDict) == before
    assert caplog.messages == [
        "said by avmm.made.up",
        "said by a.a.a.a.a.a.",
        "said by root",
        "said by ",
    ]
    assert {record.name for record in caplog.records} == {"avmm.machine.isolation.remote"}


def test_a_line_of_a_module_that_is_here_too_has_its_name(
    caplog: pytest.LogCaptureFixture,
) -> None:
    machine()._dispatch(say.Log("avmm.vsock.host", logging.ERROR, "said"))
    assert [record.name for record in caplog.records] == ["avmm.vsock.host"]


@pytest.mark.parametrize(
    "record",
    [
        say.Log("avmm", 1 << 40, "of no level"),
        say.Fault("blk0", "bad-head", "x" * 5000),
        say.Fault("blk0", "x" * 5000, ""),
        say.Fault("x" * 5000, "bad-head", ""),
        say.Ready("x" * 5000, True),
        say.Link("x" * 5000, True),
        say.Failed(say.Failure("HostError", "vsock", "", errno=1 << 40)),
        say.Declined(0, say.Failure("HostError", "vsock", "", errno=-1)),
    ],
    ids=lambda record: type(record).__name__,
)
async def test_values_beyond_what_there_is_are_the_workers_end(record: say.Record) -> None:
    reader = asyncio.StreamReader()
    reader.feed_data(say.packed(record))
    line = say.Line(reader, None, say.News)  # type: ignore[arg-type]
    with pytest.raises(HostError) as caught:
        await line.next()
    assert caught.value.kind == "worker-protocol"


async def test_many_records_at_once_leave_the_loop_its_turns() -> None:
    reader = asyncio.StreamReader()
    reader.feed_data(say.packed(say.Took()) * 1000)
    line = say.Line(reader, None, say.News)  # type: ignore[arg-type]
    loop = asyncio.get_running_loop()
    turns = 0

    def turn() -> None:
        nonlocal turns
        turns += 1
        loop.call_soon(turn)

    loop.call_soon(turn)
    for _ in range(1000):
        assert await line.next() == say.Took()
    assert turns >= 1000 // 32


def test_what_a_terminal_would_obey_is_shown_and_a_line_of_the_log_stays_one(
    caplog: pytest.LogCaptureFixture,
) -> None:
    heard = machine()
    heard._dispatch(say.Log("avmm", logging.ERROR, "a\x1b[2J\rb\n12:00 avmm: all is well\x9b"))
    assert caplog.messages == ["a\\x1b[2J\\rb\n  12:00 avmm: all is well\\x9b"]
    ended = say.Ended(ExitKind.ERROR, "\x1b[2J" + "x" * 10_000, statistics())
    assert ended.reason().detail == ("\\x1b[2J" + "x" * 10_000)[: LINE_MAX + 3]
    for family in ("HostError", "ConfigError"):
        error = say.error_of(say.Failure(family, "kind", "\x07", "\x07", None, "\x07", "\x07"))
        assert "\x07" not in str(error)


def statistics(**counters: int) -> MachineStatistics:
    device = DeviceStatistics("blk", 0, 0, None, 0, 0, (), counters)
    serial = SerialStatistics(**dict.fromkeys(SerialStatistics.__dataclass_fields__, 0))
    return MachineStatistics("running", 0.0, (), serial, {"blk0": device}, (), 0)


@pytest.mark.parametrize(("counters", "devices"), [(1000, 1), (1, 1000)])
async def test_statistics_of_more_than_there_is_are_the_workers_end(
    counters: int, devices: int
) -> None:
    said = statistics(**{f"{at}": at for at in range(counters)})
    said = dataclasses.replace(
        said, devices={f"{at}": said.devices["blk0"] for at in range(devices)}
    )
    reader = asyncio.StreamReader()
    reader.feed_data(say.packed(say.Report(said)))
    with pytest.raises(HostError) as caught:
        await say.Line(reader, None, say.News).next()  # type: ignore[arg-type]
    assert caught.value.kind == "worker-protocol"


class Endless:
    """os, whose read() has always something."""

    def __init__(self) -> None:
        self.reads = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)

    def read(self, fd: int, size_bytes: int) -> bytes:
        self.reads += 1
        assert self.reads < 1000, "it reads for ever"
        return bytes(size_bytes)


def make_console() -> tuple[consoles.RemoteConsole, int]:
    """The program's side of a serial console, and the worker's end of its pipe."""
    ours, theirs = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    nobody: Any = None
    console = consoles.RemoteConsole(
        "serial", ours, nobody, scrollback_bytes=4096, holds=True, on_closed=lambda: None
    )
    return console, theirs


async def test_a_worker_that_writes_for_ever_holds_up_nobodys_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    console, theirs = make_console()
    monkeypatch.setattr(consoles, "os", Endless())
    console.finish()
    assert console.console.closed
    os.close(theirs)


async def test_a_reader_is_not_given_without_end_what_comes_after_the_stop() -> None:
    console, theirs = make_console()
    reader, _ = console.console.open(hold=True)
    console.rush()
    written = 0
    while written < 8 << 20:
        try:
            written += os.write(theirs, bytes(65536))
        except BlockingIOError:
            before = console.console.end
            await settle()
            if console.console.end == before:
                break
    assert written < 4 << 20
    assert not reader.at_eof()
    os.close(theirs)
    console.finish()
    assert console.console.end == written
