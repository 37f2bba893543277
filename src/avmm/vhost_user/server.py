"""A device of ours behind a unix socket, for the guests of any vhost-user front-end."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Self

from avmm.errors import BugError, ConfigError, GuestFault, HostError
from avmm.eventfd import owned_eventfd
from avmm.log import GuestLog
from avmm.loop import add_reader
from avmm.machine.config import check_io
from avmm.machine.lifecycle import uninterrupted
from avmm.unixsocket import Listener
from avmm.vhost_user.channel import Channel, readable
from avmm.vhost_user.memory import FrontEndMemory
from avmm.vhost_user.session import Session
from avmm.vhost_user.transport import VhostUserTransport
from avmm.virtio.device import DeviceStatistics, VirtioDevice
from avmm.virtio.devices.blk import Disk
from avmm.virtio.devices.blk_source import AsyncDisk
from avmm.virtio.devices.net import Tap
from avmm.virtio.devtype import DeviceContext
from avmm.virtio.home import Homes, HomeStatistics
from avmm.virtio.interrupt import Interrupts

log = logging.getLogger(__name__)

_REST_S = 1.0
"""Between attempts to take a connection for which the host has no descriptor."""


@dataclass(frozen=True, slots=True)
class ServerStatistics:
    """connections: front-ends that came so far; connected: whether one is there."""

    connections: int
    connected: bool
    device: DeviceStatistics
    homes: tuple[HomeStatistics, ...]


class VhostUserServer:
    """Serves one device, to one front-end after another; the next one waits for its turn.

        async with VhostUserServer(Disk("disk.img"), "/run/disk.sock") as server:
            await server.wait()

    The disk or TAP stays open from one connection to the next. A front-end that breaks the
    protocol loses its connection, no more. Loop.

    io_threads, io_poll_us: as a microVM's Config has them; queues are served by native threads
    unless there are none. require_seals: refuse guest memory whose file could shrink, which would
    end this process.

    Entering raises ConfigError and HostError, and then nothing is left behind. Leaving raises
    HostError("disk-hangs") when the disk's storage does not answer within 30 s: all else is given
    back then, the front-end's memory and the disk's lock when it does. A front-end that goes, or
    stops a ring, waits for the storage without a bound, and so does the next one; nobody else does.
    """

    def __init__(
        self,
        config: Disk | AsyncDisk | Tap,
        socket_path: str,
        *,
        io_threads: int = 1,
        io_poll_us: int = 50,
        require_seals: bool = False,
    ) -> None:
        if isinstance(config, Tap) and config.vhost:
            raise ConfigError("vhost", f"Net {config.name}: vhost=on is for our own guests")
        self.id = config.id or config.device_type.name
        check_io(io_threads, io_poll_us, [(self.id, config)])
        self.config = config
        self.socket_path = socket_path
        self._io_threads = io_threads
        self._io_poll_us = io_poll_us
        self._stack = AsyncExitStack()
        self._guest_log = GuestLog()
        self._connections = 0
        self._device: VirtioDevice
        self._homes: Homes
        self._memory = FrontEndMemory(require_seals=require_seals)
        self._transport: VhostUserTransport | None = None
        self._ended: asyncio.Future[None]

    async def __aenter__(self) -> Self:
        try:
            await self._open()
        except BaseException:
            await uninterrupted(self._stack.aclose())
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        await uninterrupted(self._stack.aclose())

    async def wait(self) -> None:
        """Wait for what ends the service: an error of the host's, or of ours; it is raised."""
        await asyncio.shield(self._ended)

    @property
    def device(self) -> VirtioDevice:
        """The device that is served."""
        return self._device

    def statistics(self) -> ServerStatistics:
        """Counters as of now; the device's count since it was made."""
        return ServerStatistics(
            self._connections,
            self._transport is not None,
            self._device.statistics(),
            self._homes.statistics(),
        )

    async def _open(self) -> None:
        loop = asyncio.get_running_loop()
        self._ended = loop.create_future()
        self._stack.callback(self._guest_log.tell)
        interrupts = Interrupts()
        self._stack.callback(interrupts.close)
        self._homes = Homes.create(loop, threads=self._io_threads, poll_us=self._io_poll_us)
        self._stack.callback(self._homes.close)
        context = DeviceContext(
            id=self.id,
            memory=self._memory,
            interrupts=interrupts,
            homes=self._homes,
            loop=loop,
            stack=self._stack,
            on_error=self._on_error,
            # Nobody says how many the guest has; front-ends may leave queues unused.
            cpus=len(os.sched_getaffinity(0)),
            guest_log=self._guest_log,
        )
        self._device = await self.config.device_type.build(self.config, context)
        config_fd = owned_eventfd(self._stack)
        interrupts.config.set_fd(config_fd)
        add_reader(loop, config_fd, self._config_event, config_fd)
        self._stack.callback(loop.remove_reader, config_fd)
        listener = Listener(self.socket_path)
        self._stack.callback(listener.close)
        log.info("%s: listening at %s", self.id, self.socket_path)
        task = loop.create_task(self._serve(listener))
        self._stack.push_async_callback(self._stop, task)

    async def _serve(self, listener: Listener) -> None:
        try:
            while True:
                await readable(listener.socket.fileno())
                try:
                    connection = listener.accept()
                except HostError as e:
                    # The connection stays where it is; without a rest nothing else would be done.
                    log.warning("%s: %s", self.id, e)
                    await asyncio.sleep(_REST_S)
                    continue
                if connection:
                    await self._serve_one(connection)
        except Exception as e:
            self._on_error(e)

    async def _serve_one(self, connection: socket.socket) -> None:
        channel = Channel(connection)
        self._connections += 1
        self._transport = VhostUserTransport(self._device, self._memory)
        log.info("%s: a front-end has connected", self.id)
        try:
            await Session(self._transport, channel).serve()
            log.info("%s: the front-end has closed the connection", self.id)
        except (GuestFault, HostError) as e:
            text = "%s: the connection is closed: %s"
            self._guest_log.write(log, logging.WARNING, text, self.id, e)
        finally:
            await uninterrupted(self._let_go(self._transport, channel))

    async def _let_go(self, transport: VhostUserTransport, channel: Channel) -> None:
        """In this order: a front-end that comes back finds the rings as the device left them."""
        try:
            await transport.end()
        finally:
            self._transport = None
            channel.close()

    async def _stop(self, serving: asyncio.Task[None]) -> None:
        """A front-end is let go of when its requests are done, or given up by the device's end."""
        serving.cancel()
        try:
            await self._device.end()
        finally:
            await asyncio.wait([serving])

    def _config_event(self, config_fd: int) -> None:
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(config_fd)
        if self._transport is not None:
            self._transport.tell_news()

    def _on_error(self, error: BaseException) -> None:
        if self._ended.done():
            return
        if not isinstance(error, (GuestFault, HostError, BugError)):
            bug = BugError("vhost-user", f"{type(error).__name__}: {error}")
            bug.__cause__ = error
            error = bug
        self._ended.set_exception(error)
        self._ended.exception()  # seen: nobody need be waiting
