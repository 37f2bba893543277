"""The asyncio home: who is called when, and what is left behind."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator

import pytest

from avmm.errors import HostError
from avmm.virtio.pump import Pump
from fakes.mmio_driver import eventually, settle


@pytest.fixture
def event_fd() -> Iterator[int]:
    fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
    yield fd
    os.close(fd)


def make_pump() -> tuple[Pump, list[Exception]]:
    errors: list[Exception] = []
    return Pump(asyncio.get_running_loop(), errors.append), errors


async def test_a_turn_that_has_more_to_do_lets_others_run_in_between(event_fd: int) -> None:
    pump, _ = make_pump()
    order: list[str] = []
    done = asyncio.Event()

    def work() -> bool:
        if not order:
            os.eventfd_read(event_fd)
            asyncio.get_running_loop().call_soon(order.append, "other")
        order.append("work")
        if len(order) == 4:
            done.set()
            return False
        return True

    pump.watch(event_fd, work)
    os.eventfd_write(event_fd, 1)
    await done.wait()
    pump.stop()
    assert order == ["work", "other", "work", "work"]


async def test_no_work_is_called_after_stop(event_fd: int) -> None:
    pump, _ = make_pump()
    calls: list[int] = []

    def work() -> bool:
        calls.append(1)
        pump.stop()
        return True

    pump.watch(event_fd, work)
    os.eventfd_write(event_fd, 1)
    await settle()
    assert calls == [1]
    pump.stop()
    assert not asyncio.get_running_loop().remove_reader(event_fd)


async def test_an_error_is_reported_and_the_loop_goes_on(event_fd: int) -> None:
    pump, errors = make_pump()

    def work() -> bool:
        os.eventfd_read(event_fd)
        raise ValueError("broken")

    pump.watch(event_fd, work)
    for _ in range(2):
        os.eventfd_write(event_fd, 1)
        await settle()
    pump.stop()
    assert [str(e) for e in errors] == ["broken", "broken"]


async def test_watching_twice_is_watching_once(event_fd: int) -> None:
    pump, _ = make_pump()
    calls: list[str] = []

    def work(name: str) -> bool:
        os.eventfd_read(event_fd)
        calls.append(name)
        return False

    pump.watch(event_fd, lambda: work("first"))
    pump.watch(event_fd, lambda: work("second"))
    os.eventfd_write(event_fd, 1)
    await settle()
    pump.unwatch(event_fd)
    pump.unwatch(event_fd)
    assert calls == ["first"]


async def test_what_rests_is_not_looked_at_and_then_works_whether_it_is_readable_or_not(
    event_fd: int,
) -> None:
    pump, _ = make_pump()
    calls: list[int] = []
    woken = asyncio.Event()

    def work() -> bool:
        calls.append(1)
        woken.set()
        return False

    pump.watch(event_fd, work)
    pump.rest(event_fd, 1e6)
    os.eventfd_write(event_fd, 1)
    await settle()
    assert calls == []
    pump.unwatch(event_fd)
    os.eventfd_read(event_fd)
    pump.watch(event_fd, work)
    pump.rest(event_fd, 1e-6)
    pump.rest(event_fd, 1e6)
    await woken.wait()
    assert calls == [1]
    woken.clear()
    os.eventfd_write(event_fd, 1)
    await woken.wait()
    pump.stop()


async def test_one_that_rests_can_be_stopped_and_one_that_is_not_watched_does_not_rest(
    event_fd: int,
) -> None:
    pump, errors = make_pump()
    pump.rest(event_fd, 1e-6)
    pump.watch(event_fd, lambda: False)
    pump.rest(event_fd, 1e-6)
    pump.stop()
    await settle()
    assert errors == []


async def test_one_that_cannot_be_watched_again_is_reported(
    event_fd: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise HostError("watch", op="epoll_ctl", errno=28)

    pump, errors = make_pump()
    pump.watch(event_fd, lambda: False)
    monkeypatch.setattr("avmm.virtio.pump.add_reader", refuse)
    pump.rest(event_fd, 1e-6)
    await eventually(lambda: bool(errors))
    assert [type(e) for e in errors] == [HostError]
    pump.stop()
