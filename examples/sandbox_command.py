"""Run a command in a sandbox: a microVM of its own, which is gone when the command has ended.

Usage: python examples/sandbox_command.py KERNEL INITRD

avmm adds its guest agent to the initrd; the initrd's own init has to load the modules of vsock.
Whatever comes of the command, a timeout included, nothing of it is left here.
"""

from __future__ import annotations

import asyncio
import sys

import avmm

SCRIPT = b"""\
echo "hello from $(uname -n), process $$ of user $(id -u)"
rm -rf /root /tmp  # only of the sandbox
echo "this is an error" >&2
exit 3
"""


async def main(kernel: str, initrd: str) -> None:
    config = avmm.Config(kernel=kernel, initrd=initrd, cmdline="console=ttyS0 quiet", agent=True)
    async with avmm.MicroVM(config) as vm:
        await vm.agent.ready(timeout=300)
        await vm.files.write("/script.sh", SCRIPT)
        done = await vm.run(["sh", "/script.sh"], timeout=60)
        print("output:", done.stdout.decode().strip())
        print("errors:", done.stderr.decode().strip())
        print("status:", done.returncode)
        assert done.returncode == 3

        # The same piece by piece, with a command that would go on for ever.
        async with await vm.exec(["sh", "-c", "while read line; do echo got $line; done"],
                                 stdin=asyncio.subprocess.PIPE) as process:  # fmt: skip
            assert process.stdin is not None
            assert process.stdout is not None
            for word in (b"one\n", b"two\n"):
                process.stdin.write(word)
                print(">", (await process.stdout.readline()).decode().strip())
            process.terminate()
            assert await process.wait() == -15


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
