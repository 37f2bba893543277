"""A vhost-user front-end with no VM behind it: shared memory, rings, and the C driver on them.

It speaks the protocol of QEMU's docs/interop/vhost-user to any back-end. Blocking.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import socket
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Self

from avmm.errors import HostError
from avmm.native import CData, ffi, lib
from avmm.units import PAGE_BYTES, align_up
from avmm.vhost_user.message import F_PROTOCOL_FEATURES, ProtocolFeature, Request

F_INDIRECT_DESC = 1 << 28
F_EVENT_IDX = 1 << 29
F_VERSION_1 = 1 << 32
F_RING_PACKED = 1 << 34

MEMORY_GPA = 0x10_0000
"""Where our memory begins for the device: not where it begins for us."""

_TABLE_BYTES = 128
"""Of indirect table for each descriptor: see native/vdriver.h."""


_VERSION = 1
_REPLY = 1 << 2
_NEED_REPLY = 1 << 3
_HEADER = struct.Struct("<III")
_U64 = struct.Struct("<Q")
_VRING_STATE = struct.Struct("<II")
_VRING_ADDRESSES = struct.Struct("<IIQQQQ")
_MEMORY_TABLE = struct.Struct("<I4xQQQQ")
_CONFIG_HEAD = struct.Struct("<III")


def encode(request: Request, payload: bytes = b"", *, need_reply: bool = False) -> bytes:
    """A message as it goes over the socket."""
    flags = _VERSION | (_NEED_REPLY if need_reply else 0)
    return _HEADER.pack(request, flags, len(payload)) + payload


@dataclass(frozen=True, slots=True)
class RingPlace:
    """Guest physical addresses of one queue's parts."""

    desc_gpa: int
    driver_gpa: int
    device_gpa: int
    table_gpa: int
    end_gpa: int

    @classmethod
    def at(cls, gpa: int, size: int) -> Self:
        """Room for a split or a packed ring of `size` descriptors, one part after the other."""
        driver = gpa + 16 * size
        device = align_up(driver + 2 * size + 6, 64)
        table = align_up(device + 8 * size + 6, 64)
        return cls(gpa, driver, device, table, align_up(table + _TABLE_BYTES * size, PAGE_BYTES))


