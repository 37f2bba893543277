"""The wire format of docs/agent-protocol.md: pure packing and checked unpacking."""

from __future__ import annotations

import stat
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum, IntFlag

from avmm.errors import GuestFault, HostError

AGENT_PORT = 1024
VERSION = 1
FRAME_MAX_BYTES = 256 * 1024
"""Of a payload."""
STDIN_WINDOW_BYTES = 256 * 1024
OUTPUT_WINDOW_BYTES = 256 * 1024
NONE = 0xFFFF_FFFF

HEAD = struct.Struct("<IBxxx")
_HEAD_CHECKED = struct.Struct("<IB3s")
_HELLO = struct.Struct("<4sHxx")
_MAGIC = b"avmm"
_CLOCK = struct.Struct("<qIxxxx")
_EXEC = struct.Struct("<IIIHHIII")
_PAIR = struct.Struct("<II")
_SIZE = struct.Struct("<HH")
_FILE = struct.Struct("<IIQQ")
_STAT = struct.Struct("<IIIIQQqqq")
_NUMBER = struct.Struct("<I")
_NS = 1_000_000_000
_ERRNO_MAX = 4095


class Type(IntEnum):
    """What a frame is."""

    HELLO = 1
    OK = 2
    ERROR = 3
    DATA = 4
    END = 5
    PING = 0x10
    SET_CLOCK = 0x11
    SHUTDOWN = 0x12
    EXEC = 0x20
    READ = 0x30
    WRITE = 0x31
    LIST = 0x32
    STAT = 0x33
    MKDIR = 0x34
    REMOVE = 0x35
    RENAME = 0x36
    CHMOD = 0x37
    STARTED = 0x40
    STDIN = 0x41
    STDOUT = 0x42
    STDERR = 0x43
    WINDOW = 0x44
    SIGNAL = 0x45
    RESIZE = 0x46
    EXITED = 0x47


class ExecFlag(IntFlag):
    """How a command's streams are set up."""

    TTY = 1
    STDIN_NULL = 2
    STDOUT_NULL = 4
    STDERR_NULL = 8
    STDERR_TO_STDOUT = 16
    ENV_ADDED = 32


class FileFlag(IntFlag):
    """Of file requests; the same bits mean different things in different ones."""

    NOTHING = 0
    ATOMIC = 1
    APPEND = 2
    NEW = 4
    FOLLOW = 1
    PARENTS = 1
    RECURSIVE = 1
    MISSING_OK = 2


@dataclass(frozen=True, slots=True)
class FileStat:
    """What the guest knows of a file; the same fields as os.stat_result, times in nanoseconds."""

    mode: int
    uid: int
    gid: int
    links: int
    size_bytes: int
    inode: int
    accessed_ns: int
    modified_ns: int
    changed_ns: int

    @property
    def is_dir(self) -> bool:
        """A folder."""
        return stat.S_ISDIR(self.mode)

    @property
    def is_file(self) -> bool:
        """A regular file."""
        return stat.S_ISREG(self.mode)

    @property
    def is_link(self) -> bool:
        """A symbolic link, not followed."""
        return stat.S_ISLNK(self.mode)


@dataclass(frozen=True, slots=True)
class FileEntry:
    """One name in a folder; `stat` is of the name itself, a link is not followed."""

    name: str
    stat: FileStat


def nonsense(what: str) -> GuestFault:
    """The error for an agent that breaks the protocol."""
    return GuestFault("agent-protocol", f"The guest's agent breaks its protocol: {what}")


def frame(type: Type, payload: bytes = b"") -> bytes:
    """A whole frame; payload: at most FRAME_MAX_BYTES."""
    return HEAD.pack(len(payload), type) + payload


def parse_head(data: bytes) -> tuple[int, Type]:
    """(payload bytes, type) from the 8 bytes of a frame's head. Raises GuestFault."""
    size, number, zero = _HEAD_CHECKED.unpack(data)
    if size > FRAME_MAX_BYTES or zero != b"\0\0\0":
        raise nonsense(f"a frame's head is {data.hex()}")
    try:
        return size, Type(number)
    except ValueError:
        raise nonsense(f"no frame has the type {number:#x}") from None


def pack_hello() -> bytes:
    """The first frame's payload, from either side."""
    return _HELLO.pack(_MAGIC, VERSION)


def check_hello(type: Type, payload: bytes) -> None:
    """Raises GuestFault for what is none, HostError("agent-version") for another version's."""
    if type is not Type.HELLO or len(payload) != _HELLO.size or payload[:4] != _MAGIC:
        raise nonsense("it does not begin with a greeting; is something else on its port?")
    version = _HELLO.unpack(payload)[1]
    if version != VERSION:
        raise HostError(
            "agent-version",
            op="The guest's agent",
            remedy=f"it speaks version {version} of the protocol, this avmm {VERSION}; give both "
            "the same avmm",
        )


def pack_clock(time_ns: int) -> bytes:
    """Nanoseconds since 1970."""
    return _CLOCK.pack(*divmod(time_ns, _NS))


