"""The host's end of scripts/testbed: options, the L1 to use, one command carried to its agent.

The frames are described in agent.c.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import hashlib
import os
import secrets
import selectors
import shlex
import signal
import socket
import struct
import sys
import tempfile
import termios
import tty
from collections.abc import Iterator
from pathlib import Path

import machine
from machine import TestbedError

WINDOW = 256 * 1024  # as in agent.c
KEPT_SLOTS = 4
FAILED = 125


def say(text: str) -> None:
    print(f"testbed: {text}", file=sys.stderr, flush=True)


# --- one command ------------------------------------------------------------------------


class Carrier:
    """Carries one command's streams, signals and exit status over a connection to the agent."""

    def __init__(self, connection: socket.socket, wake: socket.socket) -> None:
        self._connection = connection
        self._wake = wake
        self._selector = selectors.DefaultSelector()
        self._received = bytearray()
        self._window = WINDOW
        self._stdin_ended = False
        self._interrupts = 0
        self._nonce: bytes | None = None
        self._status: int | None = None

    def run(self, out: str, cwd: str, env: dict[str, str], argv: list[str]) -> int:
        """Run argv to its end and return its exit status; raises TestbedError if L1 is lost."""
        nonce = secrets.token_hex(8)
        entries = [f"{k}={v}" for k, v in env.items()]
        strings = [nonce, out, cwd, str(len(entries)), *entries, *argv]
        self._send(b"S", b"".join(os.fsencode(s) + b"\0" for s in strings))
        self._nonce = nonce.encode()
        self._selector.register(self._connection, selectors.EVENT_READ, self._from_agent)
        self._selector.register(self._wake, selectors.EVENT_READ, self._from_signal)
        self._watch_stdin()
        while self._status is None:
            for key, _ in self._selector.select():
                key.data()
        return self._status

    def _send(self, kind: bytes, payload: bytes = b"") -> None:
        try:
            self._connection.sendall(kind + struct.pack("<I", len(payload)) + payload)
        except OSError as error:
            raise TestbedError("L1 ended while the command ran") from error

    def _watch_stdin(self) -> None:
        try:
            self._selector.register(0, selectors.EVENT_READ, self._from_stdin)
        except (PermissionError, OSError):  # a plain file, /dev/null: always readable
            self._plain_stdin()

    def _plain_stdin(self) -> None:
        """Send what the window allows from a stdin that epoll does not take."""
        while not self._stdin_ended and self._window > 0:
            self._from_stdin()

    def _from_stdin(self) -> None:
        try:
            data = os.read(0, min(self._window, 64 * 1024))
        except OSError:
            data = b""
        self._send(b"I", data)
        self._window -= len(data)
        self._stdin_ended = not data
        if (self._stdin_ended or self._window == 0) and 0 in self._selector.get_map():
            self._selector.unregister(0)

    def _from_signal(self) -> None:
        for number in self._wake.recv(64):
            if number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                self._interrupts += 1
                if self._interrupts > 2 or self._nonce is not None:
                    raise KeyboardInterrupt  # the command will not end, or has not begun
                self._send(b"K", bytes([number]))

    def _from_agent(self) -> None:
        try:
            data = self._connection.recv(256 * 1024)
        except OSError:
            data = b""
        if not data:
            raise TestbedError("L1 ended while the command ran")
        self._received += data
        while len(self._received) >= 5:
            (size,) = struct.unpack_from("<I", self._received, 1)
            if len(self._received) < 5 + size:
                return
            kind, payload = self._received[0], bytes(self._received[5 : 5 + size])
            del self._received[: 5 + size]
            self._frame(chr(kind), payload)

    def _frame(self, kind: str, payload: bytes) -> None:
        if self._nonce is not None:  # what an earlier client left unread comes before our nonce
            if kind == "A" and payload == self._nonce:
                self._nonce = None
        elif kind in "OE":
            write_all(1 if kind == "O" else 2, payload)
        elif kind == "C":
            self._window += struct.unpack("<I", payload)[0]
            if not self._stdin_ended and 0 not in self._selector.get_map():
                self._watch_stdin()
        elif kind == "X":
            self._status = struct.unpack("<I", payload)[0]


def write_all(fd: int, data: bytes) -> None:
    while data:
        data = data[os.write(fd, data) :]


@contextlib.contextmanager
def signals_to_socket() -> Iterator[socket.socket]:
    """Yield a socket that receives the numbers of signals which would end us."""
    receive, send = socket.socketpair()
    send.setblocking(False)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: None)
    signal.set_wakeup_fd(send.fileno(), warn_on_full_buffer=False)
    try:
        yield receive
    finally:
        signal.set_wakeup_fd(-1)
        receive.close()
        send.close()


@contextlib.contextmanager
def raw_terminal(wanted: bool) -> Iterator[None]:
    if not wanted or not os.isatty(0):
        yield
        return
    saved = termios.tcgetattr(0)
    tty.setraw(0)
    try:
        yield
    finally:
        termios.tcsetattr(0, termios.TCSAFLUSH, saved)


