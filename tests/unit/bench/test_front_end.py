"""The vhost-user front-end: what it sends, against a back-end that only writes it down."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from avmm.bench.front_end import (
    F_EVENT_IDX,
    F_INDIRECT_DESC,
    F_RING_PACKED,
    F_VERSION_1,
    MEMORY_GPA,
    FrontEnd,
    RingPlace,
    encode,
)
from avmm.errors import HostError
from avmm.vhost_user.message import F_PROTOCOL_FEATURES, ProtocolFeature, Request

ALL = F_VERSION_1 | F_PROTOCOL_FEATURES | F_EVENT_IDX | F_INDIRECT_DESC | F_RING_PACKED


@dataclass
class BackEnd:
    """Answers as it is told. answers: request to payload; refuse: acknowledged with 1."""

    answers: dict[int, bytes]
    refuse: int | None = None
    messages: list[tuple[int, bytes, int]] = field(default_factory=list)

    def payload(self, request: int) -> bytes:
        return next(data for number, data, _ in self.messages if number == request)

    def serve(self, listener: socket.socket) -> None:
        connection, _ = listener.accept()
        with connection:
            while True:
                data, fds, _, _ = socket.recv_fds(connection, 12, 8)
                if not data:
                    return
                request, flags, size = struct.unpack("<III", data)
                payload = connection.recv(size) if size else b""
                for fd in fds:
                    os.close(fd)
                self.messages.append((request, payload, len(fds)))
                answer = self.answers.get(request)
                if answer is None and flags & 8:
                    answer = struct.pack("<Q", request == self.refuse)
                if answer is not None:
                    connection.sendall(struct.pack("<III", request, 5, len(answer)) + answer)


@pytest.fixture
def answers() -> dict[int, bytes]:
    protocol = ProtocolFeature.MQ | ProtocolFeature.REPLY_ACK | ProtocolFeature.CONFIG
    return {
        Request.GET_FEATURES: struct.pack("<Q", ALL),
        Request.GET_PROTOCOL_FEATURES: struct.pack("<Q", protocol),
        Request.GET_QUEUE_NUM: struct.pack("<Q", 2),
        Request.GET_VRING_BASE: struct.pack("<II", 0, 7),
        Request.GET_CONFIG: struct.pack("<IIIQ", 0, 8, 0, 2048),
    }


@contextlib.contextmanager
def served(path: Path, back_end: BackEnd) -> Iterator[str]:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path / "s"))
        listener.listen()
        thread = threading.Thread(target=back_end.serve, args=(listener,))
        thread.start()
        try:
            yield str(path / "s")
        finally:
            thread.join()


def test_a_message_is_its_header_and_payload() -> None:
    assert encode(Request.SET_FEATURES, b"12345678") == struct.pack("<III", 2, 1, 8) + b"12345678"
    assert encode(Request.SET_OWNER, need_reply=True) == struct.pack("<III", 3, 9, 0)


def test_a_connection_starts_and_stops_its_rings(tmp_path: Path, answers: dict[int, bytes]) -> None:
    back_end = BackEnd(answers)
    with served(tmp_path, back_end) as path, FrontEnd(path, queues=2, data_bytes=100) as front:
        assert front.features == F_VERSION_1 | F_PROTOCOL_FEATURES | F_EVENT_IDX | F_INDIRECT_DESC
        assert struct.unpack("<Q", front.read_config(0, 8)) == (2048,)
        assert front.stop_ring(0) == 7
    sent = [(Request(number).name, fds) for number, _, fds in back_end.messages]
    ring = [
        *(("SET_VRING_NUM", 0), ("SET_VRING_BASE", 0), ("SET_VRING_ADDR", 0)),
        *(("SET_VRING_ERR", 1), ("SET_VRING_CALL", 1), ("SET_VRING_KICK", 1)),
        ("SET_VRING_ENABLE", 0),
    ]
    assert sent == [
        *(("GET_FEATURES", 0), ("GET_PROTOCOL_FEATURES", 0), ("SET_PROTOCOL_FEATURES", 0)),
        *(("SET_OWNER", 0), ("SET_FEATURES", 0), ("GET_QUEUE_NUM", 0), ("SET_MEM_TABLE", 1)),
        *(*ring, *ring, ("GET_CONFIG", 0)),
        *(("GET_VRING_BASE", 0),) * 3,
    ]
    count, gpa, size, uva, offset = struct.unpack("<I4xQQQQ", back_end.payload(5))
    assert (count, gpa, offset) == (1, MEMORY_GPA, 0)
    _, flags, desc, used, avail, _ = struct.unpack("<IIQQQQ", back_end.payload(9))
    place = RingPlace.at(MEMORY_GPA, 256)
    places = (place.desc_gpa, place.device_gpa, place.driver_gpa)
    assert flags == 0
    assert tuple(at - uva + gpa for at in (desc, used, avail)) == places
    assert place.end_gpa <= front.data_gpa
    assert front.data_gpa + 2 * front.data_bytes == gpa + size


def test_a_packed_ring_begins_with_both_wrap_counters_set(
    tmp_path: Path, answers: dict[int, bytes]
) -> None:
    back_end = BackEnd(answers)
    with (
        served(tmp_path, back_end) as path,
        FrontEnd(path, queues=1, data_bytes=1, features=F_RING_PACKED) as front,
    ):
        assert front.features & F_RING_PACKED
    assert struct.unpack("<II", back_end.payload(Request.SET_VRING_BASE)) == (0, 0x8000_8000)


def test_without_a_reply_ack_nothing_is_waited_for(
    tmp_path: Path, answers: dict[int, bytes]
) -> None:
    answers[Request.GET_PROTOCOL_FEATURES] = struct.pack("<Q", 0)
    back_end = BackEnd(answers)
    with served(tmp_path, back_end) as path, FrontEnd(path, queues=1, data_bytes=1) as front:
        assert front.queues_max == 1


@pytest.mark.parametrize(
    ("change", "refuse", "message"),
    [
        ({Request.GET_FEATURES: struct.pack("<Q", 0)}, None, "lacks version 1"),
        ({}, Request.SET_MEM_TABLE, "SET_MEM_TABLE .*refused"),
        ({Request.GET_QUEUE_NUM: struct.pack("<Q", 1)}, None, "1 queues, not 2"),
    ],
)
def test_a_back_end_that_will_not_is_a_host_error(
    tmp_path: Path,
    answers: dict[int, bytes],
    change: dict[int, bytes],
    refuse: int | None,
    message: str,
) -> None:
    back_end = BackEnd(answers | change, refuse)
    with (
        served(tmp_path, back_end) as path,
        pytest.raises(HostError, match=message),
    ):
        FrontEnd(path, queues=2, data_bytes=1)


def test_a_socket_nobody_listens_at_is_named(tmp_path: Path) -> None:
    with pytest.raises(HostError, match=str(tmp_path / "none")):
        FrontEnd(str(tmp_path / "none"), queues=1, data_bytes=1)
