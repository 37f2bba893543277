"""The walls of a worker process, one without the others."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

ALONE = """
import os
from avmm.native import lib
step = {}
if step == "root":
    assert lib.av_walls_root() == 0
    assert os.listdir("/") == []
elif step == "landlock":
    os.stat("/etc/passwd")
    lib.av_walls_identity(-1, -1)
    if lib.av_walls_landlock() <= 0:
        raise SystemExit(77)
elif step == "filter":
    lib.av_walls_identity(-1, -1)
    assert lib.av_walls_filter(lib.AV_ROLE_BUILD) == 0
try:
    open({!r})
except OSError as e:
    print(type(e).__name__)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("step", "error"),
    [("root", "FileNotFoundError"), ("landlock", "PermissionError"), ("filter", "PermissionError")],
)
def test_each_wall_stands_alone(step: str, error: str) -> None:
    """A file is behind three of them; each is enough."""
    code = ALONE.format(repr(step), __file__)
    unshared = ["unshare", "--mount", *(["--user", "-r"] if os.getuid() else [])]
    ran = subprocess.run([*unshared, sys.executable, "-c", code], capture_output=True, text=True)
    if ran.returncode == 77:
        pytest.skip("this kernel has no Landlock")
    assert (ran.returncode, ran.stdout.strip()) == (0, error), ran.stderr
