"""What a worker process cannot have is refused when the microVM is made, by the field's name."""

from __future__ import annotations

import pytest

import avmm
from avmm.block.objects import RamDisk
from avmm.machine.isolation import messages
from avmm.machine.isolation.files import Handed, config_values
from avmm.machine.reason import ExitKind


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("nets", [avmm.Tap("tap0", vhost=True)]),
        ("nets", [avmm.Nic()]),
        ("ports", avmm.Ports(["a"])),
        ("disks", [avmm.AsyncDisk(RamDisk(4096))]),
    ],
)
def test_what_stays_in_the_program_is_refused(field: str, value: object) -> None:
    config = avmm.Config(kernel="k", **{field: value})  # type: ignore[arg-type]
    with pytest.raises(avmm.ConfigError, match=f"^{field}.*: not with isolation by process") as e:
        avmm.MicroVM(config, isolation="process")
    assert e.value.kind == "isolation"


def test_another_isolation_is_refused() -> None:
    with pytest.raises(avmm.ConfigError, match="'magic' is not 'process' or None"):
        avmm.MicroVM(avmm.Config(kernel="k"), isolation="magic")  # type: ignore[arg-type]


def test_a_configuration_arrives_as_it_was() -> None:
    limit = avmm.RateLimit(bps="1M", ops=3)
    config = avmm.Config(
        kernel="k",
        initrd="i",
        cpus=3,
        disks=[avmm.Disk("d", read_only=True, limit=limit), avmm.Disk("e", id="x")],
        nets=[avmm.Tap("tap0", host="10.0.0.1/24", tx_limit=limit)],
        rng=avmm.Rng(home="loop"),
        console=True,
        vsock=avmm.Vsock(9),
        agent=True,
        transport="mmio",
        stop_grace_s=2.5,
    )
    values = config_values(config)
    sent = messages.packed(messages.Setup(values, [("k", 0)], [], ["serial"], True, 1, 2, 3))
    setup = messages.msgspec.msgpack.decode(sent[messages.LENGTH_BYTES :], type=messages.Setup)
    assert avmm.Config.from_values(setup.config, "worker") == config


def test_a_worker_listens_at_no_unix_socket() -> None:
    config = avmm.Config(kernel="k", vsock=avmm.Vsock(9, "/run/v"))
    assert avmm.Config.from_values(config_values(config), "worker").vsock == avmm.Vsock(9)


@pytest.mark.parametrize(
    "error",
    [
        avmm.ConfigError("disk", "Disk x is empty"),
        avmm.HostError("disk-lock", op="lock", path="/x", errno=13, remedy="none"),
        avmm.BugError("worker", "wrong"),
    ],
)
def test_an_error_arrives_as_it_was(error: avmm.AvmmError) -> None:
    again = messages.error_of(messages.failure_of(error))
    assert (type(again), again.kind, str(again)) == (type(error), error.kind, str(error))


def test_an_error_of_no_family_is_a_bug() -> None:
    again = messages.error_of(messages.failure_of(ValueError("x")))
    assert isinstance(again, avmm.BugError)
    assert str(again) == "ValueError: x"


def test_a_file_is_given_once_and_only_as_it_was_opened() -> None:
    opener = Handed([("/a", 0), ("/a", 0), ("/b", 2)], [10, 11, 12])
    assert [opener("/a", 0), opener("/b", 2), opener("/a", 0)] == [10, 12, 11]
    for path, flags in (("/a", 0), ("/b", 0), ("/c", 0)):
        with pytest.raises(FileNotFoundError):
            opener(path, flags)


def test_an_error_of_a_reason_does_not_count_when_reasons_are_compared() -> None:
    error = avmm.HostError("worker-died", op="x")
    assert avmm.ExitReason(ExitKind.ERROR, "x", error) == avmm.ExitReason(ExitKind.ERROR, "x")
