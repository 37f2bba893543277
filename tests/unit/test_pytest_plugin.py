"""The pytest plugin, in pytest runs of its own; its microVMs are made by a fake."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from importlib.metadata import entry_points

import pytest

import avmm

avmm.MicroVM  # noqa: B018 # loads it once here, not once in each run

pytest_plugins = "pytester"

INSTALLED = bool(entry_points(group="pytest11", name="avmm"))
STARTED_CLOSED = ("started", "closed")

FAKE = """
import asyncio
import types
import pytest
import avmm
import avmm.pytest_plugin

LIFE = []


class FakeVM:
    def __init__(self, config):
        self.config = config
        self.state = avmm.State.NEW
        self.written = b""
        self.gone = 0

    async def start(self):
        self.loop = asyncio.get_running_loop()
        if self.config.cpus == 7:
            self.state = avmm.State.STOPPED
            raise avmm.HostError("memory", op="mmap", remedy="seven is too many")
        self.state = avmm.State.RUNNING
        self.written = b"booted " + self.config.kernel.encode()
        LIFE.append(f"started {self.config.kernel}")

    async def close(self):
        if self.state is not avmm.State.STOPPED:
            assert asyncio.get_running_loop() is self.loop
            self.state = avmm.State.STOPPED
            LIFE.append(f"closed {self.config.kernel}")
            if self.config.cpus == 8:
                raise avmm.BugError("close", "eight cannot be closed")

    @property
    def console(self):
        if self.config.cpus == 7:
            raise avmm.ConfigError("state", "never ran")
        end = self.gone + len(self.written)
        return types.SimpleNamespace(scrollback=self.written, end=end)


@pytest.fixture(scope="session", autouse=True)
def life():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(avmm, "MicroVM", FakeVM)
        patch.setattr(avmm.pytest_plugin, "KVM", __file__)
        yield
    print("\\nLIFE:", *LIFE, sep="|")