def with_terminal(argv: list[str]) -> list[str]:
    """Wrap argv so that it runs on a terminal of its own in L1, as large as ours."""
    rows, columns = 24, 80
    with contextlib.suppress(OSError):
        columns, rows = os.get_terminal_size(0)
    inner = f"stty rows {rows} cols {columns}; exec {shlex.join(argv)}"
    return ["script", "-qec", inner, "/dev/null"]


# --- which L1 ---------------------------------------------------------------------------


@contextlib.contextmanager
def own_machine(spec: machine.Spec) -> Iterator[tuple[Path, int]]:
    """Yield an L1 for this one command; it is gone afterwards, whatever happened."""
    state = Path(tempfile.mkdtemp(prefix="avmm-testbed."))
    try:
        machine.start(spec, state, keep=False)
        yield state, 0
    except TestbedError as error:
        raise TestbedError(f"{error}\n{machine.save_logs(state, spec.cache)}") from None
    finally:
        machine.stop(state)


@contextlib.contextmanager
def kept_machine(state: Path) -> Iterator[tuple[Path, int]]:
    """Yield a free slot of the L1 in `state`; waits when all are in use."""
    for attempt in range(KEPT_SLOTS + 1):
        slot = attempt % KEPT_SLOTS
        with (state / f"lock.{slot}").open("wb") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if attempt < KEPT_SLOTS:
                    continue
                say(f"{KEPT_SLOTS} commands run in the kept L1 already: waiting")
                fcntl.flock(lock, fcntl.LOCK_EX)
            yield state, slot
            return


def start_kept(spec: machine.Spec, state: Path) -> None:
    state.mkdir(parents=True, mode=0o700)
    machine.start(spec, state, keep=True)
    (state / "out").write_text(str(spec.out or ""))
    say(f"L1 started; it stays until {Path(__file__).parents[1] / 'testbed'} --stop")


def out_of(state: Path, wanted: Path | None) -> str:
    """Return the exported folder of a kept L1; raises when `wanted` is not under it."""
    exported = (state / "out").read_text()
    if wanted is not None and not (exported and wanted.is_relative_to(exported)):
        raise TestbedError(
            f"--out {wanted}: the kept L1 gives back {exported or 'nothing'}; "
            f"--stop it and start it with --keep --out {wanted}"
        )
    return exported


# --- options ----------------------------------------------------------------------------


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="scripts/testbed", allow_abbrev=False)
    parser.add_argument("--checkout", type=Path, required=True)
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument("--keep", action="store_true")
    parser.add_argument("--stop", action="store_true")
    parser.add_argument("--tty", action="store_true")
    parser.add_argument("--out", type=lambda s: Path(s).resolve())
    parser.add_argument("--cpus", type=int, default=2)
    parser.add_argument("--memory", type=int, default=6144)
    parser.add_argument("--env", action="append", default=[], metavar="K=V")
    parser.add_argument("command", nargs=argparse.REMAINDER)
    options = parser.parse_args(arguments)
    if options.command[:1] == ["--"]:
        del options.command[0]
    if not (options.command or options.keep or options.stop):
        parser.error("give a command to run")
    if any("=" not in entry for entry in options.env):
        parser.error("--env wants K=V")
    return options


def environment(entries: list[str]) -> dict[str, str]:
    taken = ("HOME", "LANG", "TERM", "VIRTUAL_ENV")
    env = {k: v for k, v in os.environ.items() if k in taken or k.startswith("AVMM_")}
    env["PATH"] = os.environ.get("PATH", "/usr/bin:/bin") + ":/usr/sbin:/sbin"
    env["AVMM_IN_TESTBED"] = "1"
    return env | dict(entry.split("=", 1) for entry in entries)


def run(options: argparse.Namespace) -> int:
    """Do what the options ask; returns the exit status."""
    key = hashlib.sha256(os.fsencode(options.checkout)).hexdigest()[:12]
    state = options.cache / "testbed" / f"kept-{key}"
    spec = machine.Spec(
        options.cache, options.cpus, options.memory, KEPT_SLOTS if options.keep else 1, options.out
    )
    with (options.cache / "testbed" / f"lock-{key}").open("wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if options.stop or not machine.alive(state):
            machine.stop(state)
            if options.keep:
                start_kept(spec, state)
        kept = state.exists()
        out = out_of(state, options.out) if kept else str(options.out or "")
    argv = options.command
    if not argv:
        if options.stop:
            return 0
        argv = ["true"]  # --keep alone: come back when L1 is up
    on_terminal = options.tty or (os.isatty(0) and os.isatty(1))
    if on_terminal:
        argv = with_terminal(argv)
    with (
        signals_to_socket() as wake,
        kept_machine(state) if kept else own_machine(spec) as (where, slot),
        machine.connect(where, slot) as connection,
        raw_terminal(on_terminal),
    ):
        return Carrier(connection, wake).run(out, os.getcwd(), environment(options.env), argv)


def main() -> int:
    try:
        return run(parse(sys.argv[1:]))
    except TestbedError as error:
        say(str(error))
        return FAILED
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        return 141


if __name__ == "__main__":
    sys.exit(main())
