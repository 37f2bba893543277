"""Prints docs/devices.md from the device types and their config structs."""

from __future__ import annotations

from avmm.config import option_keys
from avmm.machine.config import DEVICE_STRUCTS

HEAD = """\
<!-- Made by scripts/device_table.py; a test compares. -->
# Devices

All are virtio 1.3 devices, modern only, with INDIRECT_DESC and EVENT_IDX in both layouts of rings:
`--ring packed` (the default) offers packed ones, of which a driver may still choose split ones;
`--ring split` offers only those. They are on either transport: `--transport pci` (the default)
gives each queue an MSI-X vector and has room for 31, `--transport mmio` one interrupt line a
device and has room for 15. Devices are in the order of the configuration on both. In Python and in
config files a device is an entry of the field named below; on the command line it is
`FLAG VALUE,key=value,...`, the first key's name may be left out.

| device | virtio id | flag | field of Config | what it is |
|---|---|---|---|---|
"""


def table() -> str:
    """The whole document."""
    rows, sections = "", ""
    for field, struct in DEVICE_STRUCTS.items():
        kind = struct.device_type
        rows += f"| {kind.name} | {kind.virtio_id} | `{kind.flag}` | `{field}` | {kind.summary} |\n"
        sections += f"\n## {kind.name}\n\n| key | Python | |\n|---|---|---|\n"
        for key in option_keys(struct):
            sections += f"| `{key.name}` | `{'.'.join(key.path)}` | {key.description} |\n"
    return HEAD + rows + sections


if __name__ == "__main__":
    print(table(), end="")
