"""Shared by all layers: every async test runs on uvloop and on the stock loop; a failing host."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import uvloop

from fakes import failing_host


def pytest_asyncio_loop_factories() -> Mapping[str, Callable[[], asyncio.AbstractEventLoop]]:
    return {"uvloop": uvloop.new_event_loop, "asyncio": asyncio.new_event_loop}


@pytest.fixture(scope="session")
def failing_host_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Preloaded, it refuses what fakes.failing_host arms."""
    return failing_host.build(tmp_path_factory.mktemp("failing_host"))
