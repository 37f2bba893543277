"""Starts and ends the testbed's L1: QEMU, its sockets and its state folder."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
from dataclasses import dataclass
from pathlib import Path


class TestbedError(Exception):
    """The testbed itself failed; the message says where to look."""


@dataclass(frozen=True)
class Spec:
    """What an L1 is made of; sizes in MiB, out None or an absolute folder."""

    cache: Path
    cpus: int
    memory_mib: int
    slots: int
    out: Path | None


def _share(tag: str, path: Path | str, *, readonly: bool) -> list[str]:
    options = f"local,path={str(path).replace(',', ',,')},mount_tag={tag},security_model=none"
    if readonly:
        options += ",readonly=on"
    return ["-virtfs", options + ",multidevs=remap"]  # without it file ids of two disks collide


def _qemu_command(spec: Spec, listeners: list[socket.socket], monitor: socket.socket) -> list[str]:
    kernel = spec.cache / "kernels/generic"
    cmdline = f"console=ttyS0 panic=-1 mitigations=off quiet avmm.slots={spec.slots}"
    command = [
        "qemu-system-x86_64", "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot",
        "-accel", "tcg,thread=multi,tb-size=512", "-M", "q35", "-cpu", "max,+svm,+npt",
        "-smp", str(spec.cpus), "-m", str(spec.memory_mib),
        "-kernel", str(kernel / "vmlinux"), "-initrd", str(spec.cache / "testbed/initrd.cpio"),
        # For those who look into an L1 that hangs: info registers, info lapic.
        "-chardev", f"socket,id=monitor,fd={monitor.fileno()},server=on,wait=off",
        "-mon", "monitor",
        "-serial", "file:console.log", "-device", "virtio-serial-pci",
        *_share("modules", kernel / "modules", readonly=True),
    ]  # fmt: skip
    for slot, listener in enumerate(listeners):
        command += [
            "-chardev", f"socket,id=slot{slot},fd={listener.fileno()},server=on,wait=off",
            "-device", f"virtserialport,chardev=slot{slot},nr={slot + 1},name=avmm.{slot}",
            *_share(f"root{slot}", "/", readonly=True),
        ]  # fmt: skip
    if spec.out is not None:
        command += _share("out", spec.out, readonly=False)
        cmdline += " avmm.out"
    return [*command, "-append", cmdline]


def start(spec: Spec, state: Path, *, keep: bool) -> subprocess.Popen[bytes]:
    """Start QEMU with its sockets slot.N and monitor, and its console.log, in `state`.

    Returns at once: a client may connect and send, L1 answers when it is up. Unless kept, QEMU
    dies with the calling thread.
    """
    if spec.out is not None:
        spec.out.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        *listeners, monitor = (
            _listen(stack, state, name)
            for name in (*(f"slot.{slot}" for slot in range(spec.slots)), "monitor")
        )
        command = _qemu_command(spec, listeners, monitor)
        if not keep:
            command = ["setpriv", "--pdeathsig", "KILL", *command]
        with (state / "qemu.log").open("wb") as log:
            process = subprocess.Popen(
                command, cwd=state, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                pass_fds=[x.fileno() for x in (*listeners, monitor)], start_new_session=True,
            )  # fmt: skip
    (state / "pid").write_text(f"{process.pid}\n")
    return process


def _listen(stack: contextlib.ExitStack, state: Path, name: str) -> socket.socket:
    listener = stack.enter_context(socket.socket(socket.AF_UNIX))
    listener.bind(_short(state, name))
    listener.listen()
    return listener


def connect(state: Path, slot: int) -> socket.socket:
    """Connect to a slot of the L1 in `state`; raises TestbedError when there is none."""
    client = socket.socket(socket.AF_UNIX)
    try:
        client.connect(_short(state, f"slot.{slot}"))
    except OSError as error:
        client.close()
        raise TestbedError(f"cannot reach the L1 in {state}: {error}") from error
    return client


def alive(state: Path) -> bool:
    """Tell whether the QEMU that `state` names still runs (and is a QEMU)."""
    pid = _pid(state)
    try:
        return pid is not None and b"qemu-system" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False


def stop(state: Path) -> None:
    """End the L1 in `state`, wait for its end, and remove the folder."""
    if alive(state):
        pid = _pid(state)
        assert pid is not None
        with contextlib.suppress(ProcessLookupError):
            fd = os.pidfd_open(pid)
            os.kill(pid, 9)  # L1 keeps nothing: there is nothing to shut down
            with contextlib.suppress(ChildProcessError):
                os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
            _wait_pidfd(fd)
            os.close(fd)
    shutil.rmtree(state, ignore_errors=True)


def save_logs(state: Path, cache: Path) -> str:
    """Keep the logs of a failed L1; returns the last console lines and where the rest is."""
    target = cache / "logs" / f"testbed-{os.getpid()}.log"
    text = b""
    for name in ("qemu.log", "console.log"):
        with contextlib.suppress(OSError):
            text += (state / name).read_bytes()
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(text)
    tail = "\n".join(text.decode(errors="replace").splitlines()[-8:])
    return f"{tail}\nwhole log: {target}"


def _pid(state: Path) -> int | None:
    try:
        return int((state / "pid").read_text())
    except (OSError, ValueError):
        return None


def _wait_pidfd(fd: int) -> None:
    import select

    select.select([fd], [], [])


def _short(state: Path, name: str) -> str:
    """Name a socket within the 107 bytes the kernel allows, however deep `state` is."""
    fd = os.open(state, os.O_PATH | os.O_DIRECTORY)
    return f"/proc/self/fd/{fd}/{name}"
