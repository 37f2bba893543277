"""The committed inputs of the fuzz targets (scripts/fuzz), without libFuzzer: each is given once to
its target, with memory and arithmetic watched."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[3]
CORPUS_BYTES_MAX = 64 << 10


def _builder() -> ModuleType:
    """native/fuzz/build.py, which is in no package."""
    spec = importlib.util.spec_from_file_location("fuzz_build", ROOT / "native/fuzz/build.py")
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


build = _builder()
TARGETS = {target.name: target for target in build.targets()}


def _has_sanitizers(compiler: str, folder: Path) -> bool:
    probe = folder / "probe.c"
    probe.write_text("int main(void) { return 0; }\n")
    command = [compiler, *build.SANITIZERS, str(probe), "-o", str(folder / "probe")]
    return shutil.which(compiler) is not None and not subprocess.run(command).returncode


@pytest.fixture(scope="session")
def programs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """What replays files, by target."""
    folder = tmp_path_factory.mktemp("fuzz")
    if not _has_sanitizers("gcc", folder):
        pytest.skip("NOT CHECKED: gcc cannot build with -fsanitize=address,undefined here")
    try:
        built: dict[str, Path] = build.build(
            list(TARGETS.values()), build.replaying("gcc", build.SANITIZERS), folder
        )
    except subprocess.CalledProcessError as e:
        pytest.fail(e.stderr)
    return built


@pytest.mark.slow
@pytest.mark.parametrize("name", TARGETS)
def test_the_corpus_does_no_harm(name: str, programs: dict[str, Path]) -> None:
    inputs = sorted(map(str, TARGETS[name].corpus.iterdir()))
    assert inputs
    ended = subprocess.run([programs[name], *inputs], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr[-4000:]
    assert ended.stderr.splitlines() == inputs, "some input was not given to the target"


def test_each_target_has_a_small_corpus_and_no_other_is_there() -> None:
    folders = {path.name: path for path in build.CORPORA.iterdir()}
    assert set(folders) == {*TARGETS, *(target.name for target in build.python_targets())}
    sizes = {
        name: sum(path.stat().st_size for path in folder.iterdir())
        for name, folder in folders.items()
    }
    assert all(size <= CORPUS_BYTES_MAX for size in sizes.values()), sizes
