"""Events for several readers, none of which can hold up another."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import AsyncIterator

import pytest

from avmm.errors import ConfigError
from avmm.machine.events import DriverReady, EventHub, EventsLost, Started


def ready(number: int) -> DriverReady:
    return DriverReady(float(number), f"net{number}")


async def all_of(events: AsyncIterator[object]) -> list[object]:
    return [event async for event in events]


async def test_every_reader_gets_every_event_and_the_end() -> None:
    hub = EventHub()
    readers = [asyncio.create_task(all_of(hub.reader(10))) for _ in range(3)]
    await asyncio.sleep(0)
    for number in range(5):
        hub.publish(ready(number))
        await asyncio.sleep(0)
    hub.close()
    assert await asyncio.gather(*readers) == [[ready(n) for n in range(5)]] * 3


async def test_a_reader_sees_what_came_between_its_making_and_its_first_step() -> None:
    hub = EventHub()
    hub.publish(Started(0.0))
    reader = hub.reader(10)
    hub.publish(ready(1))
    hub.close()
    assert await all_of(reader) == [ready(1)]


async def test_a_slow_reader_loses_the_oldest_and_is_told_how_many() -> None:
    hub = EventHub()
    slow, quick = hub.reader(3), hub.reader(100)
    for number in range(10):
        hub.publish(ready(number))
    assert await anext(slow) == EventsLost(7.0, 7)
    assert await anext(slow) == ready(7)
    for number in range(10, 12):
        hub.publish(ready(number))
    hub.close()
    assert await all_of(slow) == [EventsLost(9.0, 1), ready(9), ready(10), ready(11)]
    assert await all_of(quick) == [ready(n) for n in range(12)]


async def test_a_reader_that_is_dropped_is_forgotten() -> None:
    hub = EventHub()
    reader = hub.reader(3)
    assert len(hub._readers) == 1
    del reader
    gc.collect()
    assert len(hub._readers) == 0


async def test_a_reader_that_waits_can_be_cancelled_and_goes_on_later() -> None:
    hub = EventHub()
    reader = hub.reader(3)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0):
            await anext(reader)
    hub.publish(ready(1))
    assert await anext(reader) == ready(1)


async def test_tasks_that_share_a_reader_share_its_events() -> None:
    hub = EventHub()
    reader = hub.reader(10)
    tasks = [asyncio.create_task(all_of(reader)) for _ in range(2)]
    await asyncio.sleep(0)
    for number in range(4):
        hub.publish(ready(number))
    hub.close()
    one, other = await asyncio.gather(*tasks)
    assert sorted(event.at_s for event in one + other) == [0, 1, 2, 3]  # type: ignore[attr-defined]


async def test_a_reader_made_after_the_end_ends_at_once() -> None:
    hub = EventHub()
    hub.close()
    assert await all_of(hub.reader(1)) == []


@pytest.mark.parametrize("limit", [0, -1, "3"])
async def test_a_reader_has_room_for_one_event_at_least(limit: int) -> None:
    with pytest.raises(ConfigError, match="limit="):
        EventHub().reader(limit)