def unpack_clock(payload: bytes) -> int:
    """Nanoseconds since 1970. Raises GuestFault."""
    if len(payload) != _CLOCK.size:
        raise nonsense("the answer to a ping has the wrong size")
    seconds, nanoseconds = _CLOCK.unpack(payload)
    return int(seconds) * _NS + int(nanoseconds)


def pack_exec(
    argv: Sequence[str | bytes],
    *,
    flags: ExecFlag,
    cwd: str,
    env: Mapping[str, str] | None,
    uid: int,
    gid: int,
    size: tuple[int, int],
) -> bytes:
    """A command. size: rows and columns of its terminal.

    Raises ValueError for what no command line can have.
    """
    words = [cwd.encode(), *(w if isinstance(w, bytes) else _encoded(w) for w in argv)]
    for name, value in (env or {}).items():
        if not name or "=" in name:
            raise ValueError(f"env: {name!r} cannot be the name of a variable")
        words.append(_encoded(f"{name}={value}"))
    for word in words:
        if b"\0" in word:
            raise ValueError(f"exec: {word!r} has a NUL byte")
    head = _EXEC.pack(
        flags,
        uid,
        gid,
        *size,
        OUTPUT_WINDOW_BYTES,
        len(argv),
        NONE if env is None else len(env),
    )
    payload = head + b"".join(word + b"\0" for word in words)
    if len(payload) > FRAME_MAX_BYTES:
        raise ValueError(
            f"exec: {len(payload)} bytes of arguments and environment; at most "
            f"{FRAME_MAX_BYTES} can be passed"
        )
    return payload


def pack_file(
    *paths: str, flags: FileFlag = FileFlag.NOTHING, mode: int | None = None, span: tuple[int, int]
) -> bytes:
    """A file request. span: offset and size in bytes, of a read. Raises ValueError."""
    names = [_encoded(path) for path in paths]
    for name in names:
        if not name or b"\0" in name or len(name) > 4095:
            raise ValueError(f"{name!r} cannot be the path of a file")
    head = _FILE.pack(flags, NONE if mode is None else mode, *span)
    return head + b"".join(name + b"\0" for name in names)


def unpack_stat(payload: bytes) -> FileStat:
    """Raises GuestFault."""
    if len(payload) != _STAT.size:
        raise nonsense("a file's state has the wrong size")
    return FileStat(*_STAT.unpack(payload))


def unpack_entries(payload: bytes) -> Iterator[FileEntry]:
    """Of one frame of a folder's list. Raises GuestFault."""
    at = 0
    while at < len(payload):
        end = payload.find(b"\0", at + _STAT.size)
        name = payload[at + _STAT.size : end]
        if end < 0 or not name or b"/" in name:
            raise nonsense("an entry of a folder is cut off")
        yield FileEntry(_decoded(name), unpack_stat(payload[at : at + _STAT.size]))
        at = end + 1


def unpack_error(payload: bytes) -> tuple[int, str]:
    """(errno, what it was about). Raises GuestFault."""
    number = int.from_bytes(payload[:4], "little")
    if len(payload) < 4 or not 1 <= number <= _ERRNO_MAX:
        raise nonsense("an error without a number that the kernel has")
    return number, _decoded(payload[4:])


def pack_window(stream: Type, size_bytes: int) -> bytes:
    """Permission to send that many more bytes."""
    return _PAIR.pack(stream, size_bytes)


def unpack_window(payload: bytes) -> int:
    """Bytes of stdin that may be sent beyond what was allowed before. Raises GuestFault."""
    if len(payload) == _PAIR.size:
        stream, size_bytes = _PAIR.unpack(payload)
        if stream == Type.STDIN and size_bytes <= STDIN_WINDOW_BYTES:
            return int(size_bytes)
    raise nonsense("a window that was not asked for")


def pack_signal(number: int, *, group: bool) -> bytes:
    """group: to all processes of the command's group."""
    return _PAIR.pack(number, group)


def pack_size(rows: int, columns: int) -> bytes:
    """Of a terminal. Raises ValueError."""
    if not (0 <= rows <= 0xFFFF and 0 <= columns <= 0xFFFF):
        raise ValueError(f"{rows} rows and {columns} columns are no size of a terminal")
    return _SIZE.pack(rows, columns)


def pack_number(number: int) -> bytes:
    """One 32-bit number."""
    return _NUMBER.pack(number)


def unpack_number(payload: bytes) -> int:
    """One 32-bit number. Raises GuestFault."""
    if len(payload) != _NUMBER.size:
        raise nonsense("a number of the wrong size")
    return int(_NUMBER.unpack(payload)[0])


def unpack_exited(payload: bytes) -> int:
    """A return code as subprocess has them: negative for a signal. Raises GuestFault."""
    if len(payload) == _PAIR.size:
        how, value = _PAIR.unpack(payload)
        if how == 0 and value <= 255:
            return int(value)
        if how == 1 and 1 <= value <= 64:
            return -int(value)
    raise nonsense("a command's end that cannot be")


def _encoded(text: str) -> bytes:
    return text.encode(errors="surrogateescape")


def _decoded(data: bytes) -> str:
    return data.decode(errors="surrogateescape")
