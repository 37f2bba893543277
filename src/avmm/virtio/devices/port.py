"""One named port of a guest: a byte stream that either side opens and closes."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from dataclasses import dataclass

from avmm.console.streams import LIMIT_BYTES, GuestReader, GuestTransport, GuestWriter, InputQueue
from avmm.errors import ConfigError, GuestFault, HostError
from avmm.virtio.byte_queue import ByteQueue

_DISCARDS_MAX = 64


@dataclass(frozen=True, slots=True)
class PortStatistics:
    """host_open, guest_open: which sides are open. rx_bytes: to the guest, tx_bytes: from it."""

    host_open: bool
    guest_open: bool
    rx_bytes: int
    tx_bytes: int


class GuestPort:
    """A stream between this program and whoever has /dev/virtio-ports/NAME open in the guest.

    Nothing is lost: a guest that writes more than is read waits, and so does one that writes
    while the port is not open here. Loop.

    on_open: called when host_open changed. is_working: whether the device may use its queues.
    """

    def __init__(
        self,
        id: int,
        name: str,
        rx: ByteQueue,
        tx: ByteQueue,
        *,
        on_open: Callable[[GuestPort], None],
        put: Callable[[GuestPort, memoryview], int],
        is_working: Callable[[], bool],
    ) -> None:
        """For the device. put: bytes into `rx`; how many, none when something is wrong."""
        self.id = id
        self.name = name
        self.rx, self.tx = rx, tx
        self.added = False
        self.ready = False
        self._on_open = on_open
        self._is_working = is_working
        self._input = InputQueue(lambda data: put(self, data) if self._guest_open else 0)
        self._guest_open = False
        self._draining = False  # the guest has closed, and what it wrote before is on its way
        self._ended = False
        self._transport: _PortTransport | None = None
        self._change = asyncio.Event()

    @property
    def guest_open(self) -> bool:
        """Whether a program in the guest has it open."""
        return self._guest_open

    @property
    def host_open(self) -> bool:
        """Whether it is open here, or open() waits for the guest."""
        return self._transport is not None

    async def open(self, *, limit: int = LIMIT_BYTES) -> tuple[GuestReader, GuestWriter]:
        """Open it, wait until the guest has, and give the pair of streams; one at a time.

        The reader is at its end when the guest closes the port or has ended; open() again for
        what comes next. The writer's drain() waits until the guest's driver has the bytes. Closing
        the writer closes the port, and what the guest wrote meanwhile is forgotten. limit: as of
        asyncio's streams; the reader holds up to twice as much and 64 KiB.

        For a Linux guest that reads a port which is not open here, it is at its end: open it, or
        begin to, before the guest does. One that writes waits.

        Raises ConfigError("port") when it is open already, HostError("port-closed") when the
        guest has ended, or ends while this waits.
        """
        if self._transport is not None:
            raise ConfigError("port", f"Port {self.name}: it is open already")
        self._check_alive()
        transport = _PortTransport(self, self._input)
        pair = transport.pair(limit)
        self._transport = transport
        self._on_open(self)
        try:
            while not (self._guest_open or self._ended):
                self._change.clear()
                await self._change.wait()
        except BaseException:
            transport.end()
            raise
        self._check_alive()
        self.tx.queue.notify()
        return pair

    def statistics(self) -> PortStatistics:
        """Counters as of now."""
        return PortStatistics(
            self.host_open, self._guest_open, self.rx.count_bytes, self.tx.count_bytes
        )

    # What follows is for the device.

    def set_guest_open(self, guest_open: bool) -> None:
        """The guest opened or closed it."""
        if guest_open == self._guest_open:
            return
        self._guest_open = guest_open
        if guest_open:
            self._change.set()
            self._input.feed()
        else:
            self._draining = self._transport is not None
        self.tx.queue.notify()

    def feed(self) -> None:
        """The driver has more buffers."""
        self._input.feed()

    def serve(self) -> bool:
        """Give the reader what the guest wrote; whether there is more to do. Raises GuestFault."""
        transport = self._transport
        if transport is None or not (self._guest_open or self._draining):
            return False
        if transport.is_paused():
            return False
        data, more = self.tx.take()
        transport.receive(data)
        if more or not self._draining:
            return more
        self._draining = False
        transport.end()
        return False

    def reset(self) -> None:
        """The driver has forgotten it."""
        served = self._guest_open or self._draining
        self.added = self.ready = self._guest_open = self._draining = False
        if served and self._transport is not None:  # else open() goes on to wait
            self._transport.end()

    def end(self, last: list[bytes]) -> None:
        """The guest has ended; what it wrote last."""
        self._ended = True
        self._guest_open = self._draining = False
        self._change.set()
        if self._transport is not None:
            for data in last:
                self._transport.receive(data)
            self._transport.end()

    # And this for the streams.

    def read_on(self) -> None:
        """The reader takes bytes again: those that were held back in the queue."""
        self.tx.queue.notify()

    def forget(self) -> None:
        """The pair is gone."""
        self._transport = None
        self._draining = False
        if self._is_working() and self.tx.queue.ready and not self._ended:
            with contextlib.suppress(GuestFault):  # whoever serves the queue next reports it
                for _ in range(_DISCARDS_MAX):
                    if not self.tx.take()[1]:
                        break
        if not self._ended:
            self._on_open(self)

    def _check_alive(self) -> None:
        if self._ended:
            raise HostError("port-closed", op=f"Port {self.name}", remedy="the guest has ended")


class _PortTransport(GuestTransport):
    """The pair of streams of a port."""

    def __init__(self, port: GuestPort, input: InputQueue) -> None:
        super().__init__(port.name, input)
        self._port = port

    def on_read(self) -> None:
        """Let the guest go on."""
        self._port.read_on()

    def on_closed(self) -> None:
        """Close the port."""
        self._port.forget()
