"""A host that has no descriptor for a connection to a unix socket."""

from __future__ import annotations

import errno
import socket

import pytest

from avmm.errors import HostError
from avmm.unixsocket import Listener


class Refusing:
    """Accepts nothing, the first `times`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, times: int) -> None:
        self.left = times
        self.refused = 0
        self._accept = Listener.accept
        monkeypatch.setattr(Listener, "accept", lambda listener: self.accept(listener))

    def accept(self, listener: Listener) -> socket.socket | None:
        if self.left == 0:
            return self._accept(listener)
        self.left -= 1
        self.refused += 1
        raise HostError("socket", op="accept", path=listener.path, errno=errno.EMFILE)
