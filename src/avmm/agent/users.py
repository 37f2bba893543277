"""User and group names of the guest."""

from __future__ import annotations

from avmm.agent import protocol
from avmm.agent.files import Files
from avmm.errors import ConfigError

_PASSWD_MAX_BYTES = 1 << 20
_ID_DIGITS_MAX = 10


async def resolve(files: Files, user: str | int | None, group: str | int | None) -> tuple[int, int]:
    """(uid, gid) to run as, each protocol.NONE for the agent's own.

    A user without a group gets the group that /etc/passwd has for it, or the one of the same
    number. Raises ConfigError("user").
    """
    uid, gid = protocol.NONE, protocol.NONE
    if isinstance(user, str):
        entry = await _find(files, "/etc/passwd", user)
        uid, gid = _id(entry[2]), _id(entry[3])
    elif user is not None:
        uid = gid = _checked(user)
    if isinstance(group, str):
        gid = _id((await _find(files, "/etc/group", group))[2])
    elif group is not None:
        gid = _checked(group)
    return uid, gid


async def _find(files: Files, path: str, name: str) -> list[str]:
    text = (await files.read(path, size=_PASSWD_MAX_BYTES)).decode(errors="replace")
    for line in text.splitlines():
        fields = line.split(":")
        if fields[0] == name and len(fields) > 3:
            return fields
    raise ConfigError("user", f"exec: the guest's {path} has no {name!r}")


def _id(text: str) -> int:
    if not text.isdecimal() or len(text) > _ID_DIGITS_MAX:
        raise ConfigError("user", f"exec: {text!r} in the guest's files is no user or group number")
    return _checked(int(text))


def _checked(number: int) -> int:
    if not 0 <= number < protocol.NONE:
        raise ConfigError("user", f"exec: {number} is no user or group number")
    return number
