"""One connection: a front-end's messages, from the first to the last."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import stat
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

from avmm.errors import GuestFault, HostError
from avmm.vhost_user import inflight, message
from avmm.vhost_user.channel import Channel, Closed, Incoming
from avmm.vhost_user.message import (
    ANSWERED,
    U64,
    ConfigAccess,
    InflightMemory,
    MemoryTable,
    ProtocolFeature,
    Request,
    VringAddresses,
    VringFile,
    VringState,
)
from avmm.vhost_user.transport import VhostUserTransport
from avmm.vhost_user.vring import check_eventfd
from avmm.virtio.interrupt import NO_FD

log = logging.getLogger(__name__)

Handler = Callable[[Any, list[int]], Awaitable[bytes | None]]


class Session:
    """Serves one channel until the front-end closes it. Loop."""

    def __init__(self, transport: VhostUserTransport, channel: Channel) -> None:
        self._transport = transport
        self._channel = channel
        self._id = transport.device.context.id
        self._protocol_features = ProtocolFeature(0)
        self._handlers: dict[Request, Handler] = {
            Request.GET_FEATURES: self._get_features,
            Request.SET_FEATURES: self._set_features,
            Request.SET_OWNER: self._set_owner,
            Request.RESET_OWNER: self._reset_owner,
            Request.SET_MEM_TABLE: self._set_mem_table,
            Request.SET_VRING_NUM: self._set_vring_num,
            Request.SET_VRING_ADDR: self._set_vring_addr,
            Request.SET_VRING_BASE: self._set_vring_base,
            Request.GET_VRING_BASE: self._get_vring_base,
            Request.SET_VRING_KICK: self._set_vring_kick,
            Request.SET_VRING_CALL: self._set_vring_call,
            Request.SET_VRING_ERR: self._set_vring_err,
            Request.GET_PROTOCOL_FEATURES: self._get_protocol_features,
            Request.SET_PROTOCOL_FEATURES: self._set_protocol_features,
            Request.GET_QUEUE_NUM: self._get_queue_num,
            Request.SET_VRING_ENABLE: self._set_vring_enable,
            Request.SET_BACKEND_REQ_FD: self._set_backend_req_fd,
            Request.GET_CONFIG: self._get_config,
            Request.SET_CONFIG: self._set_config,
            Request.GET_INFLIGHT_FD: self._get_inflight_fd,
            Request.SET_INFLIGHT_FD: self._set_inflight_fd,
            Request.RESET_DEVICE: self._reset_device,
        }

    async def serve(self) -> None:
        """Answer until the front-end closes the connection; the transport's end() has to follow.

        Raises GuestFault when the front-end broke the protocol, HostError when the host refused.
        """
        with contextlib.suppress(Closed):
            while True:
                incoming = await self._channel.receive()
                try:
                    await self._answer(incoming)
                finally:
                    incoming.close()
                # A front-end that is never silent must not have the loop for itself.
                await asyncio.sleep(0)

    async def _answer(self, incoming: Incoming) -> None:
        header = incoming.header
        request = message.parse(header, incoming.payload, len(incoming.fds))
        wants_ack = header.need_reply and ProtocolFeature.REPLY_ACK in self._protocol_features
        if request is None:
            if not wants_ack:
                # It may be waiting for an answer whose form we do not know.
                raise GuestFault("front-end", f"{header.name} is not known")
            log.info("%s: %s is not known", self._id, header.name)
            await self._acknowledge(header.request, success=False)
            return
        log.debug("%s: %s", self._id, request)
        try:
            payload = await self._handlers[request.request](request.payload, incoming.fds)
        except (GuestFault, HostError):
            if wants_ack and request.request not in ANSWERED:
                await self._acknowledge(header.request, success=False)
            raise
        if payload is not None:
            fd = incoming.fds[0] if incoming.fds else None
            await self._channel.send(message.reply(header.request, payload), fd)
        elif wants_ack:
            await self._acknowledge(header.request, success=True)

    async def _acknowledge(self, request: int, *, success: bool) -> None:
        await self._channel.send(message.reply(request, message.u64(int(not success))))

    async def _get_features(self, payload: None, fds: list[int]) -> bytes:
        return message.u64(self._transport.offered)

    async def _set_features(self, payload: U64, fds: list[int]) -> None:
        await self._transport.set_features(payload.value)

    async def _set_owner(self, payload: None, fds: list[int]) -> None:
        """The connection says as much."""

    async def _reset_owner(self, payload: None, fds: list[int]) -> None:
        for vring in self._transport.vrings:
            await self._transport.set_enabled(vring, False)

    async def _set_mem_table(self, payload: MemoryTable, fds: list[int]) -> None:
        await self._transport.set_memory(payload, fds)

    async def _set_vring_num(self, payload: VringState, fds: list[int]) -> None:
        self._transport.stopped_vring(payload.index).size = payload.value

    async def _set_vring_addr(self, payload: VringAddresses, fds: list[int]) -> None:
        await self._transport.set_addresses(payload)

    async def _set_vring_base(self, payload: VringState, fds: list[int]) -> None:
        self._transport.stopped_vring(payload.index).base = payload.value

    async def _get_vring_base(self, payload: VringState, fds: list[int]) -> bytes:
        vring = self._transport.vring(payload.index)
        return message.vring_state(payload.index, await self._transport.stop(vring))

    async def _set_vring_kick(self, payload: VringFile, fds: list[int]) -> None:
        vring = self._transport.vring(payload.index)
        if not payload.has_fd:
            raise GuestFault(
                "front-end", f"Ring {payload.index}: polling without kicks is not offered"
            )
        check_eventfd(fds[0], f"Kicks of ring {payload.index}")
        await self._transport.set_kick(vring, fds)

    async def _set_vring_call(self, payload: VringFile, fds: list[int]) -> None:
        vring = self._transport.vring(payload.index)
        if fds:
            check_eventfd(fds[0], f"Calls of ring {payload.index}")
        vring.set_call(fds.pop() if fds else NO_FD)

    async def _set_vring_err(self, payload: VringFile, fds: list[int]) -> None:
        vring = self._transport.vring(payload.index)
        if fds:
            check_eventfd(fds[0], f"Errors of ring {payload.index}")
        vring.set_error(fds.pop() if fds else NO_FD)

    async def _get_protocol_features(self, payload: None, fds: list[int]) -> bytes:
        return message.u64(self._transport.profile.protocol)

    async def _set_protocol_features(self, payload: U64, fds: list[int]) -> None:
        offered = self._transport.profile.protocol
        if payload.value & ~offered:
            raise GuestFault(
                "front-end", f"Protocol features {payload.value:#x}; offered are {offered:#x}"
            )
        self._protocol_features = ProtocolFeature(payload.value)

    async def _get_queue_num(self, payload: None, fds: list[int]) -> bytes:
        return message.u64(self._transport.queue_number)

    async def _set_vring_enable(self, payload: VringState, fds: list[int]) -> None:
        vring = self._transport.vring(payload.index)
        await self._transport.set_enabled(vring, bool(payload.value))

    async def _set_backend_req_fd(self, payload: None, fds: list[int]) -> None:
        if not stat.S_ISSOCK(os.fstat(fds[0]).st_mode):
            raise GuestFault("front-end", "What requests of ours are to go to is no socket")
        self._transport.set_requests(fds.pop())

    async def _get_config(self, payload: ConfigAccess, fds: list[int]) -> bytes:
        data = self._transport.device.config.data[payload.offset :][: len(payload.data)]
        return message.config(payload, data.ljust(len(payload.data), b"\0"))

    async def _set_config(self, payload: ConfigAccess, fds: list[int]) -> None:
        self._transport.device.write_config(payload.offset, payload.data)

    async def _get_inflight_fd(self, payload: InflightMemory, fds: list[int]) -> bytes:
        if payload.queues > len(self._transport.vrings):
            raise GuestFault("front-end", f"What {payload.queues} rings have in flight")
        if not self._transport.keeps_inflight:
            return message.inflight(replace(payload, size_bytes=0))
        payload, fd = inflight.create(payload)
        fds.append(fd)  # it goes with the answer, and is closed like those that came
        return message.inflight(payload)

    async def _set_inflight_fd(self, payload: InflightMemory, fds: list[int]) -> None:
        self._transport.set_inflight(payload, fds[0])

    async def _reset_device(self, payload: None, fds: list[int]) -> None:
        await self._transport.reset()
