"""Logging for programs: a library only ever gets loggers, and this module sets them up."""

from __future__ import annotations

import logging
import sys


def log_to_stderr(verbosity: int) -> None:
    """avmm's log on stderr: warnings at 0, information at 1, everything from 2 on."""
    level = {0: logging.WARNING, 1: logging.INFO}.get(verbosity, logging.DEBUG)
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(name)s: %(message)s"))
    logger = logging.getLogger("avmm")
    logger.setLevel(level)
    logger.addHandler(handler)
