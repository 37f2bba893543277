"""The serial console at speed, both ways."""

from __future__ import annotations

import hashlib
import os
import re

from avmm.units import KIB, MIB
from linux.guest import Guests, emulated_cpu

# Each byte is an exit of the guest or two: an emulated CPU needs a minute for 1 MiB.
BYTES = 256 * KIB if emulated_cpu() else MIB

SCRIPT = f"""
stty raw -echo
echo READY
head -c {BYTES} | sha256sum >/pasted
head -c {BYTES} /dev/urandom >/given
printf 'BEGIN:'
cat /given
stty sane
echo
echo "FACT pasted $(cut -d ' ' -f 1 /pasted)"
echo "FACT given $(sha256sum </given | cut -d ' ' -f 1)"
"""


async def test_paste_and_bulk_output_arrive_whole(guests: Guests) -> None:
    paste = os.urandom(BYTES)
    async with guests.running(SCRIPT) as guest:
        await guest.says("READY")
        await guest.vm.console.write(paste)
        await guest.ended()
    assert guest.status == 0
    assert guest.fact("pasted") == hashlib.sha256(paste).hexdigest()
    begin = re.search(rb"BEGIN:", guest.output)
    assert begin is not None
    given = bytes(guest.output[begin.end() : begin.end() + BYTES])
    assert guest.fact("given") == hashlib.sha256(given).hexdigest()
