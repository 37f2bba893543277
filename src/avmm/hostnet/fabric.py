"""What an in-process switch is made of, without a loop: the native switch, links, statistics."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from typing import Final

from avmm.errors import ConfigError, HostError
from avmm.hostnet.cable import QUEUE_MAX_BYTES, QUEUE_MIN_BYTES, CableEnd
from avmm.native import CData, ffi, lib

_ALL_OFFLOADS: Final = 0xF
_DELAY_MAX_S: Final = 3600.0
_ADDRESSES_MAX: Final = 1 << 20


@dataclass(frozen=True, slots=True)
class PortStatistics:
    """One port's frames since it was attached, as the switch sees them.

    in_frames, in_bytes: that came in; out_frames, out_bytes: that went out. lost: by the link's
    loss, both ways. dropped: for which there was no room: in the link while they were delayed, or
    with a reader that is too slow. down: for which nobody was there. refused: with a group's
    address as their sender's. in_flight_frames: delayed, now. addresses: known behind it.
    """

    in_frames: int
    in_bytes: int
    out_frames: int
    out_bytes: int
    lost: int
    dropped: int
    down: int
    refused: int
    in_flight_frames: int
    addresses: int


@dataclass(frozen=True, slots=True)
class SwitchStatistics:
    """A switch's frames since it was made.

    flooded: sent to all other ports, being for a group or for nobody known. same_port: not
    forwarded, for they are for somebody behind the port from which they came. moved: addresses
    that turned up behind another port. unlearned: frames whose sender found no place in the table.
    addresses: known now.
    """

    frames: int
    flooded: int
    same_port: int
    moved: int
    unlearned: int
    addresses: int


@dataclass(frozen=True, slots=True)
class CaptureStatistics:
    """frames, bytes: in the file. missed: frames after it was full or could not be written;
    error: why it could not."""

    frames: int
    bytes: int
    missed: int
    error: str | None


@dataclass(frozen=True, slots=True)
class Link:
    """What a port's link does to frames, in each direction. Raises ConfigError("link")."""

    delay_s: float = 0.0
    jitter_s: float = 0.0
    loss: float = 0.0
    bits_per_s: float | None = None

    def __post_init__(self) -> None:
        for name in ("delay_s", "jitter_s"):
            if not 0 <= (value := getattr(self, name)) <= _DELAY_MAX_S:
                raise ConfigError("link", f"{name}: {value} is not in 0 to {_DELAY_MAX_S:g}")
        if not 0 <= self.loss <= 1:
            raise ConfigError("link", f"loss: {self.loss} is not in 0 to 1")
        rate = self.bits_per_s
        if rate is not None and not (rate >= 8 and math.isfinite(rate)):
            raise ConfigError("link", f"bits_per_s: {rate} is not 8 or more")

    # What follows is for the switch.

    def native(self) -> CData:
        """A `struct av_switch_link *`."""
        link = ffi.new("struct av_switch_link *")
        link.delay_ns = round(self.delay_s * 1e9)
        link.jitter_ns = round(self.jitter_s * 1e9)
        link.loss = round(self.loss * 2**32)
        link.bytes_per_s = round((self.bits_per_s or 0) / 8)
        return link


