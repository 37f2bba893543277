"""vhost-user messages: what is taken apart, and what is refused. No sockets."""

from __future__ import annotations

import contextlib
import random
import struct

import pytest

from avmm.errors import GuestFault
from avmm.vhost_user import message
from avmm.vhost_user.message import (
    U64,
    ConfigAccess,
    Header,
    InflightMemory,
    MemoryTable,
    Payload,
    Request,
    TableRegion,
    VringAddresses,
    VringFile,
    VringState,
)

REGION = struct.pack("<QQQQ", 0x1000, 0x2000, 0x7000, 0x3000)
TABLE_REGION = TableRegion(gpa=0x1000, size_bytes=0x2000, uva=0x7000, offset_bytes=0x3000)
NUMBER = struct.pack("<Q", 0x1_4000_0000)
STATE = struct.pack("<II", 1, 64)
ADDRESSES = struct.pack("<IIQQQQ", 1, 0, 0x10, 0x20, 0x30, 0)
INFLIGHT = struct.pack("<QQHH", 4096, 64, 2, 128)
CONFIG = struct.pack("<III", 4, 2, 0) + b"ab"

GOOD: list[tuple[Request, bytes, int, Payload]] = [
    (Request.GET_FEATURES, b"", 0, None),
    (Request.SET_FEATURES, NUMBER, 0, U64(0x1_4000_0000)),
    (Request.SET_OWNER, b"", 0, None),
    (Request.RESET_OWNER, b"", 0, None),
    (Request.SET_MEM_TABLE, struct.pack("<II", 1, 0) + REGION, 1, MemoryTable((TABLE_REGION,))),
    (
        Request.SET_MEM_TABLE,
        struct.pack("<II", 2, 0) + REGION * 8,
        2,
        MemoryTable((TABLE_REGION, TABLE_REGION)),
    ),
    (Request.SET_VRING_NUM, STATE, 0, VringState(1, 64)),
    (
        Request.SET_VRING_ADDR,
        ADDRESSES,
        0,
        VringAddresses(1, desc_uva=0x10, driver_uva=0x30, device_uva=0x20),
    ),
    (Request.SET_VRING_BASE, STATE, 0, VringState(1, 64)),
    (Request.GET_VRING_BASE, STATE, 0, VringState(1, 64)),
    (Request.SET_VRING_KICK, struct.pack("<Q", 3), 1, VringFile(3, has_fd=True)),
    (Request.SET_VRING_CALL, struct.pack("<Q", 3 | 1 << 8), 0, VringFile(3, has_fd=False)),
    (Request.SET_VRING_ERR, struct.pack("<Q", 3), 1, VringFile(3, has_fd=True)),
    (Request.GET_PROTOCOL_FEATURES, b"", 0, None),
    (Request.SET_PROTOCOL_FEATURES, NUMBER, 0, U64(0x1_4000_0000)),
    (Request.GET_QUEUE_NUM, b"", 0, None),
    (Request.SET_VRING_ENABLE, STATE, 0, VringState(1, 64)),
    (Request.SET_BACKEND_REQ_FD, b"", 1, None),
    (Request.GET_CONFIG, CONFIG, 0, ConfigAccess(4, b"ab")),
    (Request.SET_CONFIG, CONFIG, 0, ConfigAccess(4, b"ab")),
    (Request.GET_INFLIGHT_FD, INFLIGHT, 0, InflightMemory(4096, 64, 2, 128, 20)),
    (Request.GET_INFLIGHT_FD, INFLIGHT + bytes(4), 0, InflightMemory(4096, 64, 2, 128, 24)),
    (Request.SET_INFLIGHT_FD, INFLIGHT, 1, InflightMemory(4096, 64, 2, 128, 20)),
    (Request.RESET_DEVICE, b"", 0, None),
]
GOOD_IDS = [f"{request.name}-{fds}" for request, _, fds, _ in GOOD]


def parse(request: Request, payload: bytes, fds: int) -> message.Message | None:
    return message.parse(Header(request, False, len(payload)), payload, fds)


def test_every_request_has_a_case() -> None:
    assert {request for request, *_ in GOOD} == set(Request)


@pytest.mark.parametrize(("request_", "payload", "fds", "parsed"), GOOD, ids=GOOD_IDS)
def test_good_messages(request_: Request, payload: bytes, fds: int, parsed: Payload) -> None:
    found = parse(request_, payload, fds)
    assert found is not None
    assert (found.request, found.payload) == (request_, parsed)


