"""A microVM as an object: start it, talk to its console, watch what happens to it, stop it.

Usage: python examples/hello_vm.py KERNEL INITRD

The initrd has to end in a shell on the serial console. Leaving the block, by whatever way, ends
the guest and gives everything back.
"""

from __future__ import annotations

import asyncio
import sys

import avmm


async def report(events: avmm.Events) -> None:
    """Print what happens to the microVM until it has ended."""
    async for event in events:
        match event:
            case avmm.Started(at_s=at_s):
                print(f"started after {at_s * 1000:.0f} ms")
            case avmm.DeviceFault(device=device, detail=detail):
                print(f"{device}: {detail}")
            case avmm.Ended(reason=reason):
                print(f"ended: {reason}")


async def main(kernel: str, initrd: str) -> None:
    config = avmm.Config(
        kernel=kernel,
        initrd=initrd,
        cmdline="console=ttyS0 quiet",
        memory="256M",
        rng=True,
    )
    vm = avmm.MicroVM(config)
    async with asyncio.TaskGroup() as group:
        group.create_task(report(vm.events()))
        await talk(vm)


async def talk(vm: avmm.MicroVM) -> None:
    """The guest's life."""
    async with vm:
        await vm.console.expect(rb"# ", timeout=300)
        await vm.console.write(b"echo hello from $(uname -sr)\n")
        match = await vm.console.expect(rb"hello from (Linux \S+)\r?\n", timeout=60)
        print(f"the guest is {match[1].decode()}")
        await vm.stop(grace_s=30)


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
