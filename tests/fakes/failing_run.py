"""A program that runs tiny guests whose KVM_RUN fails.

python -m fakes.failing_run KERNEL LOOP, on a failing_host: the guest writes a byte and powers off.
The first failure that becomes something else than it should ends the program with a traceback.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import sys

import uvloop

import avmm
from fakes.failing_host import Calls, refusing
from linux.holdings import Holdings

RUNS = 3
"""KVM_RUNs of the guest: the byte, the register, and what makes it end."""


def config(kernel: str) -> avmm.Config:
    return avmm.Config(kernel=kernel, memory="3M", cmdline="")


async def ended(kernel: str) -> avmm.ExitReason:
    async with avmm.MicroVM(config(kernel)) as vm:
        return await vm.wait()


async def an_error_ends_the_guest_with_its_reason(kernel: str) -> None:
    for error in (errno.EFAULT, errno.ENOMEM, errno.EINVAL, errno.EIO):
        for at in range(1, RUNS):
            with refusing(Calls.RUN, at, error) as refusals:
                reason = await ended(kernel)
            assert refusals.failed == 1
            assert reason.kind is avmm.ExitKind.ERROR
            assert "KVM_RUN" in reason.detail
            assert os.strerror(error) in reason.detail


async def an_interruption_is_nothing(kernel: str) -> None:
    for error in (errno.EINTR, errno.EAGAIN):
        for at in range(1, RUNS):
            with refusing(Calls.RUN, at, error) as refusals:
                reason = await ended(kernel)
            assert refusals.failed == 1
            assert reason.kind is avmm.ExitKind.POWEROFF


async def a_guest_that_never_runs_can_be_paused_and_killed(kernel: str) -> None:
    for error in (errno.EINTR, errno.EAGAIN):
        with refusing(Calls.RUN, 1, error, lasting=True):
            async with avmm.MicroVM(config(kernel)) as vm:
                await vm.pause()
                await vm.resume()
                await vm.pause()
                assert (await vm.kill()).kind is avmm.ExitKind.KILLED


async def an_error_is_one_guests(kernel: str) -> None:
    with refusing(Calls.RUN, 3, errno.EFAULT) as refusals:
        reasons = await asyncio.gather(*(ended(kernel) for _ in range(4)))
    assert refusals.failed == 1
    kinds = sorted(reason.kind.value for reason in reasons)
    assert kinds == ["error", "poweroff", "poweroff", "poweroff"]


async def main(kernel: str) -> None:
    await ended(kernel)
    for case in (
        an_error_ends_the_guest_with_its_reason,
        an_interruption_is_nothing,
        a_guest_that_never_runs_can_be_paused_and_killed,
        an_error_is_one_guests,
    ):
        before = Holdings.now()
        await case(kernel)
        assert Holdings.now().beyond(before) == {}, case.__name__


if __name__ == "__main__":
    logging.disable()
    _, kernel, loop = sys.argv
    factory = uvloop.new_event_loop if loop == "uvloop" else asyncio.new_event_loop
    with asyncio.Runner(loop_factory=factory) as runner:
        runner.run(main(kernel))