"""


ADDOPTS = "addopts = -s -p no:cacheprovider -p no:hypothesispytest"


class Runs:
    """Runs pytest on a test file, with the fake."""

    def __init__(self, pytester: pytest.Pytester) -> None:
        self.pytester = pytester
        pytester.makeconftest(FAKE)
        self.ini("")

    def ini(self, text: str) -> None:
        self.pytester.makeini(
            f"[pytest]\n{ADDOPTS}\nasyncio_mode = auto\n"
            f"asyncio_default_fixture_loop_scope = function\nfilterwarnings = error\n{text}"
        )

    def run(self, test: str, *arguments: str) -> pytest.RunResult:
        self.pytester.makepyfile("import asyncio, pytest, avmm\n" + textwrap.dedent(test))
        plugin = () if INSTALLED else ("-p", "avmm.pytest_plugin")
        return self.pytester.runpytest_inprocess(*plugin, *arguments)


@pytest.fixture
def runs(pytester: pytest.Pytester) -> Runs:
    return Runs(pytester)


def life(result: pytest.RunResult) -> list[str]:
    """What became of the microVMs, in order."""
    (line,) = (line for line in result.outlines if line.startswith("LIFE:"))
    return line.split("|")[1:]


def test_loading_it_loads_nothing_else_of_avmm() -> None:
    program = (
        "import sys, pytest, avmm.pytest_plugin\n"
        "print(sorted(m for m in sys.modules if m.startswith('avmm') or m == 'msgspec'))"
    )
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert run.stdout.strip() == "['avmm', 'avmm.pytest_plugin']"


def test_every_microvm_is_closed_at_the_end_of_its_test(runs: Runs) -> None:
    result = runs.run("""
        async def test_passes(microvm):
            one = await microvm(avmm.Config(kernel="one"))
            two = await microvm(kernel="two")
            assert one.state is two.state is avmm.State.RUNNING

        async def test_fails(microvm):
            await microvm(kernel="three")
            raise ValueError("the test fails")

        async def test_is_cancelled(microvm):
            await microvm(kernel="four")
            raise asyncio.CancelledError
        """)
    result.assert_outcomes(passed=1, failed=2)
    names = ["one", "two", "three", "four"]
    assert sorted(life(result)) == sorted(f"{what} {n}" for n in names for what in STARTED_CLOSED)
    assert life(result)[:4] == ["started one", "started two", "closed two", "closed one"]


def test_one_that_cannot_be_closed_fails_the_test_and_holds_up_no_other(runs: Runs) -> None:
    result = runs.run("""
        async def test_it(microvm):
            await microvm(kernel="one")
            await microvm(kernel="two", cpus=8)
        """)
    result.assert_outcomes(passed=1, errors=1)
    result.stdout.fnmatch_lines(["*microVMs of this test could not be closed*"])
    assert life(result)[2:] == ["closed two", "closed one"]


def test_a_failing_tests_report_has_the_console_of_each(runs: Runs) -> None:
    result = runs.run("""
        async def test_it(microvm):
            await microvm(kernel="one")
            vm = await microvm(kernel="two")
            vm.written, vm.gone = b"line\\r\\n\\x1b[2Jred\\xff", 1000
            with pytest.raises(avmm.HostError):
                await microvm(kernel="three", cpus=7)
            raise ValueError("the test fails")
        """)
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(
        [
            "*Captured console of microVM 1 call*",
            "booted one",
            "(running)",
            "*Captured console of microVM 2 call*",
            "(... 1000 bytes before are no longer known)",
            "line",
            "\\x1b[[]2Jred*",
            "(running)",
            "*Captured console of microVM 3 call*",
            "(it did not start)",
        ]
    )


def test_a_fixture_that_fails_on_it_has_the_console_too(runs: Runs) -> None:
    result = runs.run("""
        @pytest.fixture
        async def guest(microvm):
            vm = await microvm(kernel="one")
            raise ValueError("no guest")

        async def test_it(guest):
            pass
        """)
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines(["*Captured console of microVM 1 setup*", "booted one"])
    assert life(result) == ["started one", "closed one"]


def test_marks_give_fields_and_the_closer_one_counts(runs: Runs) -> None:
    result = runs.run("""
        pytestmark = pytest.mark.microvm(kernel="module", memory="64M")

        @pytest.mark.microvm(cpus=2)
        class TestClass:
            @pytest.mark.microvm(memory="128M")
            async def test_it(self, microvm):
                config = (await microvm()).config
                assert (config.kernel, config.memory, config.cpus) == ("module", "128M", 2)
                config = (await microvm(cpus=3, kernel="call")).config
                assert (config.kernel, config.memory, config.cpus) == ("call", "128M", 3)
                config = (await microvm(avmm.Config(kernel="whole"))).config
                assert (config.kernel, config.cpus) == ("whole", 1)
        """)
    result.assert_outcomes(passed=1)


def test_mistakes_are_named(runs: Runs) -> None:
    result = runs.run("""
        @pytest.mark.microvm("vmlinux")
        async def test_mark(microvm):
            pass

        async def test_calls(microvm):
            with pytest.raises(avmm.ConfigError, match="no kernel; give kernel= here or in @pyte"):
                await microvm()
            with pytest.raises(avmm.ConfigError, match="a Config, or its fields, not both"):
                await microvm(avmm.Config(kernel="k"), cpus=2)
            with pytest.raises(avmm.ConfigError, match="cpus: 0 is not in 1"):
                await microvm(kernel="k", cpus=0)
            assert microvm.started == []
        """)
    result.assert_outcomes(passed=1, errors=1)
    result.stdout.fnmatch_lines(["*takes kernel=*by name; got ('vmlinux',)*"])


DEFAULTS = """
    async def test_it(microvm):
        config = (await microvm()).config
        print("GOT", config.kernel, config.initrd)
        config = (await microvm(kernel="own")).config
        assert config.initrd is None
    """


def test_options_and_entries_name_the_kernel_of_tests_that_do_not(runs: Runs) -> None:
    folder = runs.pytester.path
    runs.ini("avmm_kernel = images/k\navmm_initrd = images/i\n")
    result = runs.run(DEFAULTS)
    result.assert_outcomes(passed=1)
    result.stdout.fnmatch_lines([f"*GOT {folder}/images/k {folder}/images/i"])
    result = runs.run(DEFAULTS, "--avmm-initrd", "/x/i")
    result.stdout.fnmatch_lines([f"*GOT {folder}/images/k /x/i"])
    result = runs.run(DEFAULTS, "--avmm-kernel", "other")
    result.stdout.fnmatch_lines([f"*GOT {folder}/other None"])


@pytest.mark.parametrize("scope", ["function", "class", "module", "session"])
def test_the_loops_scope_may_be_any(runs: Runs, scope: str) -> None:
    result = runs.run(f"""
        @pytest.mark.asyncio(loop_scope="{scope}")
        class TestClass:
            async def test_one(self, microvm):
                await microvm(kernel="one")

            async def test_other(self, microvm):
                await microvm(kernel="two")
        """)
    result.assert_outcomes(passed=2)
    assert life(result) == ["started one", "closed one", "started two", "closed two"]


def test_a_plain_test_may_use_it_on_a_loop_of_its_own(runs: Runs) -> None:
    result = runs.run("""
        def test_it(microvm):
            with asyncio.Runner() as runner:
                vm = runner.run(microvm(kernel="one"))
                microvm.close()
                assert vm.state is avmm.State.STOPPED
        """)
    result.assert_outcomes(passed=1)


def test_without_pytest_asyncio_it_says_what_is_missing(runs: Runs) -> None:
    runs.pytester.makeini(f"[pytest]\n{ADDOPTS} -p no:asyncio\n")
    result = runs.run("""
        async def test_it(microvm):
            pass
        """)
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines(["*needs pytest-asyncio: pip install pytest-asyncio*"])


def test_without_kvm_tests_are_skipped_with_the_reason(runs: Runs) -> None:
    result = runs.run(
        """
        @pytest.fixture(autouse=True, scope="module")
        def no_kvm(life):
            avmm.pytest_plugin.KVM = "/nowhere/kvm"

        async def test_it(microvm):
            await microvm(kernel="one")
        """,
        "-rs",
    )
    result.assert_outcomes(skipped=1)
    result.stdout.fnmatch_lines(["SKIPPED*microvm: /nowhere/kvm is missing or not accessible*"])
