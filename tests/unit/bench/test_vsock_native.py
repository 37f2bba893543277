"""Suite vsock-native, and its guest."""

from __future__ import annotations

import asyncio

import pytest

from avmm.bench import vsock_native
from avmm.bench.suite import Options


async def test_the_guest_sends_all_of_a_stream() -> None:
    sizes: asyncio.Queue[int] = asyncio.Queue()

    async def take(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        sizes.put_nowait(len(await reader.read()))

    async with vsock_native.vsock_guest() as guest:
        await guest.device.host.serve(vsock_native.PORT, take)
        out = await guest.run(sends=3_000_001)
        assert out.requests == 3_000_001
        assert await sizes.get() == 3_000_001


@pytest.mark.slow
def test_each_row_is_measured_and_has_its_aim() -> None:
    cases = list(vsock_native.cases(Options(runs=1, seconds=0.002)))
    assert len(cases) == 7
    assert all(case.series["avmm"][0] > 0 for case in cases)
    assert [bool(case.aims) for case in cases] == [True] * 4 + [False] * 3
