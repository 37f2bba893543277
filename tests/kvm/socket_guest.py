"""The text of tiny guests that send and expect packets of the socket device."""

from __future__ import annotations

from avmm.virtio.devices.vsock import RX, TX
from avmm.vsock.packet import TYPE_STREAM, Header, Op
from kvm.guest_steps import BUFFER, QUEUE_BYTES, Guest, Transport

CID, PORT = 7, 1024
PACKET = BUFFER + TX * QUEUE_BYTES
"""What is sent; what comes is at BUFFER."""


class SocketGuest(Guest):
    """Its steps send one packet, and wait for the one that comes."""

    def __init__(self, transport: Transport) -> None:
        super().__init__(transport)
        self.heard = self.said = 0

    def _store(self, gpa: int, data: bytes) -> None:
        for at in range(0, len(data), 4):
            self.store(gpa + at, "l", int.from_bytes(data[at : at + 4], "little"))

    def _expect(self, gpa: int, data: bytes) -> None:
        for at in range(0, len(data), 4):
            self.expect(gpa + at, "l", int.from_bytes(data[at : at + 4], "little"))

    def say(self, to: int, port: int, op: Op, payload: bytes = b"", **fields: int) -> None:
        self.listen()
        size = len(payload)
        header = Header(CID, to, PORT, port, size, TYPE_STREAM, op, 0, 4096, 0)._replace(**fields)
        data = header.pack() + payload
        self.said += 1
        self._store(PACKET, data)
        self.offer(self.said, queue=TX, buffer=PACKET, size_bytes=len(data), writable=False)
        self.await_used(self.said, queue=TX)

    def listen(self) -> None:
        """Room for a packet that is no answer."""
        self.heard += 1
        self.offer(self.heard, queue=RX, size_bytes=4096)

    def hear(self, sender: int, port: int, op: Op, payload: bytes = b"", **fields: int) -> None:
        self.await_used(self.heard, queue=RX)
        size = len(payload)
        header = Header(sender, CID, port, PORT, size, TYPE_STREAM, op, 0, 0, 0)._replace(**fields)
        self._expect(BUFFER, header.pack() + payload)
