"""The socket device seen by a tiny guest, on PCI and on MMIO (virtio 1.3 section 5.10)."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from avmm.mem import layout
from avmm.virtio.devices.vsock import Vsock
from avmm.virtio.transport import mmio, pci
from avmm.vsock.credit import BUFFER_BYTES
from avmm.vsock.packet import CID_HOST, SHUTDOWN_BOTH, TYPE_STREAM, Op
from kvm.guest_steps import SLOT, Assemble, Transport, run
from kvm.socket_guest import CID, SocketGuest

NOBODY, SERVED, NOBODYS = 9, 5000, 6000
SEQPACKET = 2
CONFIG = {"mmio": SLOT + mmio.CONFIG, "pci": layout.PCI_MEMORY + pci.DEVICE}


@pytest.mark.spec("5.10.6.4.2", "not have a reserved CID as `guest_cid`")
@pytest.mark.spec("5.10.6.4.2", "answer a packet of an unknown type by RST, unless it is one")
@pytest.mark.spec("5.10.6.3.2", "have valid `buf_alloc` and `fwd_cnt` in every packet of a flow")
@pytest.mark.parametrize("transport", ["mmio", "pci"])
async def test_a_guest_is_refused_and_served(
    tiny_guest: Assemble, tmp_path: Path, transport: Transport
) -> None:
    guest = SocketGuest(transport)
    guest.expect(CONFIG[transport], "l", CID)
    guest.expect(CONFIG[transport] + 4, "l", 0)
    guest.start(queues=2)
    for to, port, kind in (
        (CID_HOST, NOBODYS, TYPE_STREAM),
        (NOBODY, SERVED, TYPE_STREAM),
        (CID_HOST, SERVED, SEQPACKET),
        (NOBODY, NOBODYS, SEQPACKET),
    ):
        guest.say(to, port, Op.REQUEST, type=kind)
        guest.hear(to, port, Op.RST, type=kind)
    guest.say(CID_HOST, SERVED, Op.REQUEST)
    guest.hear(CID_HOST, SERVED, Op.RESPONSE, buf_alloc=BUFFER_BYTES)
    guest.say(CID_HOST, SERVED, Op.RW, b"a word")
    guest.hear(CID_HOST, SERVED, Op.RW, b"A WORD", buf_alloc=BUFFER_BYTES, fwd_cnt=6)
    guest.say(CID_HOST, SERVED, Op.SHUTDOWN, flags=SHUTDOWN_BOTH, fwd_cnt=6)
    guest.hear(CID_HOST, SERVED, Op.RST, buf_alloc=BUFFER_BYTES, fwd_cnt=6)

    served: asyncio.Queue[bytes] = asyncio.Queue()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write((await reader.readexactly(6)).upper())
        served.put_nowait(await reader.read())
        writer.close()
        await writer.wait_closed()

    uds = str(tmp_path / "vsock")
    async with await asyncio.start_unix_server(serve, f"{uds}_{SERVED}"):
        await run(tiny_guest, guest, vsock=Vsock(CID, uds))
        assert await served.get() == b""
