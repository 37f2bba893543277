"""pytest plugin: microVMs for tests, stopped when the test ends, their consoles in its report.

    async def test_the_guest_is_linux(microvm):
        vm = await microvm(kernel="vmlinuz", initrd="initrd.img", agent=True)
        assert (await vm.run(["uname"])).stdout == b"Linux\n"

Every pytest of an environment that has avmm loads this module, so it loads nothing else of avmm
until a test asks for the fixture. docs/embedding.md shows it at work.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Generator
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    import asyncio

    import avmm

KVM = "/dev/kvm"

_FIELDS = "kernel=, memory=, and whatever else avmm.Config has"


class MicroVMs:
    """The `microvm` fixture: call it for a microVM that runs, as often as the test needs one.

    A test annotates it so: `async def test_it(microvm: MicroVMs) -> None`.
    """

    def __init__(self, defaults: dict[str, str], marked: dict[str, Any]) -> None:
        """defaults: kernel and initrd of the options; marked: the fields of the test's marks."""
        self.started: list[avmm.MicroVM] = []
        self._defaults = defaults
        self._marked = marked
        self._loops: list[asyncio.AbstractEventLoop] = []

    async def __call__(self, config: avmm.Config | None = None, /, **fields: Any) -> avmm.MicroVM:
        """Start a microVM and return it.

        It is made of `config`, or of a Config from the marks' fields and these, which take
        precedence. When neither names a kernel, kernel and initrd are those of --avmm-kernel and
        --avmm-initrd. Raises what MicroVM.start() does, and ConfigError("kernel") without one.
        """
        import asyncio

        import avmm

        if config is None:
            config = avmm.Config(**self._fields(fields))
        elif fields:
            raise avmm.ConfigError("config", "microvm: give a Config, or its fields, not both")
        vm = avmm.MicroVM(config)
        self.started.append(vm)
        self._loops.append(asyncio.get_running_loop())
        await vm.start()
        return vm

    # What follows is for the fixture.

    def close(self) -> None:
        """End all that were started, each on its loop; what fails does so when all have ended."""
        import asyncio

        failed = []
        for vm, loop in reversed(list(zip(self.started, self._loops, strict=True))):
            if loop.is_closed():  # which cancels what ran on it: the microVM has ended with it
                continue
            try:
                if loop.is_running():
                    asyncio.run_coroutine_threadsafe(vm.close(), loop).result()
                else:
                    loop.run_until_complete(vm.close())
            except Exception as e:
                failed.append(e)
        if failed:
            raise ExceptionGroup("microVMs of this test could not be closed", failed)

    def _fields(self, given: dict[str, Any]) -> dict[str, Any]:
        import avmm

        fields = self._marked | given
        if "kernel" not in fields:
            fields = self._defaults | fields
        if "kernel" not in fields:
            raise avmm.ConfigError(
                "kernel",
                "microvm: no kernel; give kernel= here or in @pytest.mark.microvm, --avmm-kernel, "
                "or avmm_kernel in pytest's configuration file",
            )
        return fields


_KEY = pytest.StashKey[MicroVMs]()


def pytest_addoption(parser: pytest.Parser) -> None:
    """--avmm-kernel and --avmm-initrd, and the same of the configuration file."""
    group = parser.getgroup("avmm", "microVMs (avmm)")
    for name, what in (("kernel", "kernel"), ("initrd", "initial RAM disk")):
        text = f"{what} of microVMs whose test names no kernel"
        group.addoption(f"--avmm-{name}", metavar="PATH", help=text)
        parser.addini(f"avmm_{name}", f"{text}; a path from this file's folder on")


def pytest_configure(config: pytest.Config) -> None:
    """The mark, and what belongs to pytest-asyncio where that is at work."""
    config.addinivalue_line(
        "markers", f"microvm({_FIELDS}): fields for the microVMs that this test starts"
    )
    if config.pluginmanager.hasplugin("asyncio"):
        config.pluginmanager.register(_on_asyncio(), "avmm-asyncio")


@pytest.fixture
def microvm(request: pytest.FixtureRequest) -> Generator[MicroVMs]:
    """Starts microVMs: `vm = await microvm(config)`; they end with the test.

    Fields of avmm.Config can also be given one by one, here or by @pytest.mark.microvm. Each
    console is shown when the test fails. The test is skipped where there is no /dev/kvm.
    """
    if not os.access(KVM, os.R_OK | os.W_OK):
        pytest.skip(f"microvm: {KVM} is missing or not accessible; `avmm doctor` says more")
    _prepare_loop(request)
    made = MicroVMs(_defaults(request.config), _marked(request.node))
    request.node.stash[_KEY] = made
    try:
        yield made
    finally:
        made.close()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Add the consoles of a test's microVMs to the report of what failed."""
    made = item.stash.get(_KEY, None)
    failed = call.excinfo is not None and not call.excinfo.errisinstance(pytest.skip.Exception)
    if made is not None and failed:
        for number, vm in enumerate(made.started, 1):
            item.add_report_section(call.when, f"console of microVM {number}", _console(vm))
    return (yield)


def _on_asyncio() -> object:
    """What is registered where pytest-asyncio is."""
    import pytest_asyncio

    class OnAsyncio:
        @pytest_asyncio.fixture
        async def _microvm_loop(self) -> None:
            """A fixture on a test's loop: the loop is there until those before it are gone."""

    return OnAsyncio()


def _prepare_loop(request: pytest.FixtureRequest) -> None:
    """See that a test's loop outlives its microVMs, and that it has one."""
    function = getattr(request.node, "obj", None)
    if not inspect.iscoroutinefunction(function):
        return
    if request.config.pluginmanager.hasplugin("avmm-asyncio"):
        request.getfixturevalue("_microvm_loop")
    elif request.node.get_closest_marker("anyio") is None:
        pytest.fail(
            "microvm: a test that is a coroutine needs pytest-asyncio: pip install pytest-asyncio",
            pytrace=False,
        )


def _defaults(config: pytest.Config) -> dict[str, str]:
    """Kernel and initrd as the user gave them, as absolute paths."""
    here = config.invocation_params.dir
    folder = config.inipath.parent if config.inipath else config.rootpath
    options, entries = {}, {}
    for name in ("kernel", "initrd"):
        if option := config.getoption(f"avmm_{name}"):
            options[name] = str(here / option)
        if entry := config.getini(f"avmm_{name}"):
            entries[name] = str(folder / os.path.expanduser(entry))
    # An initial RAM disk goes with its kernel.
    return options if "kernel" in options else entries | options


def _marked(node: pytest.Item) -> dict[str, Any]:
    """The fields of all marks of a test; of two, that which is closer to it counts."""
    fields: dict[str, Any] = {}
    for mark in reversed(list(node.iter_markers("microvm"))):
        if mark.args:
            pytest.fail(
                f"@pytest.mark.microvm takes {_FIELDS} by name; got {mark.args}", pytrace=False
            )
        fields |= mark.kwargs
    return fields


def _console(vm: avmm.MicroVM) -> str:
    """All that is still known of what a guest wrote, fit for a terminal."""
    import avmm

    try:
        console = vm.console
    except avmm.ConfigError:
        return "(it did not start)"
    text = console.scrollback.decode(errors="replace").replace("\r\n", "\n")
    gone = console.end - len(console.scrollback)
    head = f"(... {gone} bytes before are no longer known)\n" if gone else ""
    shown = "".join(c if c.isprintable() or c in "\n\t" else ascii(c)[1:-1] for c in text)
    return f"{head}{shown}\n({vm.state.value})"
