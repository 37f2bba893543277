"""Devices that users write in Python, over real rings."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

import avmm
from avmm.units import KIB
from avmm.virtio import features, workers
from avmm.virtio.interrupt import CONFIG_CHANGE
from avmm.virtio.python_device import Chain, PythonDevice, ServedDevice, build, check_device
from avmm.virtio.state import DEVICE_NEEDS_RESET
from avmm.virtio.transport import mmio
from fakes.driver_queue import Segment
from fakes.mmio_driver import eventually, settle
from fakes.virtio_rig import DATA_GPA, Rig, virtio_rig

SLOT_BYTES = 0x1000
ANSWER_AT = 0x800


class Reverser(PythonDevice):
    """Answers with what it is told, backwards."""

    virtio_id = 50

    def __init__(self) -> None:
        self.calls: list[str] = []

    async def handle(self, chain: Chain) -> None:
        chain.write(chain.data[::-1])

    def activated(self, features: int) -> None:
        self.calls.append("activated")

    def was_reset(self) -> None:
        self.calls.append("reset")


class Gated(Reverser):
    """Each call waits until the test lets it go on, by what it was told."""

    def __init__(self) -> None:
        super().__init__()
        self.gates: dict[bytes, asyncio.Event] = {}
        self.begun: list[bytes] = []
        self.cancelled: list[bytes] = []

    async def handle(self, chain: Chain) -> None:
        self.begun.append(chain.data)
        try:
            await self.gates.setdefault(chain.data, asyncio.Event()).wait()
        except asyncio.CancelledError:
            self.cancelled.append(chain.data)
            raise
        await super().handle(chain)


class Requests:
    """A driver of any device: a request and its answer in a slot of memory each."""

    def __init__(self, rig: Rig[ServedDevice]) -> None:
        self.rig = rig
        self._slots = 0

    def submit(self, data: bytes, *, room: int = 64, queue: int = 0, kick: bool = True) -> int:
        slot = DATA_GPA + self._slots * SLOT_BYTES
        self._slots += 1
        self.rig.memory.write(slot, data)
        segments = [Segment(slot, len(data))] if data else []
        if room:
            segments.append(Segment(slot + ANSWER_AT, room, writable=True))
        self.rig.driver.queues[queue].offer(*segments)
        if kick:
            self.rig.driver.kick(queue)
        return slot

    def answer(self, slot: int, size: int) -> bytes:
        return self.rig.memory.read(slot + ANSWER_AT, size)

    async def request(self, data: bytes, *, room: int = 64, queue: int = 0) -> bytes:
        slot = self.submit(data, room=room, queue=queue)
        ((_, written),) = await self.rig.driver.used(queue)
        return self.answer(slot, written)


@asynccontextmanager
async def plugged(device: PythonDevice) -> AsyncIterator[tuple[Rig[ServedDevice], Requests]]:
    async with virtio_rig(lambda context: build(device, context)) as rig:
        await rig.driver.start()
        yield rig, Requests(rig)
        assert rig.errors == []


async def test_a_chain_is_handled_and_answered() -> None:
    async with plugged(Reverser()) as (rig, requests):
        assert await requests.request(b"abc") == b"cba"
        assert await requests.request(b"", room=8) == b""
        assert await requests.request(b"x" * 2000, room=2000) == b"x" * 2000
        assert rig.device.statistics().counters == {"failed": 0, "refused": 0}
        assert rig.device.statistics().queues[0].used == 3


async def test_a_chain_is_one_run_of_bytes_however_it_is_cut() -> None:
    async with plugged(Reverser()) as (rig, _):
        rig.memory.write(DATA_GPA, b"abcdefgh")
        rig.driver.queues[0].offer(
            *(Segment(DATA_GPA + at, size) for at, size in ((0, 1), (1, 5), (6, 2))),
            *(Segment(DATA_GPA + at, size, writable=True) for at, size in ((64, 3), (99, 100))),
        )
        rig.driver.kick(0)
        ((_, written),) = await rig.driver.used(0)
        assert written == 8
        assert rig.memory.read(DATA_GPA + 64, 3) + rig.memory.read(DATA_GPA + 99, 5) == b"hgfedcba"


async def test_many_are_under_way_and_end_in_any_order() -> None:
    device = Gated()
    async with plugged(device) as (rig, requests):
        slots = [requests.submit(bytes([i])) for i in range(30)]
        await eventually(lambda: len(device.begun) == 30)
        for i in (29, 0, 13):
            device.gates[bytes([i])].set()
            await rig.driver.used(0)
            assert requests.answer(slots[i], 1) == bytes([i])
        for gate in device.gates.values():
            gate.set()
        await rig.driver.used(0, 27)


async def test_no_more_are_under_way_than_the_queue_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    device = Gated()
    async with plugged(device) as (rig, requests):
        # What a driver that breaks the rules could bring about.
        monkeypatch.setattr(rig.device.queues[0], "size", 4)
        for i in range(10):
            requests.submit(bytes([i]), kick=False)
        rig.driver.kick(0)
        await settle()
        assert device.begun == [bytes([i]) for i in range(4)]
        rig.driver.kick(0)
        await settle()
        assert len(device.begun) == 4
        device.gates[b"\0"].set()
        await eventually(lambda: len(device.begun) == 5)
        while len(device.begun) < 10:
            for gate in device.gates.values():
                gate.set()
            await settle()


async def test_what_raises_gives_its_chain_back_empty_and_the_device_goes_on(
    caplog: pytest.LogCaptureFixture,
) -> None:
    class Picky(Reverser):
        async def handle(self, chain: Chain) -> None:
            chain.write(b"half an answer")
            if chain.data == b"bad":
                raise LookupError("no such thing")

    async with plugged(Picky()) as (rig, requests):
        assert await requests.request(b"bad") == b""
        assert await requests.request(b"good") == b"half an answer"
        assert await requests.request(b"good", room=3) == b"", "there is no room for it"
        assert rig.device.statistics().counters["failed"] == 2
        assert not rig.device.state.status & DEVICE_NEEDS_RESET
    assert "LookupError: no such thing" in caplog.text
    assert "14 more do not fit into the 3" in caplog.text


async def test_a_guest_fault_asks_for_a_reset() -> None:
    class Strict(Reverser):
        async def handle(self, chain: Chain) -> None:
            if chain.data == b"bad":
                raise avmm.GuestFault("key-value", "no such command")
            await super().handle(chain)

    async with plugged(Strict()) as (rig, requests):
        assert await requests.request(b"bad") == b""
        assert rig.driver.status() & DEVICE_NEEDS_RESET
        assert rig.device.statistics().last_fault == "key-value"
        await rig.driver.start()
        assert await Requests(rig).request(b"ok") == b"ko"


async def test_reset_cancels_what_is_under_way() -> None:
    device = Gated()
    async with plugged(device) as (rig, requests):
        slot = requests.submit(b"stuck")
        await eventually(lambda: device.begun == [b"stuck"])
        await rig.driver.set_status(0)
        assert device.cancelled == [b"stuck"]
        assert device.calls == ["reset", "activated", "reset"]  # drivers begin by a reset
        assert requests.answer(slot, 1) == b"\0"
        device.gates[b"go"] = asyncio.Event()
        device.gates[b"go"].set()
        await rig.driver.start()
        assert await Requests(rig).request(b"go") == b"og"
    assert device._driven is None


async def test_the_end_cancels_what_is_under_way() -> None:
    device = Gated()
    async with plugged(device) as (_, requests):
        requests.submit(b"stuck")
        await eventually(lambda: device.begun == [b"stuck"])
    assert device.cancelled == [b"stuck"]


async def test_a_handler_that_keeps_its_cancellation_to_itself_ends_by_it() -> None:
    class Polite(Gated):
        async def handle(self, chain: Chain) -> None:
            try:
                await super().handle(chain)
            except asyncio.CancelledError:
                chain.write(b"goodbye")

    device = Polite()
    async with plugged(device) as (rig, requests):
        requests.submit(b"stuck")
        await eventually(lambda: device.begun == [b"stuck"])
        async with asyncio.timeout(workers.CANCEL_S / 2):
            await rig.driver.set_status(0)
        assert rig.device._requests.in_flight == 0
        assert not rig.device._requests._tasks


async def test_a_handler_that_will_not_end_is_given_up(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(workers.Workers.cancel, "__kwdefaults__", {"timeout_s": 0.01})
    release, begun = asyncio.Event(), asyncio.Event()

    class Stubborn(Reverser):
        async def handle(self, chain: Chain) -> None:
            begun.set()
            while not release.is_set():
                try:
                    await release.wait()
                except asyncio.CancelledError:
                    continue
            await super().handle(chain)

    async with plugged(Stubborn()) as (rig, requests):
        slot = requests.submit(b"abc")
        await begun.wait()
        await rig.driver.set_status(0)
        assert "goes on after it was cancelled" in caplog.text
        (task,) = rig.device._requests._abandoned
        release.set()
        await task
        assert requests.answer(slot, 3) == bytes(3)
        await rig.driver.start()
        assert await Requests(rig).request(b"abc") == b"cba"


async def test_a_cancellation_of_its_own_fails_only_that_chain() -> None:
    class Waits(Reverser):
        async def handle(self, chain: Chain) -> None:
            if chain.data == b"bad":
                future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
                future.cancel()
                await future
            await super().handle(chain)

    async with plugged(Waits()) as (rig, requests):
        assert await requests.request(b"bad") == b""
        assert await requests.request(b"ok") == b"ko"
        assert rig.device.statistics().counters["failed"] == 1


async def test_quiesce_waits_for_requests() -> None:
    device = Gated()
    async with plugged(device) as (rig, requests):
        slot = requests.submit(b"ab")
        await eventually(lambda: device.begun == [b"ab"])
        quiescing = asyncio.create_task(rig.device.quiesce())
        await settle()
        assert not quiescing.done()
        device.gates[b"ab"].set()
        await quiescing
        assert requests.answer(slot, 2) == b"ba"
        requests.submit(b"later")
        await settle()
        assert device.begun == [b"ab"]
        await rig.device.resume()
        await eventually(lambda: device.begun == [b"ab", b"later"])


class Bell(Gated):
    """Queue 1 waits for what the host has to say."""

    queues = (64, 16)
    event_queues = (1,)


async def test_quiesce_does_not_wait_for_events_and_they_begin_anew() -> None:
    device = Bell()
    async with plugged(device) as (rig, requests):
        slots = [requests.submit(name, queue=1) for name in (b"a", b"b")]
        await eventually(lambda: len(device.begun) == 2)
        await rig.device.quiesce()
        assert sorted(device.cancelled) == [b"a", b"b"]
        assert rig.driver.queues[1].take_used() == []
        await rig.device.resume()
        await eventually(lambda: len(device.begun) == 4)
        device.gates[b"b"].set()
        await rig.driver.used(1)
        assert requests.answer(slots[1], 1) == b"b"
        assert await_free(device) == [b"a"]


def await_free(device: Gated) -> list[bytes]:
    return [name for name, gate in device.gates.items() if not gate.is_set()]


async def test_a_chain_that_is_too_long_comes_back_without_a_call() -> None:
    class Short(Reverser):
        data_max_bytes = 16
        queues = (16,)

    async with plugged(Short()) as (rig, requests):
        for _ in range(16):
            requests.submit(b"x" * 17, room=0, kick=False)
        rig.driver.kick(0)
        assert {written for _, written in await rig.driver.used(0, 16)} == {0}
        assert await requests.request(b"x" * 16) == b"x" * 16
        assert rig.device.statistics().counters["refused"] == 16


async def test_a_broken_ring_is_the_guests_fault() -> None:
    async with plugged(Reverser()) as (rig, _):
        kind = rig.driver.queues[0].offer_broken()
        rig.driver.kick(0)
        await eventually(lambda: bool(rig.driver.status() & DEVICE_NEEDS_RESET))
        assert rig.device.statistics().last_fault == kind


async def test_the_configuration_space_is_the_authors() -> None:
    class Configured(Reverser):
        config = b"\1\2\3\4"
        features = 1 << 3 | 1 << 63

        def config_written(self, offset: int, data: bytes) -> None:
            self.set_config(self.config[:offset] + data + self.config[offset + len(data) :])

        def counters(self) -> dict[str, int]:
            return {"mine": 7}

    device = Configured()
    async with plugged(device) as (rig, _):
        assert await rig.driver.read_features() & (1 << 63 | 1 << 3) == 1 << 63 | 1 << 3
        assert rig.driver.read(mmio.CONFIG) == 0x04030201
        device.set_config(b"\5\6\7\x08")
        assert await rig.driver.interrupted() & CONFIG_CHANGE
        assert rig.driver.read(mmio.CONFIG) == 0x08070605
        await rig.driver.write(mmio.CONFIG + 1, 9, size=1)
        assert rig.driver.read(mmio.CONFIG) == 0x08070905
        assert rig.device.statistics().counters["mine"] == 7


async def test_an_object_belongs_to_one_machine_at_a_time() -> None:
    device = Reverser()
    async with plugged(device):
        with pytest.raises(avmm.ConfigError, match="another machine's device"):
            async with plugged(device):
                pass
    async with plugged(device) as (_, requests):
        assert await requests.request(b"ab") == b"ba"


def made(**attributes: object) -> PythonDevice:
    return type("Odd", (Reverser,), attributes)()  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        ({"virtio_id": 0}, "Odd.virtio_id: 0 is not in 1 to 63"),
        ({"virtio_id": 64}, "Odd.virtio_id: 64 is not"),
        ({"queues": ()}, "Odd.queues: 0 is not in 1 to 64"),
        ({"queues": (64, 63)}, r"Odd.queues\[1\]: 63 is not a power of two"),
        ({"event_queues": (1,)}, "Odd.event_queues: there is no queue 1"),
        ({"features": features.VERSION_1}, "Odd.features: 0x100000000 is not for devices"),
        ({"config": "text"}, "Odd.config: it has to be bytes"),
        ({"config": bytes(4 * KIB)}, "Odd.config: it has to be bytes, 3840 at most"),
        ({"handle": lambda self, chain: None}, "Odd.handle: it has to be a coroutine"),
    ],
)
def test_what_cannot_be_a_device_is_refused_by_name(
    attributes: dict[str, object], message: str
) -> None:
    with pytest.raises(avmm.ConfigError, match=message):
        check_device(made(**attributes), "devices[0]")
    with pytest.raises(avmm.ConfigError, match=r"devices\[1\]: Odd"):
        avmm.Config(kernel="k", devices=[Reverser(), made(**attributes)])


def test_devices_of_python_are_not_for_files() -> None:
    with pytest.raises(avmm.ConfigError, match=r"devices\[0\]: 'x' is not PythonDevice"):
        avmm.Config.from_values({"kernel": "k", "devices": ["x"]}, "file")
