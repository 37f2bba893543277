"""An Ethernet switch in this process: NICs of microVMs and Python hosts, links that delay and lose
frames, captures. Frames are moved by C, a batch a turn of the event loop."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from dataclasses import replace
from typing import Any, Final, Protocol, Self

from avmm.errors import ConfigError, HostError
from avmm.hostnet.cable import QUEUE_DEFAULT_BYTES, CableEnd, FrameStream, make_cable
from avmm.hostnet.fabric import (
    CaptureStatistics,
    Fabric,
    Link,
    PortStatistics,
    SwitchStatistics,
)
from avmm.hostnet.names import parse_mac, random_mac
from avmm.loop import add_reader
from avmm.units import MIB

log = logging.getLogger(__name__)

_SNAP_MAX_BYTES: Final = 262_144
_LINK_QUEUE_BYTES: Final = 4 * MIB


class Attachable(Protocol):
    """What has a cable whose end a switch can take: a Nic."""

    def take_end(self, switch: str) -> CableEnd: ...
    def give_back_end(self) -> None: ...
    def set_link(self, up: bool) -> None: ...


class SwitchPort:
    """A port with a NIC's cable, or a Python host's, in it. Its switch's loop."""

    def __init__(self, switch: Switch, attached: Attachable, link: Link, queue_bytes: int) -> None:
        self._switch = switch
        self._attached: Attachable | None = attached
        self._link = link
        self._link_up = True
        self._final: PortStatistics | None = None
        fabric = switch._start()
        end = attached.take_end(repr(switch))
        try:
            self.number = fabric.attach(end, link, queue_bytes)
        except BaseException:
            attached.give_back_end()
            raise
        switch._ports.add(self)

    def __repr__(self) -> str:
        return f"<port {self.number} of {self._switch!r}>"

    @property
    def link(self) -> Link:
        """What the link does to frames."""
        return self._link

    @property
    def link_up(self) -> bool:
        """Whether the cable is in."""
        return self._link_up

    def change(self, **conditions: float | None) -> None:
        """Replace some of the link's conditions, see Switch.attach(), for frames from now on."""
        fabric = self._fabric()
        try:
            link = replace(self._link, **conditions)  # type: ignore[arg-type]
        except TypeError as e:
            raise ConfigError("link", f"{self!r}: {e}") from None
        fabric.set_link(self.number, link)
        self._link = link

    def set_link(self, up: bool) -> None:
        """Plug the cable in or out. Who is at its other end sees it; what is under way is lost,
        and who was behind this port is forgotten."""
        fabric = self._fabric()
        assert self._attached is not None
        self._attached.set_link(up)
        self._link_up = up
        if not up:
            fabric.cut(self.number)

    def detach(self) -> None:
        """Give the NIC's cable back to Python. Idempotent."""
        if self._attached is None or self._switch._fabric is None:
            return
        fabric = self._switch._fabric
        self._final = fabric.port_statistics(self.number)
        fabric.detach(self.number)
        self._switch._ports.discard(self)
        attached, self._attached = self._attached, None
        attached.give_back_end()

    def statistics(self) -> PortStatistics:
        """Counters as of now, or as they were at the end."""
        return self._final or self._fabric().port_statistics(self.number)

    def _fabric(self) -> Fabric:
        if self._attached is None or self._switch._fabric is None:
            raise ConfigError("switch", f"{self!r} was detached")
        return self._switch._fabric


