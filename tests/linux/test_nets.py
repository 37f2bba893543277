"""Networks: ping, bulk TCP, what the guest's NIC looks like, two microVMs at once, one of them on
virtio-mmio."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from avmm import Disk, ExitKind, Tap
from avmm.units import MIB
from linux.guest import Guests, Running, emulated_cpu
from linux.host import Receiver, assert_clean, pings, read_from_ext4, send

BULK_BYTES = (40 if emulated_cpu() else 100) * MIB
HOST, GUEST = "172.31.7.1", "172.31.7.2"
MAC = "52:54:00:12:34:56"
PORT, PORT_HEX = 5001, "1389"

# nc listens a moment after it starts; the kernel's table tells when.
BULK = f"""
sum() {{ sha256sum | cut -d ' ' -f 1; }}
echo "FACT mac $(cat /sys/class/net/eth0/address)"
echo "FACT mtu $(cat /sys/class/net/eth0/mtu)"
echo "FACT link $(cat /sys/class/net/eth0/carrier)"
ping -c 2 -W 10 {HOST} >/dev/null && echo "FACT ping ok"
head -c {BULK_BYTES} /dev/urandom >/up
echo "FACT up $(sum </up)"
nc {HOST} {PORT} </up >/dev/null
rm /up
nc -l -p {PORT} </dev/null >/down &
until grep -q ':{PORT_HEX} .* 0A ' /proc/net/tcp /proc/net/tcp6; do usleep 10000; done
echo LISTENING
wait $!
echo "FACT down $(sum </down)"
"""


def counter(tap: str, name: str) -> int:
    """One of the host's counters of a network device."""
    return int(Path(f"/sys/class/net/{tap}/statistics/{name}").read_text())


@pytest.mark.both_loops
async def test_bulk_tcp_arrives_whole_in_both_directions(guests: Guests) -> None:
    nets = [Tap("avmmt0", host=f"{HOST}/24", guest=GUEST, mac=MAC)]
    async with guests.running(BULK, nets=nets, cpus=2, memory="512M") as guest:
        async with Receiver(HOST, PORT) as receiver:
            await guest.says("LISTENING")
            up = await receiver.result()
        # The TAP's own view: what the guest sends is what the TAP receives.
        sizes = counter("avmmt0", "rx_bytes") / counter("avmmt0", "rx_packets")
        assert await pings(guests.assets.busybox, GUEST)
        down = await send(GUEST, PORT, BULK_BYTES)
        await guest.ended()
    assert guest.status == 0
    assert guest.fact("mac") == MAC
    assert guest.fact("mtu") == "1500"
    assert guest.fact("link") == "1"
    assert guest.fact("ping") == "ok"
    assert up.size_bytes == BULK_BYTES
    assert up.digest == guest.fact("up")
    assert down == guest.fact("down")
    assert sizes > 3000, "TCP segmentation offload would send larger packets"


async def test_two_microvms_at_once_each_on_its_own_disk_and_net(
    guests: Guests, root_disk: Path, other_root_disk: Path
) -> None:
    both_up = asyncio.Barrier(2)

    async def one(index: int, disk: Path) -> Running:
        net, host = f"172.31.{20 + index}", f"172.31.{20 + index}.1"
        script = f"""
            echo "I am {index}" >/who && sync
            echo "FACT mtu $(cat /sys/class/net/eth0/mtu)"
            echo READY
            read -r go && echo "FACT told $go"
            ping -c 3 -W 10 {host} >/dev/null && echo "FACT ping ok" """
        async with guests.running(
            script,
            disks=[Disk(str(disk))],
            nets=[Tap(f"avmmt{index}", host=f"{host}/24", guest=f"{net}.2", mtu=1400 + index)],
            append="root=/dev/vda",
            transport=("pci", "mmio")[index],
        ) as guest:
            await guest.says("READY")
            await both_up.wait()
            await guest.vm.console.write(b"go %d\n" % index)
            assert await pings(guests.assets.busybox, f"{net}.2")
            await guest.ended()
        return guest

    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(one(0, root_disk)), group.create_task(one(1, other_root_disk))]
    for index, task in enumerate(tasks):
        guest = task.result()
        assert guest.kind is ExitKind.POWEROFF
        assert guest.status == 0
        assert guest.fact("told") == f"go {index}"
        assert guest.fact("ping") == "ok"
        assert guest.fact("mtu") == str(1400 + index)
    for index, disk in enumerate((root_disk, other_root_disk)):
        assert_clean(disk)
        assert read_from_ext4(disk, "/who") == b"I am %d\n" % index


# Both CPUs send at the same time, each by the queue that is its own.
PAIRS = f"""
echo "FACT queues $(ls -d /sys/class/net/eth0/queues/tx-* | wc -l)"
ifconfig eth0 promisc && ifconfig eth0 -promisc
ping -c 2 -W 10 {HOST} >/dev/null && echo "FACT ping ok"
for n in 0 1; do
    head -c {16 * MIB} /dev/urandom >/up$n
    echo "FACT up$n $(sha256sum </up$n | cut -d ' ' -f 1)"
done
for n in 0 1; do taskset $((n + 1)) nc {HOST} $(({PORT} + n)) </up$n >/dev/null & done
wait
until [ "$(cat /sys/class/net/eth0/carrier)" = 0 ]; do usleep 10000; done
echo UNPLUGGED
until [ "$(cat /sys/class/net/eth0/carrier)" = 1 ]; do usleep 10000; done
ping -c 2 -W 10 {HOST} >/dev/null && echo "FACT again ok"
"""


@pytest.mark.parametrize(
    ("transport", "vhost"),
    [
        ("pci", True),
        pytest.param("pci", False, marks=pytest.mark.variant),
        pytest.param("mmio", True, marks=pytest.mark.variant),
    ],
)
async def test_each_vcpu_has_a_queue_pair(guests: Guests, transport: str, vhost: bool) -> None:
    nets = [Tap("avmmt0", host=f"{HOST}/24", guest=GUEST, queues=2, vhost=vhost)]
    options = {"cpus": 2, "io_threads": 2, "transport": transport}
    async with guests.running(PAIRS, nets=nets, **options) as guest:
        async with Receiver(HOST, PORT) as first, Receiver(HOST, PORT + 1) as second:
            up = [await first.result(), await second.result()]
        nic = guest.vm.statistics().devices["net0"]
        assert nic.counters["control_commands"] > 0
        assert nic.counters["control_errors"] == 0
        if not vhost:
            assert all(queue.chains > 0 for queue in nic.queues[:4])
        await guest.vm.pause()
        await guest.vm.resume()
        guest.vm.set_link("net0", False)
        await guest.says("UNPLUGGED")
        guest.vm.set_link("net0", True)
        await guest.ended()
    assert guest.status == 0
    assert guest.fact("queues") == "2"
    assert guest.fact("ping") == "ok"
    assert guest.fact("again") == "ok"
    assert [received.digest for received in up] == [guest.fact("up0"), guest.fact("up1")]
