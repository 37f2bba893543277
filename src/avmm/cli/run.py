"""avmm run: one microVM, its console on this terminal."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import signal
import sys
from collections.abc import AsyncIterator
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args, get_origin, get_type_hints

import msgspec

from avmm.cli.instance import Instance, claimed
from avmm.cli.main import EXIT_BAD_INPUT, EXIT_ERROR, EXIT_INTERRUPTED
from avmm.cli.terminal import ESCAPE_NAME, Input, Output, is_terminal, raw_mode, watched_size
from avmm.config import field_description, field_hint, option_keys, parse_option, read_file
from avmm.console.server import ConsoleServer
from avmm.errors import ConfigError, HostError
from avmm.log import log_to_stderr
from avmm.loop import run as run_loop
from avmm.machine.config import DEVICE_STRUCTS, Config
from avmm.machine.machine import MicroVM
from avmm.machine.reason import ExitKind, ExitReason
from avmm.machine.statistics import MachineStatistics
from avmm.virtio.devices.vsock import Vsock

_FLUSH_S = 5.0
_UNNAMED: contextlib.nullcontext[None] = contextlib.nullcontext()

EXIT_TERMINATED = 128 + signal.SIGTERM

_EPILOG = f"""\
The guest's serial console is on this terminal; {ESCAPE_NAME} ends the guest. Without a terminal,
bytes are streamed from stdin and to stdout. SIGTERM presses the power button, twice kills.
With --console the terminal is /dev/hvc0, and the serial port is in avmm attach --serial; what a
guest that never wrote to hvc0 said on its serial port is shown at its end.

Exit status: 0 poweroff or reboot, 1 crash or error, 2 bad input or a host that cannot run it,
130 Ctrl-C or {ESCAPE_NAME}, 143 SIGTERM before the guest ran.
"""


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of `avmm run`: one for each field of Config, described there."""
    parser.epilog = _EPILOG
    parser.add_argument("--config", metavar="FILE", help="TOML or JSON file with the same names")
    hints = get_type_hints(Config)
    for name in _option_fields():
        flag, text = f"--{name.replace('_', '-')}", field_description(Config, name)
        if name in DEVICE_STRUCTS:
            _add_device_option(parser, name)
        elif hints[name] is bool:
            parser.add_argument(flag, dest=name, action="store_true", default=None, help=text)
        elif get_origin(hints[name]) is Literal:
            parser.add_argument(flag, dest=name, choices=get_args(hints[name]), help=text)
        else:
            parser.add_argument(flag, dest=name, metavar=_metavar(name), help=text)
    parser.add_argument(
        "--name", metavar="NAME", help="by which other commands find it while it runs (avmm list)"
    )
    parser.add_argument(
        "--isolate",
        action="store_true",
        help="run the guest in a worker process of its own, behind walls (docs/security.md)",
    )
    parser.add_argument(
        "--stats",
        action="store_true",
        help="counters as JSON on stderr: the final ones, and the present ones on SIGUSR1",
    )
    parser.add_argument(
        "-v", "--verbose", action="count", default=0, help="log to stderr; -vv for everything"
    )
    parser.set_defaults(command=run)


def run(options: argparse.Namespace) -> int:
    """Run the microVM to its end."""
    log_to_stderr(options.verbose)
    config = make_config(options)
    attached = is_terminal()
    try:
        with claimed(options.name) if options.name is not None else _UNNAMED as instance:
            if instance is not None:
                config = placed(config, instance)
                _link_socket(config, instance)
            isolation: Literal["process"] | None = "process" if options.isolate else None
            ending = run_loop(_run(config, isolation, attached, options.stats, instance))
    except asyncio.CancelledError:
        return EXIT_TERMINATED
    except HostError as e:
        # It never ran: as with a bad option, nothing happened and the message says why.
        print(f"avmm: {e}", file=sys.stderr)
        return EXIT_BAD_INPUT
    if options.stats:
        _print_statistics(ending.statistics, str(ending.reason))
    if ending.interrupted:
        return EXIT_INTERRUPTED
    if ending.reason.kind in (ExitKind.POWEROFF, ExitKind.REBOOT, ExitKind.STOPPED):
        return 0
    print(f"avmm: {ending.reason}", file=sys.stderr)
    return EXIT_ERROR


def placed(config: Config, instance: Instance) -> Config:
    """With the unix socket of its vsock in the instance's folder, if there is to be a vsock and it
    has no other place."""
    if not config.vsock and not config.agent:
        return config
    vsock = config.vsock if isinstance(config.vsock, Vsock) else Vsock()
    if vsock.uds is not None:
        return config
    there = msgspec.structs.replace(vsock, uds=str(instance.vsock_path))
    return msgspec.structs.replace(config, vsock=there)


def _link_socket(config: Config, instance: Instance) -> None:
    """Where `avmm exec` looks for it, for a vsock whose socket has another place."""
    path = config.vsock.uds if isinstance(config.vsock, Vsock) else None
    if path is not None and path != str(instance.vsock_path):
        instance.vsock_path.symlink_to(os.path.abspath(path))


def make_config(options: argparse.Namespace) -> Config:
    """From the file, if any, with the options given on the command line in its place."""
    values = read_file(options.config) if options.config else {}
    hints = get_type_hints(Config)
    for name in _option_fields():
        given = getattr(options, name)
        if given is None:
            continue
        if name in DEVICE_STRUCTS:
            given = _device_values(name, given)
        elif hints[name] in (int, float):
            given = _number(given, hints[name], f"--{name.replace('_', '-')}")
        values[name] = given
    if "kernel" not in values:
        raise ConfigError("kernel", "--kernel is needed: a bzImage or an ELF vmlinux")
    return Config.from_values(values, options.config or "avmm run")