class Port(FrameStream):
    """A host in Python on a switch: frames by `async for` and `await port.send(frame)`.

    mac: an address for this host; what it sends may have another. port: its place in the switch.
    Iterations end with close(), and with the switch.
    """

    def __init__(self, switch: Switch, mac: str | None, link: Link, queue_bytes: int) -> None:
        self.mac = mac or random_mac()
        parse_mac(self.mac, "Port")
        end, self._switch_end = make_cable(queue_bytes)
        super().__init__(end, f"Port {self.mac}")
        end.set_up(True)
        self._open = True
        self.port = SwitchPort(switch, self, link, _LINK_QUEUE_BYTES)

    def __repr__(self) -> str:
        return f"<{self._name} on {self.port!r}>"

    def close(self) -> None:
        """Leave the switch. Idempotent."""
        self.port.detach()

    # What follows is for the switch.

    def take_end(self, switch: str) -> CableEnd:
        """The switch's end."""
        self._switch_end.set_up(True)
        return self._switch_end

    def give_back_end(self) -> None:
        """The switch is gone."""
        self._open = False
        self._switch_end.set_up(False)
        self._no_longer_kept()

    def set_link(self, up: bool) -> None:
        """Frames pass, or are lost."""
        self._switch_end.set_up(up)

    def _is_over(self) -> bool:
        return not self._open

    def _keeps_waker(self) -> bool:
        return self._open

    def _check(self) -> None:
        """Python has its end for ever."""


