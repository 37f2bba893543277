"""The console device, alone and with ports (virtio 1.3 section 5.3)."""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

import pytest

from avmm.virtio import features
from avmm.virtio.devices import console, ports
from avmm.virtio.devices.ports_control import Event
from avmm.virtio.state import ACKNOWLEDGE, DRIVER, DRIVER_OK, FEATURES_OK
from fakes.mmio_driver import settle
from fakes.ports_guest import PortsGuest

Rigged = Callable[..., Any]

MAX_NR_PORTS, EMERG_WR = 4, 8


# --- 5.3.5.1, initialization


@pytest.mark.spec("5.3.5.1", "allow a write to `emerg_wr`, even if it is not configured")
async def test_an_emergency_write_is_good_in_every_state(rigged: Rigged) -> None:
    async with rigged(lambda context: console.build(console.VirtioConsole(), context)) as rig:
        driver = rig.driver
        await driver.probe()
        assert await driver.read_features() & features.CONSOLE_EMERG_WRITE
        expected = b""
        reached = 0
        for bit in (0, ACKNOWLEDGE, DRIVER, FEATURES_OK, DRIVER_OK):
            if bit == FEATURES_OK:  # without the feature: none is needed for this
                await driver.write_features(
                    await driver.read_features() & ~features.CONSOLE_EMERG_WRITE
                )
            reached |= bit
            await driver.set_status(reached)
            expected += b"%x" % bit
            await driver.write_config(EMERG_WR, 4, expected[-1])
            assert driver.status() == reached
            assert rig.device.console.scrollback == expected
        await driver.start()
        await driver.write_config(EMERG_WR, 4, ord("!"))
        assert rig.device.console.scrollback == expected + b"!"
        assert rig.device.statistics().faults == 0


# --- 5.3.6.2.1, ports


class Watched:
    """What the driver was told of ports, since its reset."""

    def __init__(self, guest: PortsGuest) -> None:
        self._guest = guest
        self.there: set[int] = set()
        self.events: list[tuple[int, Event]] = []

    async def all(self) -> None:
        """Take the messages that are there, and hold each against what came before."""
        await settle()
        ports_max = self._guest.rig.driver.read_config(MAX_NR_PORTS, 4)
        while messages := self._guest.heard():
            for message in messages:
                port, event, _ = struct.unpack_from("<IHH", message)
                self.events.append((port, Event(event)))
                if event == Event.DEVICE_ADD:
                    assert port not in self.there
                    assert port < ports_max
                    self.there.add(port)
                elif event == Event.DEVICE_REMOVE:
                    self.there.remove(port)
                else:
                    assert port in self.there
            await settle()


@pytest.mark.spec("5.3.6.2.1", "not add a port that exists")
@pytest.mark.spec("5.3.6.2.1", "not add a port whose number is not below `max_nr_ports`")
@pytest.mark.spec("5.3.6.2.1", "not remove a port that it did not add")
@pytest.mark.parametrize("count", [1, 7])
async def test_ports_are_added_once_with_numbers_that_may_be(rigged: Rigged, count: int) -> None:
    names = [f"port{index}" for index in range(count)]
    async with rigged(lambda context: ports.build(ports.Ports(names), context)) as rig:
        guest = PortsGuest(rig)
        for _ in range(2):  # what one driver was told is nothing to the next one
            await guest.start(messages=64)
            watched = Watched(guest)
            await watched.all()
            assert watched.events == []
            for ready in (0, 1, 1, 0, 1):
                await guest.says(0, Event.DEVICE_READY, ready)
                await watched.all()
            assert len(watched.there) == count
            for port in (0, *watched.there, max(watched.there) + 1, 0xFFFF_FFFF):
                for event, value in (
                    (Event.PORT_READY, 1),
                    (Event.PORT_OPEN, 1),
                    (Event.PORT_OPEN, 0),
                    (Event.PORT_READY, 0),
                ):
                    await guest.says(port, event, value)
            await watched.all()
            _, writer = await opened(guest, names[-1], max(watched.there))
            await watched.all()
            writer.close()
            await watched.all()
            named = {port for port, event in watched.events if event is Event.PORT_NAME}
            assert named == watched.there
            assert (max(named), Event.PORT_OPEN) in watched.events
        assert rig.device.statistics().faults == 0


async def opened(guest: PortsGuest, name: str, port: int) -> tuple[Any, Any]:
    await guest.says(port, Event.PORT_OPEN, 1)
    pair: tuple[Any, Any] = await guest.device.ports[name].open()
    return pair
