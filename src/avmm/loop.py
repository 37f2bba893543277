"""How threads reach the asyncio loop, and how a program of ours starts one."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import errno
import functools
import inspect
import threading
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import AbstractContextManager
from typing import Any, TypeVar

from avmm.errors import HostError

T = TypeVar("T")

POSTS_MAX = 256
"""Actions that wait for the loop, before who posts more has to wait with them."""


def run(main: Coroutine[Any, Any, T]) -> T:
    """Run `main` on a new uvloop loop. For programs; a library's user brings their own loop.

    uvloop.install() is never called: it would change the loops of other code in the process.
    """
    import uvloop  # costs a program that never runs a loop (`avmm --help`) nothing

    return uvloop.run(main)


def add_reader(
    loop: asyncio.AbstractEventLoop, fd: int, call: Callable[..., object], *args: object
) -> None:
    """loop.add_reader(), which meets the host's limits. Raises HostError("watch")."""
    try:
        loop.add_reader(fd, call, *args)
    except OSError as e:
        remedy = "raise fs.epoll.max_user_watches" if e.errno == errno.ENOSPC else None
        raise HostError("watch", op="epoll_ctl", errno=e.errno, remedy=remedy) from e


def on_thread(function: Callable[..., T], *args: object) -> asyncio.Future[T]:
    """Run `function` on a thread of its own, for what blocks; its result, on the running loop.

    The future is done when the thread has ended. Cancelling it does not stop the thread: await
    it by asyncio.shield() or asyncio.wait(). The loop's own pool would be shared with whatever
    else the user blocks there. Raises HostError("thread").
    """
    loop = asyncio.get_running_loop()
    done: asyncio.Future[T] = loop.create_future()

    def main() -> None:
        try:
            settle = functools.partial(_set_result, done, thread, function(*args))
        except BaseException as e:
            settle = functools.partial(_set_exception, done, thread, e)
        with contextlib.suppress(RuntimeError):  # the loop was closed meanwhile: nobody waits
            loop.call_soon_threadsafe(settle)

    thread = threading.Thread(target=main, name="avmm-work")
    try:
        thread.start()
    except RuntimeError as e:
        raise HostError("thread", op="Starting a thread", remedy=str(e)) from e
    return done


def _set_result(done: asyncio.Future[T], thread: threading.Thread, result: T) -> None:
    thread.join()
    if not done.done():
        done.set_result(result)


def _set_exception(
    done: asyncio.Future[Any], thread: threading.Thread, error: BaseException
) -> None:
    thread.join()
    if not done.done():
        done.set_exception(error)


class LoopClosed(Exception):
    """The loop no longer takes calls of this VM: its thread should end."""


class LoopBridge:
    """One VM's way from its threads to its loop.

    on_error: called on the loop with whatever an action raised; the caller is released all the
    same, since a vCPU that waits for ever could not be stopped. charged: made anew for each action
    and entered while it runs, so that its time can be taken.

    post() waits for nothing, so a thread may post faster than the loop performs: who posts what a
    guest asks for looks at `behind`, and calls instead.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        on_error: Callable[[BaseException], None],
        charged: Callable[[], AbstractContextManager[None]] = contextlib.nullcontext,
    ) -> None:
        self.loop = loop
        self._charged = charged
        self._on_error = on_error
        self._lock = threading.Lock()
        self._closed = False
        self._posted = 0
        self._waiting: set[concurrent.futures.Future[None]] = set()
        self._tasks: set[asyncio.Future[None]] = set()

    @property
    def behind(self) -> bool:
        """Whether as many posted actions wait for the loop as may wait. Any thread."""
        return self._posted >= POSTS_MAX

    def post(self, action: Callable[[], None]) -> None:
        """Run `action` on the loop soon. Any thread; never waits. Raises LoopClosed."""
        with self._lock:
            self._posted += 1
        self._submit(self._perform, action)

    def call_and_wait(self, action: Callable[[], Awaitable[None] | None]) -> None:
        """Run `action` on the loop and wait until it is done, awaiting what it returns.

        Any thread but the loop's. Raises LoopClosed, also when close() comes while it waits.
        """
        done: concurrent.futures.Future[None] = concurrent.futures.Future()
        with self._lock:
            if self._closed:
                raise LoopClosed
            self._waiting.add(done)
        try:
            self._submit(self._start, action, done)
            done.result()
        except concurrent.futures.CancelledError:
            raise LoopClosed from None
        finally:
            with self._lock:
                self._waiting.discard(done)

    async def close(self) -> None:
        """Refuse new calls, release every waiting thread, end the actions still running."""
        with self._lock:
            self._closed = True
            for done in self._waiting:
                done.cancel()
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _submit(self, function: Callable[..., None], *args: object) -> None:
        if self._closed:
            raise LoopClosed
        try:
            self.loop.call_soon_threadsafe(function, *args)
        except RuntimeError:  # the loop itself was closed under the VM
            raise LoopClosed from None

    def _perform(self, action: Callable[[], None]) -> None:
        with self._lock:
            self._posted -= 1
        with self._charged():
            try:
                action()
            except Exception as e:
                self._on_error(e)

    def _start(
        self,
        action: Callable[[], Awaitable[None] | None],
        done: concurrent.futures.Future[None],
    ) -> None:
        if self._closed:  # nobody waits for it any more, and close() has ended what ran
            return
        with self._charged():
            try:
                result = action()
            except Exception as e:
                self._on_error(e)
                result = None
        if not inspect.isawaitable(result):
            _release(done)
            return
        # Not a coroutine of ours around it: one that is cancelled before it began awaits nothing.
        task = asyncio.ensure_future(result, loop=self.loop)
        self._tasks.add(task)
        task.add_done_callback(functools.partial(self._finish, done))

    def _finish(self, done: concurrent.futures.Future[None], task: asyncio.Future[None]) -> None:
        self._tasks.discard(task)
        error = None if task.cancelled() else task.exception()
        if error is not None:
            self._on_error(error)
        with self._charged():
            _release(done)


def _release(done: concurrent.futures.Future[None]) -> None:
    # False when close() cancelled it first, and then its thread is already on its way.
    if done.set_running_or_notify_cancel():
        done.set_result(None)
