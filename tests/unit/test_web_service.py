"""examples/web_service.py with a fake microVM and real HTTP clients. tests/linux runs it whole."""

from __future__ import annotations

import asyncio
import importlib.util
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Self

import pytest

import avmm

aiohttp = pytest.importorskip("aiohttp", reason="aiohttp is not installed: pip install '.[test]'")

EXAMPLE = Path(__file__).parents[2] / "examples" / "web_service.py"


class FakeVM:
    """Answers with its number; scripts named `hang` never end, `lost` loses the agent."""

    alive = 0
    most_alive = 0
    made = 0

    def __init__(self, config: avmm.Config) -> None:
        assert config.agent
        self.agent = self

    async def __aenter__(self) -> Self:
        cls = FakeVM
        cls.made += 1
        cls.alive += 1
        cls.most_alive = max(cls.most_alive, cls.alive)
        return self

    async def __aexit__(self, *_: object) -> None:
        FakeVM.alive -= 1

    async def ready(self, timeout: float) -> None:
        assert timeout > 0

    async def run(
        self, argv: list[str], *, input: bytes, timeout: float, output_max: int
    ) -> subprocess.CompletedProcess[bytes]:
        assert (argv, timeout > 0, output_max > 0) == (["sh"], True, True)
        match input:
            case b"hang":
                await asyncio.Event().wait()
            case b"slow":
                raise TimeoutError
            case b"much":
                raise avmm.HostError("output-limit", op="communicate", remedy="it wrote too much")
            case b"turn":
                await asyncio.sleep(0)
        return subprocess.CompletedProcess(argv, 3, b"out of " + input, b"\xff")


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> Any:
    spec = importlib.util.spec_from_file_location("web_service", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(avmm, "MicroVM", FakeVM)
    FakeVM.alive = FakeVM.most_alive = FakeVM.made = 0
    return module


@asynccontextmanager
async def serving(example: Any, **limits: int) -> AsyncIterator[tuple[Any, Any, str]]:
    """The service, a client's session and the URL."""
    service = example.Service(avmm.Config(kernel="k", initrd="i", agent=True), **limits)
    runner = aiohttp.web.AppRunner(service.application(), handler_cancellation=True)
    await runner.setup()
    try:
        await aiohttp.web.TCPSite(runner, "localhost", 0).start()
        async with aiohttp.ClientSession() as session:
            yield service, session, f"http://localhost:{runner.addresses[0][1]}/run"
    finally:
        await runner.cleanup()


async def until(service: Any, *, requests: int, alive: int) -> None:
    """Let the loop turn until the service is at this point."""
    async with asyncio.timeout(30):
        while (service.requests, FakeVM.alive) != (requests, alive):  # noqa: ASYNC110
            await asyncio.sleep(0)


async def test_a_script_runs_in_a_machine_of_its_own(example: Any) -> None:
    async with serving(example) as (_, session, url):
        for count in (1, 2):
            async with session.post(url, data=b"x") as response:
                expected = {"status": 3, "stdout": "out of x", "stderr": "\ufffd"}
                assert (response.status, await response.json()) == (200, expected)
            assert (FakeVM.made, FakeVM.alive) == (count, 0)


@pytest.mark.parametrize(
    ("script", "status", "text"),
    [
        (b"slow", 504, "the script took too long\n"),
        (b"much", 502, "output-limit: communicate: it wrote too much\n"),
        (bytes(100_000), 413, None),
    ],
)
async def test_what_goes_wrong_is_an_http_status(
    example: Any, script: bytes, status: int, text: str | None
) -> None:
    async with serving(example) as (service, session, url):
        async with session.post(url, data=script) as response:
            assert response.status == status
            assert text is None or await response.text() == text
        assert (service.requests, FakeVM.alive) == (0, 0)


async def test_requests_wait_for_their_turn_and_too_many_are_refused(example: Any) -> None:
    async with serving(example, at_once=2, waiting_max=3) as (service, session, url):
        hanging = [asyncio.create_task(session.post(url, data=b"hang")) for _ in range(5)]
        await until(service, requests=5, alive=2)
        async with session.post(url, data=b"x") as response:
            assert response.status == 503
        for task in hanging:
            task.cancel()
        await asyncio.wait(hanging)
        await until(service, requests=0, alive=0)
        asked = [asyncio.create_task(session.post(url, data=b"turn")) for _ in range(5)]
        answers = [await task for task in asked]
        assert [answer.status for answer in answers] == [200] * 5
        for answer in answers:
            answer.close()
        assert FakeVM.most_alive == 2


async def test_a_client_that_goes_away_takes_its_machine_with_it(example: Any) -> None:
    async with serving(example) as (service, session, url):
        task = asyncio.create_task(session.post(url, data=b"hang"))
        await until(service, requests=1, alive=1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await until(service, requests=0, alive=0)
        async with session.post(url, data=b"x") as response:
            assert response.status == 200
