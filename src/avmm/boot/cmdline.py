"""The kernel command line."""

from __future__ import annotations

import ipaddress
import re

from avmm.errors import ConfigError

LINUX_MAX_BYTES = 2047
"""COMMAND_LINE_SIZE of x86 Linux, less its terminator."""


def encode(cmdline: str, max_bytes: int = LINUX_MAX_BYTES) -> bytes:
    """The command line as the guest gets it, terminated.

    Raises ConfigError("cmdline") for one that the kernel would cut or misread.
    """
    if any(c in cmdline for c in "\n\r\0"):
        raise ConfigError("cmdline", f"Command line {cmdline!r}: it must be a single line")
    try:
        data = cmdline.encode()
    except UnicodeEncodeError as e:
        raise ConfigError("cmdline", f"Command line {cmdline!r}: it is not UTF-8") from e
    if len(data) > max_bytes:
        raise ConfigError(
            "cmdline",
            f"Command line of {len(data)} bytes: this kernel takes {max_bytes}; shorten it, or "
            "put what it carries into the initrd",
        )
    return data + b"\0"


def guest_address(guest: str, host: str, device: str) -> str:
    """The `ip=` parameter that gives `device` the address `guest` in the network of `host`.

    guest: an address without a prefix; host: the host's end with its prefix, the gateway.
    """
    interface = ipaddress.IPv4Interface(host)
    return network_address(f"{guest}/{interface.network.prefixlen}", str(interface.ip), device)


def network_address(address: str, gateway: str | None, device: str) -> str:
    """The `ip=` parameter that gives `device` an address with its prefix, and maybe a gateway."""
    interface = ipaddress.IPv4Interface(address)
    return f"ip={interface.ip}::{gateway or ''}:{interface.netmask}::{device}:off"


def with_rdinit(cmdline: str, path: str) -> tuple[str, str]:
    """The command line with `path` as the initramfs's first program, and the one it had before."""
    kernels, separator, inits = re.match(r"(?s)(.*?)((?:^|\s)--(?:\s|$)|$)(.*)", cmdline).groups()  # type: ignore[union-attr]
    given = re.findall(r"(?:^|\s)rdinit=(\S+)", kernels)
    kernels = re.sub(r"(?:^|\s)rdinit=\S+", "", kernels)
    return f"{kernels} rdinit={path}{separator}{inits}".strip(), given[-1] if given else "/init"
