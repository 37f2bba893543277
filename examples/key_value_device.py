"""A device of one's own: a key-value store that guests call over a virtqueue.

Usage: python examples/key_value_device.py KERNEL [INITRD]

A request is `SET key value`, `GET key` or `DEL key`; the answer is `OK`, `= value` or `NONE`.
"""

from __future__ import annotations

import asyncio
import sys

import avmm


class KeyValue(avmm.PythonDevice):
    """A key-value store."""

    virtio_id = 50  # nobody's; a driver of ours looks for it
    queues = (64,)

    def __init__(self) -> None:
        self.store: dict[bytes, bytes] = {}

    async def handle(self, chain: avmm.Chain) -> None:
        """One request."""
        command, *rest = chain.data.split(b" ", 2)
        match command, rest:
            case b"SET", [key, value]:
                self.store[key] = value
                chain.write(b"OK")
            case b"GET", [key]:
                found = self.store.get(key)
                chain.write(b"NONE" if found is None else b"= " + found)
            case b"DEL", [key]:
                chain.write(b"NONE" if self.store.pop(key, None) is None else b"OK")
            case _:
                raise avmm.GuestFault("key-value", f"No such request: {chain.data[:40]!r}")

    def counters(self) -> dict[str, int]:
        """Seen in vm.statistics()."""
        return {"keys": len(self.store)}


async def main(kernel: str, initrd: str | None = None) -> dict[bytes, bytes]:
    """Run a guest that has the device; what is in the store afterwards."""
    device = KeyValue()
    device.store[b"greeting"] = b"hello from the host"
    config = avmm.Config(kernel=kernel, initrd=initrd, devices=[device])
    async with avmm.MicroVM(config) as vm:
        reader, _ = vm.console.open()
        while data := await reader.read(4096):
            print(data.decode(errors="replace"), end="", flush=True)
        print(f"\n{await vm.wait()}; {vm.statistics().devices['keyvalue0'].counters}")
    return device.store


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