class FrontEnd:
    """One connection to the back-end at a socket, with `queues` rings of `size` descriptors.

    features: virtio features we would like; `features` afterwards is what was agreed upon.
    data_bytes: shared memory for requests, of each queue; it begins at `data_gpa`. counted_by: 2
    for a network device, where the protocol counts pairs of queues.
    Raises HostError("vhost-user") when the back-end is not there, refuses, or does not answer
    within timeout_s.
    """

    def __init__(
        self,
        path: str,
        *,
        queues: int,
        size: int = 256,
        features: int = F_EVENT_IDX | F_INDIRECT_DESC,
        data_bytes: int,
        counted_by: int = 1,
        timeout_s: float = 10.0,
    ) -> None:
        self._path = path
        self._acknowledge = False
        self.drivers: list[CData] = []
        with contextlib.ExitStack() as stack:
            self._socket = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
            self._socket.settimeout(timeout_s)
            with self._explained("connect"):
                self._socket.connect(path)
            self.features = self._negotiate(features)
            self.queues_max = counted_by * self._queues_max()
            if queues > self.queues_max:
                raise self._error("GET_QUEUE_NUM", f"it has {self.queues_max} queues, not {queues}")
            places = self._place(queues, size)
            self.data_gpa = places[-1].end_gpa
            self.data_bytes = align_up(data_bytes, PAGE_BYTES)
            self._share_memory(stack, self.data_gpa + queues * self.data_bytes - MEMORY_GPA)
            for index, place in enumerate(places):
                self._start_ring(stack, index, size, place)
            self._stack = stack.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop the rings and leave. The back-end is at rest when it has answered."""
        try:
            for index in range(len(self.drivers)):
                self.stop_ring(index)
        finally:
            self._stack.close()

    def stop_ring(self, index: int) -> int:
        """Stop a ring; where it stands."""
        state = self._ask(Request.GET_VRING_BASE, _VRING_STATE.pack(index, 0))
        return int(_VRING_STATE.unpack(state)[1])

    def read_config(self, offset: int, size_bytes: int) -> bytes:
        """A piece of the device's configuration space."""
        head = _CONFIG_HEAD.pack(offset, size_bytes, 0)
        answer = self._ask(Request.GET_CONFIG, head + bytes(size_bytes))
        if len(answer) != len(head) + size_bytes:
            raise self._error("GET_CONFIG", f"{size_bytes} bytes at {offset} were refused")
        return answer[len(head) :]

    def _negotiate(self, wanted: int) -> int:
        offered = self._ask_u64(Request.GET_FEATURES)
        needed = F_VERSION_1 | F_PROTOCOL_FEATURES
        if offered & needed != needed:
            raise self._error("GET_FEATURES", f"{offered:#x} lacks version 1 or the protocol's own")
        self.protocol = ProtocolFeature(
            self._ask_u64(Request.GET_PROTOCOL_FEATURES)
            & (ProtocolFeature.MQ | ProtocolFeature.REPLY_ACK | ProtocolFeature.CONFIG)
        )
        self._tell(Request.SET_PROTOCOL_FEATURES, _U64.pack(self.protocol))
        self._acknowledge = ProtocolFeature.REPLY_ACK in self.protocol
        self._tell(Request.SET_OWNER)
        agreed = offered & (wanted | needed)
        self._tell(Request.SET_FEATURES, _U64.pack(agreed))
        return agreed

    def _queues_max(self) -> int:
        if ProtocolFeature.MQ not in self.protocol:
            return 1
        return self._ask_u64(Request.GET_QUEUE_NUM)

    def _place(self, queues: int, size: int) -> list[RingPlace]:
        places: list[RingPlace] = []
        gpa = MEMORY_GPA
        for _ in range(queues):
            places.append(RingPlace.at(gpa, size))
            gpa = places[-1].end_gpa
        return places

    def _share_memory(self, stack: contextlib.ExitStack, size_bytes: int) -> None:
        memfd = os.memfd_create("avmm-front-end", os.MFD_CLOEXEC)
        try:
            os.ftruncate(memfd, size_bytes)
            self._map = mmap.mmap(memfd, size_bytes, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE)
            stack.callback(self._map.close)
            buffer = ffi.from_buffer("uint8_t[]", self._map)
            stack.callback(ffi.release, buffer)
            self.memory = ffi.new("struct av_gmem *")
            self.memory.count = 1
            region = self.memory.region[0]
            region.gpa, region.size_bytes, region.hva = MEMORY_GPA, size_bytes, buffer
            self._uva = int(ffi.cast("uintptr_t", buffer)) - MEMORY_GPA
            table = _MEMORY_TABLE.pack(1, MEMORY_GPA, size_bytes, self._uva + MEMORY_GPA, 0)
            self._tell(Request.SET_MEM_TABLE, table, memfd)
        finally:
            os.close(memfd)

    def _start_ring(
        self, stack: contextlib.ExitStack, index: int, size: int, place: RingPlace
    ) -> None:
        fds: list[int] = []
        for _ in range(3):
            fds.append(os.eventfd(0, os.EFD_CLOEXEC))
            stack.callback(os.close, fds[-1])
        kick_fd, call_fd, error_fd = fds
        setup = ffi.new("struct av_vdriver_setup *")
        setup.mem = self.memory
        setup.desc_gpa, setup.driver_gpa = place.desc_gpa, place.driver_gpa
        setup.device_gpa, setup.table_gpa = place.device_gpa, place.table_gpa
        setup.features, setup.size = self.features, size
        setup.kick_fd, setup.call_fd = kick_fd, call_fd
        error = ffi.new("int *")
        driver = lib.av_vdriver_create(setup, error)
        if not driver:
            raise HostError("vhost-user", op=f"Ring of {size}", errno=-error[0])
        stack.callback(lib.av_vdriver_destroy, driver)
        self.drivers.append(driver)
        areas = (place.desc_gpa, place.device_gpa, place.driver_gpa)
        addresses = [self._uva + gpa for gpa in areas]
        packed = bool(self.features & F_RING_PACKED)
        # A packed ring's place comes with its wrap counters, which begin at 1.
        base = 1 << 15 | 1 << 31 if packed else 0
        self._tell(Request.SET_VRING_NUM, _VRING_STATE.pack(index, size))
        self._tell(Request.SET_VRING_BASE, _VRING_STATE.pack(index, base))
        self._tell(Request.SET_VRING_ADDR, _VRING_ADDRESSES.pack(index, 0, *addresses, 0))
        self._tell(Request.SET_VRING_ERR, _U64.pack(index), error_fd)
        self._tell(Request.SET_VRING_CALL, _U64.pack(index), call_fd)
        self._tell(Request.SET_VRING_KICK, _U64.pack(index), kick_fd)
        self._tell(Request.SET_VRING_ENABLE, _VRING_STATE.pack(index, 1))

    def _tell(self, request: Request, payload: bytes = b"", *fds: int) -> None:
        """Send a request that has no answer of its own; wait for its acknowledgement, if agreed."""
        with self._explained(request.name):
            message = encode(request, payload, need_reply=self._acknowledge)
            socket.send_fds(self._socket, [message], fds)
        if self._acknowledge:
            (status,) = _U64.unpack(self._answer(request))
            if status:
                raise self._error(request.name, f"it was refused ({status})")

    def _ask(self, request: Request, payload: bytes = b"") -> bytes:
        with self._explained(request.name):
            self._socket.sendall(encode(request, payload))
        return self._answer(request)

    def _ask_u64(self, request: Request) -> int:
        return int(_U64.unpack(self._ask(request))[0])

    def _answer(self, request: Request) -> bytes:
        got, flags, size_bytes = _HEADER.unpack(self._receive(request, _HEADER.size))
        if got != request or not flags & _REPLY:
            raise self._error(request.name, f"the answer is to request {got}, flags {flags:#x}")
        return self._receive(request, size_bytes)

    def _receive(self, request: Request, size_bytes: int) -> bytes:
        data = b""
        while len(data) < size_bytes:
            with self._explained(request.name):
                more = self._socket.recv(size_bytes - len(data))
            if not more:
                raise self._error(request.name, "the back-end closed the connection")
            data += more
        return data

    @contextlib.contextmanager
    def _explained(self, op: str) -> Iterator[None]:
        try:
            yield
        except TimeoutError as e:
            raise self._error(op, "the back-end does not answer") from e
        except OSError as e:
            raise HostError("vhost-user", op=op, path=self._path, errno=e.errno) from e

    def _error(self, op: str, remedy: str) -> HostError:
        return HostError("vhost-user", op=op, path=self._path, remedy=remedy)
