"""The command line: options, exit codes, messages, the terminal."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import pty
import subprocess
import sys
import termios
from pathlib import Path

import pytest

from avmm.cli import doctor
from avmm.cli.doctor import Verdict
from avmm.cli.main import _parser, main
from avmm.cli.run import make_config
from avmm.cli.terminal import Input, Output, raw_mode
from avmm.console.console import Console
from avmm.machine.config import Config, Disk, Ports, Rng, Tap
from fakes.mmio_driver import settle

HEAVY = ("pyroute2", "uvloop", "cffi", "avmm._native", "msgspec", "asyncio")


def config_of(*arguments: str) -> Config:
    return make_config(_parser().parse_args(["run", *arguments]))


@pytest.mark.parametrize("module", ["avmm", "avmm.cli.main"])
def test_importing_is_cheap(module: str) -> None:
    program = f"import sys, {module}; print([m for m in {HEAVY!r} if m in sys.modules])"
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert run.stdout.strip() == "[]"


def test_every_public_name_can_be_imported() -> None:
    import avmm

    assert all(getattr(avmm, name) is not None for name in avmm.__all__)
    assert set(avmm.__all__) <= set(dir(avmm))
    with pytest.raises(AttributeError, match="no attribute 'Nonsense'"):
        _ = avmm.Nonsense


def test_help_names_every_field_of_the_configuration(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["run", "--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    for name in {*Config.__struct_fields__} - {"devices"}:  # which only Python can say
        flag = {"disks": "--disk", "nets": "--net"}.get(name, f"--{name.replace('_', '-')}")
        assert flag in text
    assert "Ctrl-]" in text


def test_options_make_the_same_configuration_as_python() -> None:
    assert config_of(
        *("--kernel", "k", "--cpus", "2", "--memory", "1G", "--hugepages"),
        *("--disk", "a,ro", "--disk", "b", "--net", "tap=t0,host=10.0.0.1/24", "--rng"),
        *("--on-reboot", "restart", "--stop-grace-s", "2.5", "--scrollback", "1M"),
        *("--console", "--ports", "logs:data"),
    ) == Config(
        kernel="k",
        cpus=2,
        memory="1G",
        hugepages=True,
        disks=[Disk("a", read_only=True), Disk("b")],
        nets=[Tap("t0", host="10.0.0.1/24")],
        rng=True,
        on_reboot="restart",
        stop_grace_s=2.5,
        scrollback="1M",
        console=True,
        ports=Ports(["logs", "data"]),
    )


def test_options_take_the_place_of_the_files_values(tmp_path: Path) -> None:
    path = tmp_path / "vm.json"
    path.write_text(json.dumps({"kernel": "k", "cpus": 4, "disks": ["a"]}))
    assert config_of("--config", str(path), "--cpus", "2", "--rng", "id=r") == Config(
        kernel="k", cpus=2, disks=[Disk("a")], rng=Rng(id="r")
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--kernel is needed"),
        (["--kernel", "k", "--cpus", "0"], "cpus: 0"),
        (["--kernel", "k", "--ports", "a:a"], "'a' is given more than once"),
        (["--kernel", "k", "--scrollback", "0"], "scrollback: 0"),
        (["--kernel", "k", "--cpus", "many"], "--cpus many: a number"),
        (["--kernel", "k", "--memory", "lots"], "'lots'"),
        (["--kernel", "k", "--disk", "a,rw"], "unknown key 'rw'"),
        (["--kernel", "k", "--net", "tap=averyveryverylongname"], "1 to 15 bytes"),
        (["--config", "/nonexistent/vm.toml"], "/nonexistent/vm.toml"),
        (["--kernel", "/nonexistent/kernel"], "/nonexistent/kernel"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    capfd: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    if "/nonexistent/kernel" in arguments and not os.access("/dev/kvm", os.R_OK | os.W_OK):
        pytest.skip("the kernel is looked for only where there is KVM")
    assert main(["run", *arguments]) == 2
    captured = capfd.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("avmm: ")
    assert captured.err.count("\n") == 1
    assert message in captured.err


def test_unknown_commands_and_options_exit_with_2() -> None:
    for arguments in (["fly"], ["run", "--wings"], []):
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        assert ended.value.code == 2


@pytest.mark.parametrize("fails", [False, True])
def test_raw_mode_is_undone_on_every_way_out(fails: bool) -> None:
    primary, secondary = pty.openpty()
    before = termios.tcgetattr(secondary)
    try:
        with raw_mode(secondary):
            assert not termios.tcgetattr(secondary)[3] & (termios.ICANON | termios.ECHO)
            if fails:
                raise ValueError("in between")
    except ValueError:
        assert fails
    assert termios.tcgetattr(secondary) == before
    os.close(primary)
    os.close(secondary)


class FakeGuest:
    """Takes what is typed."""

    def __init__(self) -> None:
        self.typed = b""
        self.console = Console("console", self._put)

    def _put(self, data: memoryview) -> int:
        self.typed += data
        return len(data)


async def typed(data: bytes, *, escape: bool) -> tuple[bytes, bool]:
    """What reaches the console of `data` on a pipe, and whether the escape key was noticed."""
    guest, escaped = FakeGuest(), asyncio.Event()
    read_fd, write_fd = os.pipe()
    os.write(write_fd, data)
    os.close(write_fd)
    await Input(read_fd, guest.console.write, escaped.set if escape else None).forward()
    os.close(read_fd)
    return guest.typed, escaped.is_set()


async def test_input_goes_to_the_guest_until_its_end() -> None:
    assert await typed(b"ls\n", escape=True) == (b"ls\n", False)


async def test_the_escape_key_ends_input_and_is_not_passed_on() -> None:
    assert await typed(b"ls\n\x1dmore", escape=True) == (b"ls\n", True)
    assert await typed(b"a\x1db", escape=False) == (b"a\x1db", False)


async def test_a_regular_file_as_input_is_read(tmp_path: Path) -> None:
    path = tmp_path / "input"
    path.write_bytes(b"x" * 200_000)
    guest = FakeGuest()
    with path.open("rb") as file:
        await Input(file.fileno(), guest.console.write, None).forward()
    assert guest.typed == b"x" * 200_000


async def test_output_whose_reader_is_gone_says_so_once() -> None:
    closed: list[str] = []
    read_fd, write_fd = os.pipe()
    guest = FakeGuest()
    reader, _ = guest.console.open()
    output = Output(write_fd, lambda: closed.append("closed"))
    showing = asyncio.create_task(output.show(reader))
    guest.console.receive(b"before")
    await settle()
    assert os.read(read_fd, 100) == b"before"
    os.close(read_fd)
    guest.console.receive(b"after")
    await settle()
    guest.console.receive(b"and after")
    guest.console.close()
    await showing
    os.close(write_fd)
    assert closed == ["closed"]


async def test_output_waits_for_a_slow_reader_and_the_loop_goes_on() -> None:
    read_fd, write_fd = os.pipe()
    guest = FakeGuest()
    reader, _ = guest.console.open()
    with Output(write_fd, lambda: None) as output:
        showing = asyncio.create_task(output.show(reader))
        guest.console.receive(b"x" * 200_000)  # a pipe holds 64 KiB
        await settle()
        assert not showing.done()
        guest.console.close()
        os.set_blocking(read_fd, False)
        seen = 0
        while seen < 200_000:
            with contextlib.suppress(BlockingIOError):
                seen += len(os.read(read_fd, 65536))
            await asyncio.sleep(0)
        await showing
    os.close(read_fd)
    assert os.get_blocking(write_fd)
    os.close(write_fd)


async def test_output_to_a_file_is_at_its_place_in_it(tmp_path: Path) -> None:
    path = tmp_path / "log"
    guest = FakeGuest()
    reader, _ = guest.console.open()
    guest.console.receive(b"said")
    guest.console.close()
    with path.open("wb", buffering=0) as file:
        file.write(b"head:")
        with Output(file.fileno(), lambda: None) as output:
            await output.show(reader)
    assert path.read_bytes() == b"head:said"


def test_doctor_tells_hardware_from_software_kvm() -> None:
    hardware = doctor.check_hardware("flags\t\t: fpu vme svm\n")
    assert (hardware.verdict, "svm" in hardware.found) == (Verdict.OK, True)
    software = doctor.check_hardware("flags\t\t: fpu hypervisor\n")
    assert software.verdict is Verdict.WARN
    assert software.remedy


def test_doctor_names_a_remedy_for_what_is_missing() -> None:
    missing = [
        *doctor.check_kvm("/nonexistent/kvm"),
        doctor.check_tun("/nonexistent/tun"),
        doctor.check_net_admin("CapEff:\t0000000000000000\n"),
        doctor.check_hugepages("HugePages_Free:        0\n"),
        doctor.check_vhost_net("/nonexistent/vhost-net"),
    ]
    assert [check.verdict for check in missing] == [Verdict.FAIL, *[Verdict.WARN] * 4]
    assert all(check.remedy for check in missing)


def test_doctor_sees_what_is_there() -> None:
    assert doctor.check_net_admin("CapEff:\t0000000000001000\n").verdict is Verdict.OK
    assert doctor.check_hugepages("HugePages_Free:        7\n").found == "7 free"


def test_doctors_exit_code_follows_the_failures(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for verdict, code in ((Verdict.WARN, 0), (Verdict.FAIL, 1)):
        check = doctor.Check("thing", verdict, "found", "do this")
        monkeypatch.setattr(doctor, "examine", lambda check=check: [check])
        assert main(["doctor"]) == code
        assert "-> do this" in capsys.readouterr().out
        assert main(["doctor", "--json"]) == code
        assert json.loads(capsys.readouterr().out)[0]["verdict"] == verdict
