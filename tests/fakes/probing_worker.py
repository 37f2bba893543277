"""A worker that runs code it is given, for tests of its walls from the inside.

`launched_by(monkeypatch)` makes the next microVMs with isolation start this one; a worker that is
started by avmm itself has no such door.
"""

from __future__ import annotations

import ctypes
import os
import socket
import subprocess
import threading
from pathlib import Path
from typing import Any

import pytest

import avmm
from avmm.machine.isolation import launch
from avmm.machine.isolation.remote import RemoteMachine
from avmm.machine.isolation.worker import main
from avmm.native import lib

TESTS = Path(__file__).parents[1]

# Imported before the walls are up, for the code to use.
_SCOPE = {
    "ctypes": ctypes,
    "lib": lib,
    "libc": ctypes.CDLL(None, use_errno=True),
    "os": os,
    "socket": socket,
    "subprocess": subprocess,
    "threading": threading,
}


def _probe(code: str) -> str:
    """The code's `result`, or the error it met."""
    scope: dict[str, Any] = dict(_SCOPE)
    try:
        exec(code, scope)
    except OSError as e:
        return type(e).__name__
    return str(scope.get("result"))


def serve() -> None:
    """The worker."""
    main(_probe)


def launched_by(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of this test's microVMs."""
    entry = f"sys.path.insert(0, {str(TESTS)!r}); from fakes.probing_worker import serve; serve()"
    monkeypatch.setattr(launch, "ENTRY", entry)


async def probe(vm: avmm.MicroVM, code: str) -> str:
    """Run code in the worker of a running microVM."""
    machine = vm._machine
    assert isinstance(machine, RemoteMachine)
    return await machine.probe(code)


def worker_pid(vm: avmm.MicroVM) -> int:
    """Its process."""
    machine = vm._machine
    assert isinstance(machine, RemoteMachine)
    return machine.process.pid
