"""Compiles native/ through cffi's API mode, and the guest agent, a program of its own; everything
else is in pyproject.toml."""

import os
import subprocess
import sys
from pathlib import Path

from setuptools import setup
from setuptools.command.build_ext import build_ext

AGENT = "src/avmm/agent/avmm-agent"


class BuildWithAgent(build_ext):
    """The extension, then native/agent/ as a static program within the package."""

    def run(self) -> None:
        super().run()
        target = Path(AGENT) if self.inplace else Path(self.build_lib, *Path(AGENT).parts[1:])
        sources = sorted(Path("native/agent").glob("*.c"))
        newest = max(path.stat().st_mtime for path in Path("native/agent").iterdir())
        if target.exists() and target.stat().st_mtime >= newest and not self.force:
            return
        target.parent.mkdir(parents=True, exist_ok=True)
        new = target.with_name(f"{target.name}.{os.getpid()}")
        command = [
            *os.environ.get("CC", "gcc").split(),
            *("-std=gnu11", "-Os", "-static", "-s", "-Wall", "-Wextra", "-Wshadow"),
            *(["-Werror"] if os.environ.get("AVMM_WERROR") else []),
            *("-o", str(new), *map(str, sources)),
        ]
        try:
            subprocess.run(command, check=True)
            new.replace(target)
        except (OSError, subprocess.CalledProcessError) as e:
            if os.environ.get("AVMM_WERROR"):
                raise
            # All but Config(agent=True) works without, and that says what is missing.
            print(f"the guest agent is left out, since it cannot be built: {e}", file=sys.stderr)


setup(cffi_modules=["native/build.py:ffi"], cmdclass={"build_ext": BuildWithAgent})