class Capture:
    """A pcap file that is being written; `with` ends it."""

    def __init__(self, switch: Switch, path: str, file: int) -> None:
        self.path = path
        self._switch = switch
        self._file = file
        self._final: CaptureStatistics | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Finish the file. Idempotent."""
        if self._final is not None:
            return
        fabric = self._switch._fabric
        assert fabric is not None
        error = -fabric.capture(-1, 0, 0)
        final = fabric.statistics()[1]
        self._final = replace(final, error=os.strerror(error) if error else None)
        self._switch._capture = None
        os.close(self._file)
        if error:
            log.error("Capture %s: %s", self.path, self._final.error)

    def statistics(self) -> CaptureStatistics:
        """As of now, or as it was at the end."""
        if self._final is not None:
            return self._final
        assert self._switch._fabric is not None
        return self._switch._fabric.statistics()[1]


class Switch:
    """An Ethernet switch between NICs of microVMs and Python hosts, on the running loop:

        with avmm.Switch() as switch:
            one, other = avmm.Nic(), avmm.Nic()
            switch.attach(one)
            switch.attach(other, delay_s=0.01, loss=0.001)
            host = switch.port()

    It learns which address is behind which port and forgets it after a while; frames for a group
    or for nobody known go to all ports. Large frames pass from guest to guest as they are, with
    their offloads; who cannot take them gets them in segments. A port that reads slowly loses
    frames (PortStatistics.dropped) and does not hold up the others. As any plain switch it believes
    senders: who sends with another's address gets its frames until that one sends again.

    seed: of the links' loss and jitter, which for a port depend on nothing else. addresses_max,
    port_addresses_max: that it knows, of all ports and of each. age_s: an address that was not
    heard of for so long is forgotten. One loop, that of the first attach() or port(). Raises
    ConfigError.
    """

    def __init__(
        self,
        *,
        seed: int = 0,
        addresses_max: int = 4096,
        port_addresses_max: int = 256,
        age_s: float = 300.0,
        name: str = "switch",
    ) -> None:
        self.name = name
        self._settings: dict[str, Any] = {
            "seed": seed,
            "addresses_max": addresses_max,
            "port_addresses_max": port_addresses_max,
            "age_s": age_s,
        }
        Fabric(**self._settings).close()  # a bad value shows where it is given
        self._fabric: Fabric | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._again: asyncio.Handle | None = None
        self._ports: set[SwitchPort] = set()
        self._capture: Capture | None = None
        self._closed = False

    def __repr__(self) -> str:
        return f"<Switch {self.name}>"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def attach(
        self,
        nic: Attachable,
        *,
        delay_s: float = 0.0,
        jitter_s: float = 0.0,
        loss: float = 0.0,
        bits_per_s: float | None = None,
        queue_bytes: int = _LINK_QUEUE_BYTES,
    ) -> SwitchPort:
        """Put a NIC's cable into a new port, before or while its microVM runs. Microvms come and
        go; the cable stays until detach() or close().

        The conditions hold in each direction, so an echo has twice the delay of both links.
        delay_s, jitter_s: how long a frame is under way, and up to how much more; frames stay in
        order. loss: the part of frames that is lost; large ones are segmented first. bits_per_s:
        None for no limit. queue_bytes: of frames under way; towards the switch more wait at their
        sender, from the switch they are dropped. Raises ConfigError, HostError.
        """
        return SwitchPort(self, nic, Link(delay_s, jitter_s, loss, bits_per_s), queue_bytes)

    def port(
        self,
        mac: str | None = None,
        *,
        delay_s: float = 0.0,
        jitter_s: float = 0.0,
        loss: float = 0.0,
        bits_per_s: float | None = None,
        queue_bytes: int = QUEUE_DEFAULT_BYTES,
    ) -> Port:
        """A port for a host in Python. mac: its address, at random by default. queue_bytes: of
        frames that wait to be received; the rest is as for attach()."""
        return Port(self, mac, Link(delay_s, jitter_s, loss, bits_per_s), queue_bytes)

    def capture(
        self, path: str | os.PathLike[str], *, snap_bytes: int = 65_549, max_bytes: int = 0
    ) -> Capture:
        """Write every frame that enters the switch to a new pcap file: once, when it has come
        through its sender's link; complete, large ones in segments. Wireshark, tcpdump and scapy
        read it.

        snap_bytes: of each frame, at most. max_bytes: of the file; 0 for no limit. When it is full
        or cannot be written, the switch goes on without (CaptureStatistics). One at a time.
        Raises ConfigError, HostError.
        """
        fabric = self._start()
        if self._capture is not None:
            raise ConfigError("capture", f"{self!r} is captured to {self._capture.path} already")
        if not 1 <= snap_bytes <= _SNAP_MAX_BYTES or max_bytes < 0:
            raise ConfigError(
                "capture",
                f"snap_bytes={snap_bytes} is not in 1 to {_SNAP_MAX_BYTES}, or "
                f"max_bytes={max_bytes} is negative",
            )
        text = os.fspath(path)
        try:
            file = os.open(text, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
        except OSError as e:
            raise HostError("capture", op="open", path=text, errno=e.errno) from e
        result = fabric.capture(file, snap_bytes, max_bytes)
        if result < 0:
            fabric.capture(-1, 0, 0)
            os.close(file)
            raise HostError("capture", op="write", path=text, errno=-result)
        self._capture = Capture(self, text, file)
        return self._capture

    def statistics(self) -> SwitchStatistics:
        """Counters as of now."""
        if self._fabric is None:
            return SwitchStatistics(0, 0, 0, 0, 0, 0)
        return self._fabric.statistics()[0]

    def find(self, mac: str) -> SwitchPort | None:
        """The port behind which an address is known."""
        if self._fabric is None:
            return None
        number = self._fabric.find(parse_mac(mac, repr(self)), time.monotonic_ns())
        return next((port for port in self._ports if port.number == number), None)

    def close(self) -> None:
        """End captures, detach all ports and give everything back. On its loop; idempotent."""
        self._closed = True
        fabric = self._fabric
        if fabric is None:
            return
        if self._capture is not None:
            self._capture.close()
        for port in tuple(self._ports):
            port.detach()
        if self._again is not None:
            self._again.cancel()
        if self._loop is not None and not self._loop.is_closed():
            self._loop.remove_reader(fabric.fd)
        self._fabric = None
        fabric.close()

    def _start(self) -> Fabric:
        if self._closed:
            raise ConfigError("switch", f"{self!r} was closed")
        loop = asyncio.get_running_loop()
        if self._fabric is None:
            fabric = Fabric(**self._settings)
            try:
                add_reader(loop, fabric.fd, self._turn)
            except BaseException:
                fabric.close()
                raise
            self._loop, self._fabric = loop, fabric
        if self._loop is not loop:
            raise ConfigError("loop", f"{self!r} runs on another event loop")
        return self._fabric

    def _turn(self) -> None:
        self._again = None
        assert self._fabric is not None
        assert self._loop is not None
        more, _ = self._fabric.turn(time.monotonic_ns(), time.time_ns())
        if more:
            self._again = self._loop.call_soon(self._turn)
