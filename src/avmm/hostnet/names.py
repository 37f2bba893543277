"""What may name and address a network interface; stdlib only, so that checking stays cheap."""

from __future__ import annotations

import ipaddress
import os
import re

from avmm.errors import ConfigError

NAME_MAX_BYTES = 15
MTU_MIN, MTU_MAX = 68, 65521
"""A TAP's frame, header included, has to fit 64 KiB less what the kernel keeps."""

_MAC = re.compile(r"[0-9a-fA-F]{2}(:[0-9a-fA-F]{2}){5}")


def check_interface_name(name: str) -> None:
    """Raises ConfigError("interface-name") for a name the kernel would refuse."""
    if not name or len(name.encode()) > NAME_MAX_BYTES:
        raise ConfigError(
            "interface-name",
            f"TAP {name!r}: a name has 1 to {NAME_MAX_BYTES} bytes, this one {len(name.encode())}",
        )
    if name in (".", "..") or re.search(r"[/:\s%]", name):
        raise ConfigError("interface-name", f"TAP {name!r}: no '/', ':', '%' or blanks in a name")


def parse_mac(text: str, what: str) -> bytes:
    """Six bytes; ConfigError("mac") unless it is a unicast address."""
    if not _MAC.fullmatch(text):
        raise ConfigError("mac", f"{what}: {text!r} is not a MAC address like 52:54:00:12:34:56")
    mac = bytes.fromhex(text.replace(":", ""))
    if mac[0] & 1 or mac == bytes(6):
        raise ConfigError(
            "mac", f"{what}: {text} is not a unicast address; make its first byte even"
        )
    return mac


def random_mac() -> str:
    """A unicast address, locally administered."""
    return (bytes([0x02]) + os.urandom(5)).hex(":")


def parse_host(text: str, what: str) -> ipaddress.IPv4Interface | ipaddress.IPv6Interface:
    """The host's end of a link, with its prefix; ConfigError("address")."""
    try:
        if "/" not in text:
            raise ValueError("the prefix length is missing")
        return ipaddress.ip_interface(text)
    except ValueError as e:
        raise ConfigError(
            "address", f"{what}: host={text}: {e}; write for example 172.31.0.1/24"
        ) from None


def check_guest(guest: str, host: str | None, what: str) -> None:
    """Raises ConfigError("address") unless `guest` is another IPv4 address of the host's net."""
    if host is None:
        raise ConfigError("address", f"{what}: guest={guest} needs host= for network and gateway")
    interface = parse_host(host, what)
    try:
        address = ipaddress.IPv4Address(guest)
    except ValueError:
        raise ConfigError("address", f"{what}: guest={guest} is not an IPv4 address") from None
    if address not in interface.network or address == interface.ip:
        raise ConfigError(
            "address", f"{what}: guest={guest} is not another address of {interface.network}"
        )


def check_mtu(mtu: int, what: str) -> None:
    """Raises ConfigError("mtu")."""
    if not MTU_MIN <= mtu <= MTU_MAX:
        raise ConfigError("mtu", f"{what}: mtu={mtu} is not in {MTU_MIN} to {MTU_MAX}")
