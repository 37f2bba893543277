"""Each wall of a worker, from the inside and from the outside."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

import avmm
from fakes import probing_worker
from fakes.probing_worker import probe, worker_pid

Assemble = Callable[[str], Path]

pytestmark = pytest.mark.asyncio(loop_factories=["uvloop"])

SPIN = "putc 'x'\n1: jmp 1b"


def isolated(kernel: Path, **more: object) -> avmm.MicroVM:
    values = {"kernel": str(kernel), "memory": "4M", "cmdline": "", **more}
    return avmm.MicroVM(avmm.Config(**values), isolation="process")  # type: ignore[arg-type]


def status_of(process: Path) -> dict[str, str]:
    lines = (process / "status").read_text().splitlines()
    return dict(line.split(":\t", 1) for line in lines if ":\t" in line)


@pytest.fixture
async def vm(
    tiny_guest: Assemble, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[avmm.MicroVM]:
    """One whose worker can be probed."""
    probing_worker.launched_by(monkeypatch)
    monkeypatch.setenv("A_SECRET", "of the program")
    image = tmp_path / "disk.img"
    image.write_bytes(bytes(4096))
    disks = [avmm.Disk(str(image))]
    async with isolated(tiny_guest(SPIN), disks=disks, io_threads=1) as vm:
        yield vm


FATAL = {
    "a socket": "socket.socket()",
    "a socket pair": "socket.socketpair()",
    "descriptors to another process": "libc.sendmsg(3, None, 0)",
    "a child process": "os.fork()",
    "a program": "os.execv('/bin/sh', ['sh'])",
    "a subprocess": "subprocess.run(['true'])",
    "ptrace": "libc.ptrace(0, 0, 0, 0)",
    "another process's memory": "libc.syscall(310, 1, 0, 0, 0, 0, 0)",
    "a signal to another process": "os.kill(2, 15)",
    "a signal to another thread group": "libc.syscall(234, 2, 2, 15)",
    "a mount": "libc.mount(b'none', b'/', b'tmpfs', 0, None)",
    "another namespace": "libc.unshare(0x10000000)",
    "code that it wrote": "import mmap; mmap.mmap(-1, 4096, prot=7)",
    "a new virtual machine": "import fcntl; [fcntl.ioctl(fd, 0xae01, 0) for fd in range(3, 64)]",
    "a new ring": "libc.syscall(425, 8, ctypes.create_string_buffer(256))",
    "a program for the kernel": "libc.syscall(321, 0, 0, 0)",
    "a system call of 32 bits more": "libc.syscall(0x40000000 + 39)",
    "a vCPU's thread that polls": "lib.av_walls_filter(lib.AV_ROLE_VCPU); libc.syscall(7, 0, 0, 0)",
    "an I/O thread that makes threads": (
        "lib.av_walls_filter(lib.AV_ROLE_IO); threading.Thread(target=print).start()"
    ),
}


@pytest.mark.parametrize("what", FATAL)
async def test_what_a_worker_may_not_do_is_its_end(vm: avmm.MicroVM, what: str) -> None:
    with pytest.raises(avmm.HostError) as raised:
        await probe(vm, FATAL[what])
    assert raised.value.kind == "worker-died"
    reason = await vm.wait()
    assert reason.error is raised.value
    assert "was killed by SIGSYS, for a forbidden system call" in reason.detail


async def test_a_crash_of_the_worker_is_the_microvms_end(vm: avmm.MicroVM) -> None:
    with pytest.raises(avmm.HostError, match="was killed by SIGSEGV"):
        await probe(vm, "ctypes.string_at(0)")
    assert (await vm.wait()).kind is avmm.ExitKind.ERROR


REFUSED = {
    "a file": "open('/etc/passwd')",
    "a file by its descriptor": "open('/proc/self/fd/0')",
    "a new file": "os.open('/new', os.O_CREAT | os.O_WRONLY)",
    "a folder": "os.listdir('/')",
    "a file's size": "os.stat('/etc/passwd')",
    "a link": "os.readlink('/proc/self/exe')",
}


async def test_the_walls_of_a_worker_that_runs(vm: avmm.MicroVM) -> None:
    """All that does not kill it, in one."""
    for what, code in REFUSED.items():
        assert await probe(vm, code) == "PermissionError", what
    assert await probe(vm, "result = os.environ.get('A_SECRET')") == "None"
    assert await probe(vm, "result = os.getpid()") == "1"

    process = Path(f"/proc/{worker_pid(vm)}")
    threads = [status_of(thread) for thread in (process / "task").iterdir()]
    threads = [thread for thread in threads if not thread["Name"].startswith("kvm-")]  # its own
    assert len(threads) == 3  # loop, vCPU, I/O
    for thread in threads:  # one filter of all, and one of its role
        walls = [thread[name] for name in ("NoNewPrivs", "Seccomp", "Seccomp_filters")]
        assert walls == ["1", "2", "2"]
    status = threads[0]
    for capabilities in ("CapInh", "CapPrm", "CapEff", "CapAmb"):
        assert int(status[capabilities], 16) == 0
    # In a user namespace it is nobody else than before, but there without rights.
    if os.readlink(process / "ns/user") == os.readlink("/proc/self/ns/user"):
        assert 0 not in map(int, status["Uid"].split() + status["Gid"].split())
        assert status["Groups"].strip() == ""
    for space in ("mnt", "pid", "net", "ipc", "uts", "cgroup"):
        assert os.readlink(process / "ns" / space) != os.readlink(f"/proc/self/ns/{space}")
    assert os.listdir(process / "root") == []
    assert "0 " in (process / "limits").read_text().split("Max core file size")[1].split("\n")[0]
    mounts = (process / "mountinfo").read_text().splitlines()
    assert len(mounts) == 1
    assert " ro," in mounts[0]


async def test_files_are_what_was_handed_in(vm: avmm.MicroVM) -> None:
    process = Path(f"/proc/{worker_pid(vm)}")
    files = {os.readlink(fd) for fd in (process / "fd").iterdir()}
    names = {Path(path).name for path in files if path.startswith("/")}
    assert names == {"null", "kvm", "disk.img"}


async def test_a_worker_of_avmms_own_runs_no_code_that_it_is_given(
    tiny_guest: Assemble, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with isolated(tiny_guest(SPIN)) as vm:
        with pytest.raises(avmm.HostError, match="Probe out of turn"):
            await probe(vm, "result = 1")


async def test_a_worker_that_talks_nonsense_is_killed(vm: avmm.MicroVM) -> None:
    with pytest.raises(avmm.HostError) as raised:
        await probe(vm, "os.write(3, bytes([1, 0, 0, 0, 0xc1]))")
    assert raised.value.kind == "worker-protocol"
    assert (await vm.wait()).error is raised.value
