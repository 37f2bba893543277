"""The folders of named instances: made, found, refused, taken over, removed."""

from __future__ import annotations

import os
import signal
import socket
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from avmm.cli import instance
from avmm.cli.instance import Instance, claimed, find, running
from avmm.cli.main import main
from avmm.cli.run import placed
from avmm.errors import ConfigError, HostError
from avmm.machine.config import Config
from avmm.virtio.devices.vsock import Vsock

HOLD = """
import sys, time
from avmm.cli.instance import claimed
with claimed(sys.argv[1]):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture(autouse=True)
def runtime_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    return tmp_path


def holder(name: str) -> subprocess.Popen[str]:
    """Another process with an instance of that name."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, name], stdout=subprocess.PIPE, text=True, env=environment
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def test_an_instance_is_a_private_folder_that_is_gone_afterwards(runtime_dir: Path) -> None:
    with claimed("web-1") as made:
        assert made.path == runtime_dir / "avmm" / "web-1"
        for folder in (made.path, made.path.parent):
            assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        assert find("web-1") == made
        assert running() == [(made, os.getpid())]
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(made.console_path))
        (made.path / "left").mkdir()
    assert list((runtime_dir / "avmm").iterdir()) == []


def test_a_name_is_one_instances_at_a_time() -> None:
    with claimed("a"), claimed("b"):
        taken = rf"--name a: .* runs \({os.getpid()}\)"
        with pytest.raises(ConfigError, match=taken), claimed("a"):
            pass
        assert [found.name for found, _ in running()] == ["a", "b"]


def test_what_a_killed_process_left_is_not_running_and_is_taken_over(runtime_dir: Path) -> None:
    with holder("a") as process:
        assert find("a").pid() == process.pid
        with pytest.raises(ConfigError, match=str(process.pid)), claimed("a"):
            pass
        process.send_signal(signal.SIGKILL)
    stale = runtime_dir / "avmm" / "a"
    (stale / "console.sock").touch()
    assert running() == []
    with claimed("a") as made:
        assert find("a").pid() == os.getpid()
        assert not made.console_path.exists()
    assert not stale.exists()


def test_an_unknown_name_says_which_there_are() -> None:
    with pytest.raises(ConfigError, match="--name x is running: none is running"):
        find("x")
    with claimed("a"), claimed("b"), pytest.raises(ConfigError, match="running are a, b"):
        find("x")


@pytest.mark.parametrize("name", ["", ".", "..", "-a", "a/b", "../a", "a" * 65, "a b", "a\n"])
def test_names_that_are_no_folders_are_refused(name: str) -> None:
    with pytest.raises(ConfigError) as refused, claimed(name):
        pass
    assert refused.value.kind == "name"


def test_a_path_too_long_for_sockets_is_refused(
    runtime_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = runtime_dir / ("x" * 60) / ("y" * 60)
    long.mkdir(parents=True)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(long))
    with pytest.raises(ConfigError, match="too long a path"), claimed("a"):
        pass


def test_a_folder_that_is_a_link_is_refused(runtime_dir: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (runtime_dir / "avmm").symlink_to(elsewhere)
    with pytest.raises(HostError, match="Folder of the instance"), claimed("a"):
        pass
    assert list(elsewhere.iterdir()) == []


def test_without_a_runtime_folder_it_is_in_the_temporary_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("XDG_RUNTIME_DIR")
    monkeypatch.setattr(instance.os.path, "isdir", lambda path: False)
    monkeypatch.setattr(instance.tempfile, "gettempdir", lambda: str(tmp_path))
    with claimed("a") as made:
        assert made.path == tmp_path / f"avmm-{os.getuid()}" / "a"


def test_list_prints_names_and_process_ids(capsys: pytest.CaptureFixture[str]) -> None:
    with claimed("a"), claimed("b"):
        assert main(["list"]) == 0
    assert capsys.readouterr().out == f"a\t{os.getpid()}\nb\t{os.getpid()}\n"


def test_the_vsock_of_an_instance_has_its_unix_socket_in_the_folder() -> None:
    web = Instance("web", Path("/run/user/0/avmm/web"))
    there = Vsock(uds="/run/user/0/avmm/web/vsock.sock")
    assert placed(Config(kernel="k", vsock=True), web).vsock == there
    assert placed(Config(kernel="k", vsock=Vsock(9)), web).vsock == Vsock(9, uds=there.uds)
    for config in (Config(kernel="k"), Config(kernel="k", vsock=Vsock(uds="/elsewhere"))):
        assert placed(config, web) is config
