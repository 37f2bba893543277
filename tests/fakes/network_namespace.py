"""Programs in a network namespace of their own: the machine's network is not touched."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

_CAP_NET_ADMIN = 12
HANG_S = 120
"""What no program takes, however busy the machine is."""

# In the program itself: between fork and exec of a process with threads, Python code may wait for a
# lock that nobody holds any more.
PRELUDE = """
import asyncio, ctypes, os, sys
if ctypes.CDLL(None, use_errno=True).unshare(0x40000000) != 0:  # CLONE_NEWNET
    sys.exit(os.strerror(ctypes.get_errno()))

from avmm.errors import AvmmError
from avmm.hostnet.tap import TapSettings, open_tap

def names():
    import socket
    return sorted(name for _, name in socket.if_nameindex())

def addresses(name):
    import fcntl, socket, struct
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
        try:
            reply = fcntl.ioctl(s, 0x8915, struct.pack("16s24x", name.encode()))
        except OSError:
            return None
    return socket.inet_ntoa(reply[20:24])
"""


def can_make_taps() -> bool:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("CapEff:"):
            capable = int(line.split()[1], 16) >> _CAP_NET_ADMIN & 1
            return bool(capable) and os.access("/dev/net/tun", os.R_OK | os.W_OK)
    return False


def output(body: str) -> list[str]:
    """The lines that `body`, an async function's, prints in a namespace of its own."""
    program = PRELUDE + "async def main():\n" + textwrap.indent(textwrap.dedent(body), "    ")
    child = subprocess.run(
        [sys.executable, "-W", "error", "-c", program + "\nasyncio.run(main())\n"],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=HANG_S,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
    )
    assert child.returncode == 0, child.stderr
    return child.stdout.splitlines()