@pytest.mark.parametrize(("request_", "payload", "fds", "parsed"), GOOD, ids=GOOD_IDS)
def test_other_sizes_and_numbers_of_descriptors_are_refused(
    request_: Request, payload: bytes, fds: int, parsed: Payload
) -> None:
    bad = [(payload, fds + 1), (payload + b"x", fds), (payload, 9)]
    if payload:
        bad.append((payload[:-1], fds))
    if fds:
        bad.append((payload, fds - 1))
    for other, count in bad:
        with pytest.raises(GuestFault, match=request_.name):
            parse(request_, other, count)


@pytest.mark.parametrize("payload", [b"", bytes(3), bytes(7)])
def test_a_payload_cut_short_is_refused(payload: bytes) -> None:
    for request in (Request.SET_FEATURES, Request.SET_MEM_TABLE, Request.GET_CONFIG):
        with pytest.raises(GuestFault, match="bytes of payload"):
            parse(request, payload, 0)


@pytest.mark.parametrize("count", [0, 9, 0xFFFF_FFFF])
def test_a_table_of_no_or_too_many_regions_is_refused(count: int) -> None:
    payload = struct.pack("<II", count, 0) + REGION * 8
    with pytest.raises(GuestFault, match=f"{count} regions"):
        parse(Request.SET_MEM_TABLE, payload, min(count, 8))


def test_a_ring_index_with_unknown_bits_is_refused() -> None:
    with pytest.raises(GuestFault, match="no ring's index"):
        parse(Request.SET_VRING_KICK, struct.pack("<Q", 1 << 9), 1)


def test_a_log_of_writes_is_refused() -> None:
    with pytest.raises(GuestFault, match="log"):
        parse(Request.SET_VRING_ADDR, struct.pack("<IIQQQQ", 0, 1, 0, 0, 0, 0), 0)


@pytest.mark.parametrize(
    ("offset", "announced", "came"), [(0, 3, 2), (0, 0, 0), (255, 2, 2), (0xFFFF_FFFF, 1, 1)]
)
def test_configuration_outside_of_the_space_is_refused(
    offset: int, announced: int, came: int
) -> None:
    payload = struct.pack("<III", offset, announced, 0) + bytes(came)
    with pytest.raises(GuestFault, match="GET_CONFIG"):
        parse(Request.GET_CONFIG, payload, 0)


@pytest.mark.parametrize(("queues", "size"), [(0, 128), (1, 0), (1, 1025)])
def test_no_ring_has_that_in_flight(queues: int, size: int) -> None:
    with pytest.raises(GuestFault, match="queues of"):
        parse(Request.GET_INFLIGHT_FD, struct.pack("<QQHH", 0, 0, queues, size), 0)


def test_an_unknown_request_has_no_message() -> None:
    assert message.parse(Header(9999, True, 0), b"", 3) is None


def test_headers() -> None:
    header = message.parse_header(struct.pack("<III", 1, 1, 8))
    assert (header.request, header.need_reply, header.size_bytes) == (1, False, 8)
    assert message.parse_header(struct.pack("<III", 1, 1 | 1 << 3, 0)).need_reply
    assert message.parse_header(struct.pack("<III", 9999, 1, 0)).name == "request 9999"


@pytest.mark.parametrize(
    ("flags", "size"),
    [(0, 0), (2, 0), (3, 0), (1 | 1 << 2, 0), (1 | 1 << 4, 0), (1, 1000), (1, 0xFFFF_FFFF)],
)
def test_headers_of_another_version_with_unknown_flags_or_too_long_are_refused(
    flags: int, size: int
) -> None:
    with pytest.raises(GuestFault):
        message.parse_header(struct.pack("<III", 1, flags, size))


def test_answers() -> None:
    assert message.reply(1, message.u64(5)) == struct.pack("<IIIQ", 1, 5, 8, 5)
    assert message.vring_state(1, 7) == struct.pack("<II", 1, 7)
    memory = InflightMemory(4096, 64, 2, 128, 24)
    assert message.inflight(memory) == INFLIGHT + bytes(4)
    assert message.config_change() == struct.pack("<III", 2, 1, 0)
    assert message.config(ConfigAccess(4, b"ab"), b"xy") == struct.pack("<III", 4, 2, 0) + b"xy"


def test_random_bytes_are_parsed_or_refused() -> None:
    rng = random.Random(1)
    for _ in range(20_000):
        payload = rng.randbytes(rng.choice((0, 4, 8, 12, 13, 40, 48, 264)))
        if rng.random() < 0.5 and payload:
            payload = bytes([rng.randint(0, 9)]) + bytes(len(payload) - 1)
        header = struct.pack("<III", rng.randint(0, 45), rng.choice((1, 9, 5)), len(payload))
        with contextlib.suppress(GuestFault):
            message.parse(message.parse_header(header), payload, rng.randint(0, 9))
