"""Compiles native/ through cffi's API mode, and programs for guests; everything else is in
pyproject.toml."""

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from setuptools import setup
from setuptools.command.build_ext import build_ext


@dataclass(frozen=True)
class Program:
    """What is built of a folder's sources, within the package. without: what works all the same
    where it cannot be built."""

    name: str
    folder: str
    target: str
    options: tuple[str, ...]
    without: str


PROGRAMS = (
    Program(
        "the guest agent",
        "native/agent",
        "src/avmm/agent/avmm-agent",
        ("-Os", "-static", "-s"),
        "all but Config(agent=True)",
    ),
    Program(
        "the launcher of workers",
        "native/launch",
        "src/avmm/machine/isolation/avmm-launch",
        ("-Os", "-static", "-s"),
        'all but MicroVM(isolation="process")',
    ),
    Program(
        "the guest that attacks",
        "native/attacker",
        "src/avmm/bench/avmm-attacker",
        (
            *("-O1", "-m64", "-ffreestanding", "-fno-pie", "-fno-stack-protector"),
            *("-fcf-protection=none", "-fno-asynchronous-unwind-tables", "-mno-red-zone"),
            *("-mgeneral-regs-only", "-nostdlib", "-static", "-no-pie", "-s"),
            *(
                "-Wl,-Ttext=0x101000",
                "-Wl,--build-id=none",
                "-Wl,-z,max-page-size=4096",
                "-Wl,-z,noexecstack",
            ),
        ),
        "all but `avmm bench attack`",
    ),
)


class BuildWithPrograms(build_ext):
    """The extension, then the programs."""

    def run(self) -> None:
        super().run()
        for program in PROGRAMS:
            self._build(program)

    def _build(self, program: Program) -> None:
        target = Path(program.target)
        if not self.inplace:
            target = Path(self.build_lib, *target.parts[1:])
        files = sorted(Path(program.folder).iterdir())
        newest = max(path.stat().st_mtime for path in files)
        if target.exists() and target.stat().st_mtime >= newest and not self.force:
            return
        target.parent.mkdir(parents=True, exist_ok=True)
        new = target.with_name(f"{target.name}.{os.getpid()}")
        command = [
            *os.environ.get("CC", "gcc").split(),
            *("-std=gnu11", "-Wall", "-Wextra", "-Wshadow", *program.options),
            *(["-Werror"] if os.environ.get("AVMM_WERROR") else []),
            *("-o", str(new), *(str(path) for path in files if path.suffix in (".c", ".S"))),
        ]
        try:
            subprocess.run(command, check=True)
            new.replace(target)
        except (OSError, subprocess.CalledProcessError) as e:
            if os.environ.get("AVMM_WERROR"):
                raise
            print(
                f"{program.name} is left out, since it cannot be built; {program.without} works: "
                f"{e}",
                file=sys.stderr,
            )


setup(cffi_modules=["native/build.py:ffi"], cmdclass={"build_ext": BuildWithPrograms})
