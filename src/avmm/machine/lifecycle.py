"""What a microVM may do when, and clean-up that a cancelled task cannot skip."""

from __future__ import annotations

import asyncio
import enum
from asyncio.tasks import _unregister_task
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


class State(enum.Enum):
    """A microVM's life, in order; PAUSED and RUNNING alternate."""

    NEW = "new"
    STARTING = "starting"
    RUNNING = "running"
    PAUSED = "paused"
    STOPPING = "stopping"
    STOPPED = "stopped"


async def uninterrupted(work: Coroutine[Any, Any, T]) -> T:
    """Await `work` to its end even when the calling task is cancelled meanwhile.

    A cancellation that came is raised afterwards, so it is late but not lost. For clean-up: half
    of it done would leave descriptors, threads and TAPs behind.
    """
    task = asyncio.ensure_future(work)
    # asyncio.run() ends by cancelling every task it can find. It finds the caller, which waits;
    # what is waited for is not to be found, or it would be cut off in the middle.
    _unregister_task(task)
    cancelled: asyncio.CancelledError | None = None
    while not task.done():
        try:
            await asyncio.shield(task)
        except asyncio.CancelledError as e:
            if task.cancelled():
                raise
            cancelled = e
        except BaseException:
            break  # the task's own; result() below raises it
    if cancelled is not None:
        if not task.cancelled():
            task.exception()  # seen: the cancellation takes precedence
        raise cancelled
    return task.result()