def _option_fields() -> list[str]:
    """Those fields of Config that an option can say."""
    fields = Config.__struct_fields__
    return [name for name in fields if not field_hint(Config, name, "python_only")]


def _add_device_option(parser: argparse.ArgumentParser, name: str) -> None:
    struct = DEVICE_STRUCTS[name]
    device_type = struct.device_type
    keys = [key.name for key in option_keys(struct)]
    several = get_origin(get_type_hints(Config)[name]) is list
    parser.add_argument(
        device_type.flag,
        dest=name,
        metavar=",".join(keys[:1]).upper() + "[,...]",
        action="append" if several else "store",
        nargs=None if several else "?",
        const=None if several else "",
        help=f"{device_type.summary}; keys: {', '.join(keys)}",
    )


def _device_values(name: str, given: Any) -> Any:
    struct = DEVICE_STRUCTS[name]
    flag = struct.device_type.flag
    if isinstance(given, list):
        return [parse_option(text, struct, flag) for text in given]
    return parse_option(given, struct, flag) if given else True


def _number(text: str, kind: type, flag: str) -> Any:
    try:
        return kind(text)
    except ValueError:
        raise ConfigError("value", f"{flag} {text}: a number is needed") from None


def _metavar(name: str) -> str:
    return {"kernel": "FILE", "initrd": "FILE", "memory": "SIZE", "cmdline": "TEXT"}.get(name, "N")


@dataclass(frozen=True, slots=True)
class _Ending:
    """How the last microVM ended. interrupted: by the user's own key."""

    reason: ExitReason
    statistics: MachineStatistics
    interrupted: bool


def _print_statistics(statistics: MachineStatistics, reason: str | None = None) -> None:
    """One line; reason: of the end, None while the guest runs."""
    values = {"reason": reason, **asdict(statistics)}
    print(json.dumps(values), file=sys.stderr, flush=True)


async def _run(
    config: Config,
    isolation: Literal["process"] | None,
    attached: bool,
    stats: bool,
    instance: Instance | None,
) -> _Ending:
    task = asyncio.current_task()
    assert task is not None
    while True:
        # Until the guest runs there is nobody to ask; and the terminal has to be restored.
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
        with raw_mode(sys.stdin.fileno()) if attached else contextlib.nullcontext():
            async with (
                MicroVM(config, isolation=isolation) as vm,
                _attached(vm, attached, stats) as interrupted,
                _listening(vm, instance),
            ):
                reason = await vm.wait()
        if reason.kind is not ExitKind.REBOOT or config.on_reboot == "stop":
            return _Ending(reason, vm.statistics(), interrupted.is_set())


@contextlib.asynccontextmanager
async def _listening(vm: MicroVM, instance: Instance | None) -> AsyncIterator[None]:
    """The sockets of a named VM's consoles."""
    async with contextlib.AsyncExitStack() as stack:
        if instance is not None:
            await stack.enter_async_context(ConsoleServer(vm.console, instance.console_path))
            if vm.serial is not vm.console:
                await stack.enter_async_context(ConsoleServer(vm.serial, instance.serial_path))
        yield


@contextlib.asynccontextmanager
async def _attached(vm: MicroVM, attached: bool, stats: bool) -> AsyncIterator[asyncio.Event]:
    """Console and signals of a running VM; the event is set when the user ended it."""
    interrupted = asyncio.Event()
    loop = asyncio.get_running_loop()
    tasks: set[asyncio.Task[Any]] = set()

    def start(work: Any) -> None:
        task = loop.create_task(work)
        tasks.add(task)
        task.add_done_callback(tasks.discard)

    def interrupt() -> None:
        interrupted.set()
        start(vm.kill())

    def terminate() -> None:
        # The first asks the guest, the second does not.
        loop.add_signal_handler(signal.SIGTERM, lambda: start(vm.kill()))
        start(vm.stop())

    async def send(data: bytes) -> None:
        writer.write(data)
        await writer.drain()

    reader, writer = vm.console.open(hold=vm.console.can_hold)
    output = Output(sys.stdout.fileno(), on_closed=lambda: start(vm.kill()))
    source = Input(sys.stdin.fileno(), send, interrupt if attached else None)
    loop.add_signal_handler(signal.SIGINT, interrupt)
    loop.add_signal_handler(signal.SIGTERM, terminate)
    if stats:
        loop.add_signal_handler(signal.SIGUSR1, lambda: _print_statistics(vm.statistics()))
    start(source.forward())
    try:
        with output, watched_size(vm.console.resize) if attached else contextlib.nullcontext():
            showing = loop.create_task(output.show(reader))
            try:
                yield interrupted
            finally:
                # What the guest wrote last is on its way; a terminal that stands still is left.
                await asyncio.wait([showing], timeout=_FLUSH_S)
                showing.cancel()
                await asyncio.gather(showing, return_exceptions=True)
                if not vm.console.end and vm.serial is not vm.console:
                    # It ended before it had that console: all that it said is there.
                    await output.write(vm.serial.scrollback)
    finally:
        loop.remove_signal_handler(signal.SIGINT)
        loop.remove_signal_handler(signal.SIGTERM)
        loop.remove_signal_handler(signal.SIGUSR1)
        for task in tuple(tasks):
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
