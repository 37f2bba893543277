"""Disks written in Python, ready for use: AsyncDisk(...) attaches them, and any of your own."""

from avmm.block.objects.faults import FaultRates, FaultyDisk
from avmm.block.objects.http import HttpDisk, HttpStatistics
from avmm.block.objects.overlay import OverlayDisk
from avmm.block.objects.ram import RamDisk

__all__ = [
    "FaultRates",
    "FaultyDisk",
    "HttpDisk",
    "HttpStatistics",
    "OverlayDisk",
    "RamDisk",
]
