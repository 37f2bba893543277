"""A device's interrupts and the eventfds behind them."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from avmm.virtio.interrupt import CONFIG_CHANGE, NO_FD, USED_BUFFER, Interrupt, Interrupts


@pytest.fixture
def fds() -> Iterator[tuple[int, int]]:
    pair = (os.eventfd(0, os.EFD_NONBLOCK), os.eventfd(0, os.EFD_NONBLOCK))
    yield pair
    for fd in pair:
        os.close(fd)


def edges(fd: int) -> int:
    try:
        return os.eventfd_read(fd)
    except BlockingIOError:
        return 0


def test_an_interrupt_goes_where_it_was_last_sent(fds: tuple[int, int]) -> None:
    interrupt = Interrupt(fds[0])
    interrupt.raise_used()
    interrupt.set_fd(fds[1])
    interrupt.raise_used()
    interrupt.raise_used()
    assert (edges(fds[0]), edges(fds[1]), interrupt.count) == (1, 2, 3)
    interrupt.close()


def test_without_a_vector_only_the_status_tells(fds: tuple[int, int]) -> None:
    interrupt = Interrupt()
    interrupt.raise_config()
    assert (interrupt.fd, interrupt.count, interrupt.status) == (NO_FD, 0, CONFIG_CHANGE)
    interrupt.set_fd(fds[0])
    assert edges(fds[0]) == 0
    interrupt.close()


def test_those_who_raise_by_themselves_hear_of_each_new_descriptor(fds: tuple[int, int]) -> None:
    interrupt = Interrupt()
    heard: list[int] = []
    interrupt.on_fd_change.append(heard.append)
    for fd in (fds[0], fds[0], fds[1], NO_FD):
        interrupt.set_fd(fd)
    assert heard == [fds[0], fds[1], NO_FD]
    interrupt.close()
    interrupt.set_fd(fds[0])
    assert heard[-1] == NO_FD


def test_on_one_line_all_are_the_same(fds: tuple[int, int]) -> None:
    interrupts = Interrupts(fds[0])
    assert interrupts.queue(0) is interrupts.queue(5) is interrupts.config
    interrupts.queue(3).raise_used()
    assert (edges(fds[0]), interrupts.count, interrupts.status) == (1, 1, USED_BUFFER)
    interrupts.close()


def test_each_queue_has_its_own_and_the_status_is_that_of_all(fds: tuple[int, int]) -> None:
    interrupts = Interrupts()
    first, second = interrupts.queue(0), interrupts.queue(1)
    assert first is interrupts.queue(0)
    assert len({id(first), id(second), id(interrupts.config)}) == 3
    first.set_fd(fds[0])
    second.set_fd(fds[1])
    second.raise_used()
    interrupts.config.raise_config()
    assert (edges(fds[0]), edges(fds[1]), interrupts.count) == (0, 1, 1)
    assert interrupts.status == USED_BUFFER | CONFIG_CHANGE
    interrupts.acknowledge(USED_BUFFER)
    assert interrupts.status == CONFIG_CHANGE
    interrupts.close()
    assert interrupts.count == 1
