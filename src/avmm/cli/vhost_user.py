"""avmm vhost-user: one device behind a unix socket, for another VMM's guests."""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import signal
import sys
from dataclasses import asdict
from typing import Any, Literal, get_args, get_origin

from avmm.config import OptionKey, convert_text, option_keys
from avmm.errors import ConfigError
from avmm.log import log_to_stderr
from avmm.loop import run as run_loop
from avmm.vhost_user.server import ServerStatistics, VhostUserServer
from avmm.virtio.devices.blk import BlkDevice, Disk
from avmm.virtio.devices.net import Tap

log = logging.getLogger(__name__)

_EPILOG = """\
A front-end's guest memory has to be shared, for example with QEMU:
  -object memory-backend-memfd,id=mem,size=1G,share=on -machine memory-backend=mem
  -chardev socket,id=c,path=SOCKET,reconnect=1
  -device vhost-user-blk-pci,chardev=c            (blk)
  -netdev vhost-user,id=n,chardev=c -device virtio-net-pci,netdev=n    (net)

One front-end is served at a time, and another one when it is gone. SIGINT and SIGTERM bring what
is in flight to its end, and remove the socket; SIGUSR1 takes over the new size of a disk's image.

Exit status: 0 ended by a signal, 1 the host failed, 2 bad input.
"""

_MAIN_OPTION = {"path": ("--disk", "FILE"), "name": ("--tap", "NAME")}
_OPTION = {"queues": "--num-queues"}
_NOT_OURS = frozenset({"id", "home", "guest", "mac", "vhost"})
"""Fields that mean something to our own guests only: a front-end has its own MAC address, and the
queues go to --io-threads."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """A word for each kind of device, with the options of its configuration."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = _EPILOG
    words = parser.add_subparsers(required=True, metavar="DEVICE")
    for struct in (Disk, Tap):
        device_type = struct.device_type
        word = words.add_parser(device_type.name, help=device_type.summary)
        word.add_argument("--socket", required=True, metavar="PATH", help="where to listen")
        for key in _keys(struct):
            _add_key(word, key)
        _add_common(word)
        word.set_defaults(command=run, struct=struct)


def run(options: argparse.Namespace) -> int:
    """Serve until a signal comes."""
    log_to_stderr(options.verbose)
    values: dict[str, Any] = {}
    for key in _keys(options.struct):
        if (given := getattr(options, key.name)) is not None:
            key.put(values, given)
    what = f"avmm vhost-user {options.struct.device_type.name}"
    config: Disk | Tap = convert_text(values, options.struct, what)
    statistics = run_loop(_serve(config, options))
    if options.stats:
        print(json.dumps(asdict(statistics)), file=sys.stderr)
    return 0


def _keys(struct: type[Disk | Tap]) -> list[OptionKey]:
    return [key for key in option_keys(struct) if key.path[0] not in _NOT_OURS]


def _add_key(parser: argparse.ArgumentParser, key: OptionKey) -> None:
    name, text = key.name if len(key.path) > 1 else key.path[0], key.description
    if name in _MAIN_OPTION:
        flag, metavar = _MAIN_OPTION[name]
        parser.add_argument(flag, dest=key.name, required=True, metavar=metavar, help=text)
        return
    flag = _OPTION.get(name, f"--{name.replace('_', '-')}")
    if key.is_flag:
        parser.add_argument(
            flag, dest=key.name, action="store_const", const="on", default=None, help=text
        )
    elif get_origin(key.hint) is Literal:
        parser.add_argument(flag, dest=key.name, choices=get_args(key.hint), help=text)
    else:
        parser.add_argument(flag, dest=key.name, metavar="VALUE", help=text)


def _add_common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--io-threads",
        type=int,
        default=1,
        metavar="N",
        help="native threads that serve the queues, default 1; 0: the event loop",
    )
    parser.add_argument(
        "--io-poll-us",
        type=int,
        default=50,
        metavar="N",
        help="microseconds, at most, that a thread looks for work before it sleeps, default 50",
    )
    parser.add_argument(
        "--require-seals",
        action="store_true",
        help="refuse guest memory whose file could shrink, which would end this process",
    )
    parser.add_argument("--stats", action="store_true", help="final counters, as JSON on stderr")
    parser.add_argument(
        "-v", "--verbose", action="count", default=0, help="log to stderr; -vv for everything"
    )


def _resize(disk: BlkDevice) -> None:
    try:
        disk.resize()
    except ConfigError as e:
        log.warning("The disk keeps its size: %s", e)


async def _serve(config: Disk | Tap, options: argparse.Namespace) -> ServerStatistics:
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    server = VhostUserServer(
        config,
        options.socket,
        io_threads=options.io_threads,
        io_poll_us=options.io_poll_us,
        require_seals=options.require_seals,
    )
    async with server:
        if isinstance(server.device, BlkDevice):
            loop.add_signal_handler(signal.SIGUSR1, _resize, server.device)
        ended: set[asyncio.Future[Any]] = {
            asyncio.ensure_future(server.wait()),
            asyncio.ensure_future(stop.wait()),
        }
        try:
            done, _ = await asyncio.wait(ended, return_when=asyncio.FIRST_COMPLETED)
            for future in done:
                future.result()
        finally:
            for future in ended:
                future.cancel()
        return server.statistics()
