"""Credit counters, beside a model that counts without end (virtio 1.3 section 5.10.6.3)."""

from __future__ import annotations

import random

import pytest

from avmm.vsock.credit import BUFFER_BYTES, UPDATE_BYTES, Credit

WRAP = 1 << 32


@pytest.mark.parametrize("seed", range(20))
def test_counters_wrap_and_hold(seed: int) -> None:
    rng = random.Random(seed)
    credit = Credit()
    sent = read = received = forwarded = 0
    alloc = 0
    for _ in range(3000):
        step = rng.randrange(4)
        if step == 0:
            alloc = rng.choice((0, 1, 5000, 1 << 20, WRAP - 1))
            read += rng.randrange(sent - read + 1)
            assert credit.hear(alloc, read % WRAP)
        elif step == 1:
            count = rng.randrange(min(credit.room, 1 << 28) + 1)
            credit.send(count)
            sent += count
        elif step == 2:
            count = rng.randrange(2 * BUFFER_BYTES)
            fits = received + count - forwarded <= BUFFER_BYTES
            assert credit.receive(count) == fits
            received += count if fits else 0
        else:
            count = rng.randrange(received - forwarded + 1)
            credit.forward(count)
            forwarded += count
        assert credit.room == max(0, alloc - (sent - read))
        assert credit.unread == received - forwarded
        assert credit.forwarded == forwarded % WRAP
    if seed == 0:
        assert sent > WRAP, "the counters never wrapped"


def test_a_guest_cannot_have_read_what_it_was_not_sent() -> None:
    credit = Credit()
    assert credit.hear(1000, 0)
    credit.send(10)
    assert not credit.hear(1000, 11)
    assert credit.hear(1000, 10)
    assert not credit.hear(1000, 9)  # nor give back what it has read
    assert credit.room == 1000


def test_the_guest_is_told_when_there_is_much_more_room() -> None:
    credit = Credit()
    assert credit.receive(BUFFER_BYTES)
    credit.forward(UPDATE_BYTES - 1)
    assert not credit.update_due
    credit.forward(1)
    assert credit.update_due
    credit.tell()
    assert not credit.update_due
