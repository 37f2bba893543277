"""What a suite is, and the list of them.

A suite is a module with a function `cases(options)`, which measures one row after the other and
yields each as it is done. A new one adds its module and its line in SUITES. Suites that measure
together share a module.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Literal, Protocol, cast

from avmm.bench.record import Case, Record, this_host
from avmm.errors import HostError

PEERS = ("qemu-storage-daemon", "qemu", "qemu-microvm", "kvmtool", "vhost")
GROUPS = ("blk", "net", "boot", "exits", "embed", "attack")
ALL = ("blk", "net", "boot", "exits", "embed")
"""What `avmm bench all` measures: how fast avmm is. attack is about how little a guest can take."""

Group = Literal["blk", "net", "boot", "exits", "embed", "attack"]
Ground = Literal["native", "guest"]


@dataclass(frozen=True, slots=True)
class Options:
    """What the user asked for.

    peers: names of PEERS to run beside us, where a suite knows them. runs: of each contender;
    the median counts. seconds: of one measurement. say: takes a line of progress. leave_out:
    takes what could not be measured and why, for the record. suites: their names, of a module that
    holds several.
    """

    peers: tuple[str, ...] = PEERS
    runs: int = 3
    seconds: float = 1.0
    say: Callable[[str], None] = field(default=lambda text: None)
    leave_out: Callable[[str], None] = field(default=lambda text: None)
    suites: tuple[str, ...] = ()

    def wants(self, peer: str) -> bool:
        """Whether a peer is to take part."""
        return peer in self.peers


class SuiteModule(Protocol):
    """What the module of a suite offers. Blocking; HostError when the suite cannot run here."""

    def cases(self, options: Options) -> Iterator[Case]: ...


@dataclass(frozen=True, slots=True)
class Suite:
    """name: of its cases' `suite`. group: the word of `avmm bench`. ground: "guest" when it
    boots a stock kernel, which takes hardware KVM; "native" when it runs anywhere."""

    name: str
    group: Group
    ground: Ground
    module: str


SUITES: tuple[Suite, ...] = (
    Suite("blk-native", "blk", "native", "avmm.bench.blk_native"),
    Suite("net-native", "net", "native", "avmm.bench.net_native"),
    Suite("net-switch", "net", "native", "avmm.bench.net_switch"),
    Suite("blk-guest", "blk", "guest", "avmm.bench.guest.work"),
    Suite("net-guest", "net", "guest", "avmm.bench.guest.work"),
    Suite("exits", "exits", "native", "avmm.bench.exits"),
    Suite("embed", "embed", "native", "avmm.bench.embed"),
    Suite("vsock-native", "embed", "native", "avmm.bench.vsock_native"),
    Suite("vsock-guest", "embed", "guest", "avmm.bench.guest.work"),
    Suite("attack", "attack", "native", "avmm.bench.attack"),
    Suite("boot-guest", "boot", "guest", "avmm.bench.guest.start"),
)


def run(
    groups: tuple[str, ...],
    grounds: tuple[str, ...],
    options: Options,
    keep: Callable[[Record], None] = lambda record: None,
) -> Record:
    """Run the suites of these groups that can run on these grounds, one after the other.

    keep: takes what was measured so far, whenever there is more of it: a host may hang in the next
    suite.
    """
    notes: list[str] = []
    cases: list[Case] = []
    began, start = datetime.now(UTC), time.monotonic()

    def leave_out(text: str) -> None:
        notes.append(text)
        options.leave_out(text)

    def so_far() -> Record:
        return Record(
            host=this_host(),
            began=began.isoformat(timespec="seconds"),
            duration_s=round(time.monotonic() - start, 1),
            cases=cases,
            notes=notes,
        )

    together: dict[str, list[str]] = {}
    for suite in SUITES:
        if suite.group in groups and suite.ground in grounds:
            together.setdefault(suite.module, []).append(suite.name)
    for module, names in together.items():
        inner = replace(options, leave_out=leave_out, suites=tuple(names))
        try:
            for case in cast(SuiteModule, importlib.import_module(module)).cases(inner):
                options.say(f"{case.suite}: {case.name}")
                cases.append(case)
        except HostError as e:
            leave_out(f"{', '.join(names)}: {e}")
        keep(so_far())
    return so_far()
