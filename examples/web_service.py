"""A web service that runs what a client sends in a microVM of its own, made for the one request.

Usage: python examples/web_service.py KERNEL INITRD

That serves a few requests of its own and ends. With a port behind it, it serves there until Ctrl-C:

    curl --data 'uname -a; ls /' http://localhost:8080/run

Needs aiohttp. The initrd is any with the guest's vsock modules; avmm adds its agent to it.
"""

from __future__ import annotations

import asyncio
import sys

import aiohttp
from aiohttp import web

import avmm

AT_ONCE = 2
WAITING_MAX = 16
BOOT_LIMIT_S = 300.0
RUN_LIMIT_S = 60.0
OUTPUT_MAX_BYTES = 1 << 20


class Service:
    """POST /run: the body is a shell script; the answer is its status and output, as JSON.

    at_once: microVMs that run at the same time; further requests wait, and those beyond
    waiting_max are refused. A client that goes away takes its microVM with it: its handler is
    cancelled, and what leaves the `async with` block ends the guest.
    """

    def __init__(
        self, config: avmm.Config, at_once: int = AT_ONCE, waiting_max: int = WAITING_MAX
    ) -> None:
        self.config = config
        self.requests = 0
        self._requests_max = at_once + waiting_max
        self._turn = asyncio.Semaphore(at_once)

    def application(self) -> web.Application:
        """What aiohttp serves."""
        app = web.Application(client_max_size=1 << 16)
        app.router.add_post("/run", self.run)
        return app

    async def run(self, request: web.Request) -> web.Response:
        """One request."""
        script = await request.read()
        if self.requests >= self._requests_max:
            raise web.HTTPServiceUnavailable(text="too many requests wait\n")
        self.requests += 1
        try:
            async with self._turn:
                return web.json_response(await self._run(script))
        except TimeoutError as e:
            raise web.HTTPGatewayTimeout(text=f"{str(e) or 'the script took too long'}\n") from e
        except (avmm.HostError, avmm.GuestFault) as e:
            raise web.HTTPBadGateway(text=f"{e.kind}: {e}\n") from e
        finally:
            self.requests -= 1

    async def _run(self, script: bytes) -> dict[str, object]:
        async with avmm.MicroVM(self.config) as vm:
            await vm.agent.ready(timeout=BOOT_LIMIT_S)
            done = await vm.run(
                ["sh"], input=script, timeout=RUN_LIMIT_S, output_max=OUTPUT_MAX_BYTES
            )
        return {
            "status": done.returncode,
            "stdout": done.stdout.decode(errors="replace"),
            "stderr": done.stderr.decode(errors="replace"),
        }


async def main(kernel: str, initrd: str, port: str = "0") -> None:
    """Serve; without a port only what demonstrate() asks for."""
    config = avmm.Config(kernel=kernel, initrd=initrd, cmdline="console=ttyS0 quiet", agent=True)
    # Without handler_cancellation a handler goes on when its client is gone.
    runner = web.AppRunner(Service(config).application(), handler_cancellation=True)
    await runner.setup()
    try:
        site = web.TCPSite(runner, "localhost", int(port))
        await site.start()
        url = f"http://localhost:{runner.addresses[0][1]}/run"
        print(f"serving at {url}")
        if port == "0":
            await demonstrate(url)
        else:
            await asyncio.Event().wait()
    finally:
        await runner.cleanup()


async def demonstrate(url: str) -> None:
    """Two clients at once: neither sees what the other left in its machine."""
    async with aiohttp.ClientSession() as session:

        async def ask(script: str) -> tuple[int, str]:
            async with session.post(url, data=script) as response:
                answer = await response.json()
                return answer["status"], answer["stdout"]

        script = "echo mine >>/tmp/notes; cat /tmp/notes; exit 3"
        answers = list(await asyncio.gather(ask(script), ask(script)))
    print("two clients got", answers)
    if answers != [(3, "mine\n")] * 2:
        raise RuntimeError("each should have had a machine of its own")


if __name__ == "__main__":
    try:
        asyncio.run(main(*sys.argv[1:]))
    except KeyboardInterrupt:
        print("bye")