class Fabric:
    """The switch itself, without a loop: it moves frames when it is told what time it is.

    See `Switch` for the parameters. Owns its descriptors. Raises ConfigError, HostError.
    """

    def __init__(
        self, *, seed: int, addresses_max: int, port_addresses_max: int, age_s: float
    ) -> None:
        for name, value in (
            ("addresses_max", addresses_max),
            ("port_addresses_max", port_addresses_max),
        ):
            if not 1 <= value <= _ADDRESSES_MAX:
                raise ConfigError("switch", f"{name}: {value} is not in 1 to {_ADDRESSES_MAX}")
        if not 0 < age_s < 1e9:
            raise ConfigError("switch", f"age_s: {age_s} is not a positive number of seconds")
        setup = ffi.new("struct av_switch_setup *")
        setup.seed = seed & (2**64 - 1)
        setup.age_ns = round(age_s * 1e9)
        setup.addresses_max = addresses_max
        setup.port_addresses_max = port_addresses_max
        error = ffi.new("int *")
        native = lib.av_switch_create(setup, error)
        if not native:
            raise HostError("switch", op="Switch", errno=error[0])
        self._native: CData = ffi.gc(native, lib.av_switch_destroy)
        self._ends: dict[int, CableEnd] = {}
        self._next_ns = ffi.new("uint64_t *")
        self.fd = int(lib.av_switch_fd(self._native))

    def close(self) -> None:
        """Let go of all ends. Once."""
        for port in tuple(self._ends):
            self.detach(port)
        ffi.release(self._native)

    def attach(self, end: CableEnd, link: Link, queue_bytes: int) -> int:
        """The number of a new port; `end` is up already."""
        if not QUEUE_MIN_BYTES <= queue_bytes <= QUEUE_MAX_BYTES:
            raise ConfigError(
                "queue",
                f"queue_bytes: {queue_bytes} is not in {QUEUE_MIN_BYTES} to {QUEUE_MAX_BYTES}",
            )
        port = int(lib.av_switch_attach(self._native, end.native, queue_bytes))
        if port < 0:
            raise HostError("memory", op="Switch port", errno=-port)
        self._ends[port] = end
        try:
            self.set_link(port, link)
        except BaseException:
            self.detach(port)
            raise
        end.set_patient(True)
        end.set_offloads(_ALL_OFFLOADS)
        end.watch(int(lib.av_switch_event_fd(self._native)))
        return port

    def detach(self, port: int) -> None:
        """What is under way on its link is lost."""
        end = self._ends.pop(port)
        end.watch(-1)
        end.set_patient(False)
        end.set_offloads(0)
        lib.av_switch_detach(self._native, port)

    def set_link(self, port: int, link: Link) -> None:
        """For frames from now on."""
        result = lib.av_switch_set_link(self._native, port, link.native())
        if result < 0:
            raise HostError("memory", op="Switch port", errno=-result)

    def cut(self, port: int) -> None:
        """What is under way on its link is lost, and who was behind it is forgotten."""
        lib.av_switch_cut(self._native, port)

    def turn(self, now_ns: int, wall_ns: int) -> tuple[bool, int]:
        """Move what is due, a bounded amount: whether there is more to do at once, and when the
        next turn is due, 0 for when `fd` is readable."""
        more = bool(lib.av_switch_turn(self._native, now_ns, wall_ns, self._next_ns))
        return more, int(self._next_ns[0])

    def find(self, mac: bytes, now_ns: int) -> int | None:
        """The port behind which an address is known."""
        port = int(lib.av_switch_find(self._native, mac, now_ns))
        return None if port < 0 else port

    def capture(self, fd: int, snap_bytes: int, max_bytes: int) -> int:
        """Begin to write to a file, or with -1 end it; 0 or -errno."""
        return int(lib.av_switch_capture(self._native, fd, snap_bytes, max_bytes))

    def statistics(self) -> tuple[SwitchStatistics, CaptureStatistics]:
        """As of now."""
        s = ffi.new("struct av_switch_stats *")
        error = -lib.av_switch_statistics(self._native, s)
        own = SwitchStatistics(s.frames, s.flooded, s.same_port, s.moved, s.unlearned, s.addresses)
        text = os.strerror(error) if error else None
        return own, CaptureStatistics(s.captured_frames, s.captured_bytes, s.uncaptured, text)

    def port_statistics(self, port: int) -> PortStatistics:
        """As of now."""
        s = ffi.new("struct av_switch_port_stats *")
        lib.av_switch_port_statistics(self._native, port, s)
        names = PortStatistics.__dataclass_fields__
        return PortStatistics(**{name: int(getattr(s, name)) for name in names})
