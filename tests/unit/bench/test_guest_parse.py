"""What the programs in a benchmark guest print, as they printed it once (recorded/)."""

from __future__ import annotations

from pathlib import Path

import pytest

from avmm.bench.guest import parse

RECORDED = Path(__file__).parent / "recorded"


def recorded(name: str) -> str:
    return (RECORDED / name).read_text()


def test_fio_gives_iops_requests_and_latencies_of_the_direction_that_was_used() -> None:
    reading = parse.fio(recorded("fio-randread.json"), bandwidth=False)
    assert reading.value == pytest.approx(915.584416)
    assert reading.requests == 1833
    assert reading.p50_s == pytest.approx(0.034340864)
    assert reading.p99_s is not None
    assert reading.p99_s > reading.p50_s


def test_fio_gives_bytes_per_second_for_sequential_work() -> None:
    reading = parse.fio(recorded("fio-write.json"), bandwidth=True)
    assert reading.requests == 16
    assert reading.value > 1e6


def test_fio_may_warn_before_its_json() -> None:
    text = "fio: file system is weird\n" + recorded("fio-randread.json")
    assert parse.fio(text, bandwidth=False).requests == 1833


def test_fio_that_failed_is_no_result() -> None:
    with pytest.raises(ValueError, match="errno 1"):
        parse.fio(recorded("fio-failed.json"), bandwidth=False)


def test_iperf3_gives_what_arrived() -> None:
    reading = parse.iperf3(recorded("iperf3.json"))
    assert reading.value == pytest.approx(424.397e6, rel=1e-3)


def test_iperf3_without_a_server_is_no_result() -> None:
    with pytest.raises(ValueError, match="Connection refused"):
        parse.iperf3(recorded("iperf3-refused.json"))


def test_pps_gives_what_arrived_by_the_receivers_clock() -> None:
    reading = parse.pps(recorded("pps.json"))
    assert reading.requests == 44390
    assert reading.value == pytest.approx(44390 / 2.006552001)


def test_pps_of_which_nothing_arrived_is_no_result() -> None:
    with pytest.raises(ValueError, match="0 of 10 packets"):
        parse.pps('{"sent": 10, "received": 0, "ns": 0}')


def test_vsock_gives_how_many_a_second_or_the_time_of_one() -> None:
    text = '{"count": 500, "ns": 2000000000}'
    assert parse.vsock(text) == parse.Reading(250.0, 500)
    assert parse.vsock(text, round_trips=True) == parse.Reading(0.004, 500)
    with pytest.raises(ValueError, match="0 in"):
        parse.vsock('{"count": 0, "ns": 2000000000}')


def test_ping_gives_the_median_of_its_answers() -> None:
    text = recorded("ping.txt")
    reading = parse.ping(text)
    assert reading.requests == 20
    assert 0.000003 <= reading.value <= 0.000018, "the mean is 18 us, one answer took 292 us"
    assert reading.p99_s == pytest.approx(0.000292)


def test_ping_without_answers_is_no_result() -> None:
    with pytest.raises(ValueError, match="0 answers"):
        parse.ping("PING 10.0.0.1 (10.0.0.1): 56 data bytes\n")


@pytest.mark.parametrize("text", ["", "not json", "{", '{"jobs": []}'])
def test_what_is_cut_off_is_no_result(text: str) -> None:
    for read in (lambda t: parse.fio(t, bandwidth=False), parse.iperf3, parse.pps, parse.ping):
        with pytest.raises(ValueError):  # noqa: PT011
            read(text)


def test_counters_are_summed_over_cpus_and_devices() -> None:
    before, after = recorded("counters.before"), recorded("counters.after")
    assert parse.interrupts(after) - parse.interrupts(before) == 1088 + 4
    assert parse.packets(after) - parse.packets(before) == 5
    two_cpus = " 25:        10        32  PCI-MSI 16384-edge      virtio0-req.0\n"
    assert parse.interrupts(two_cpus) == 42
