"""What a Redis server's refusals mean, and what can be done about them.

This module knows Redis' errors and what an operator can do; it knows no connection.
"""

from __future__ import annotations

import re
from typing import Final

from redis.exceptions import NoPermissionError, ResponseError

from ...errors import SessionDecodeError

#: What the user of a server has to be allowed; see docs/storages.md.
RIGHTS: Final = (
    "+evalsha +eval +get +set +del +exists +time +pexpire +pttl "
    "+zadd +zrange +zrem +hget +hset +hdel +rpush +blpop"
)
#: And to list what is stored.
LISTING: Final = "+scan +object|idletime +memory|usage +info"
# Redis 6, 7.0 and 7.2 say it in different words, and in others in a script.
_FORBIDDEN: Final = re.compile(r"no permissions|user executing the script can't|ACL failure", re.I)
_UNKNOWN: Final = re.compile(r"unknown (redis )?command", re.I)


def refusal(error: ResponseError, keys: str, name: bytes, prefix: bytes) -> Exception:
    """What to raise for `error`: as it is, if no more can be said than it says. `keys` are those of
    the sessions, as text; `name` is that of the first in the store, without `prefix`."""
    said = _said(error)
    code = getattr(error, "status_code", None)  # of redis-py's newer versions, in place of the text
    if "WRONGTYPE" in (code, *said.split()):
        return SessionDecodeError(
            f"session {keys} cannot be read: what lies under {name!r}, or beside it under a name "
            f"that begins with it, was not written here, and is of another kind. It is left as it "
            f"is. If another program uses such keys, give the storage a prefix."
        )
    if code in ("MOVED", "ASK") or said.startswith(("MOVED ", "ASK ")):
        return ResponseError(
            f"session {keys} cannot be reached: the server is a node of a Redis Cluster, and this "
            f"session is on another node. Use the URL redis+cluster://HOST:PORT, or give "
            f"RedisStorage a redis.cluster.RedisCluster."
        )
    if _is_forbidden(error):
        return NoPermissionError(
            f"session {keys}: {said}. RedisStorage needs more rights than this Redis user has. "
            f"These are enough: {_line(prefix)} (and +select for a database other than 0)"
        )
    if _UNKNOWN.search(said):
        return ResponseError(
            f"session {keys}: {said}. RedisStorage runs Lua scripts (EVALSHA, EVAL). The server "
            f"must know these and the commands that they use, by these names: {RIGHTS}"
        )
    return error


def listing_refusal(error: ResponseError, prefix: bytes) -> Exception:
    """The same for what was asked of all sessions."""
    said = _said(error)
    if _is_forbidden(error):
        return NoPermissionError(
            f"the sessions cannot be listed: {said}. That takes more rights than this Redis user "
            f"has. These are enough: {_line(prefix)} {LISTING} (and +select for a database other "
            f"than 0)"
        )
    if _UNKNOWN.search(said):
        return ResponseError(
            f"the sessions cannot be listed: {said}. The server must know these commands, by these "
            f"names: {LISTING}"
        )
    return error


def _said(error: ResponseError) -> str:
    return str(error).partition(", with args")[0].rstrip(". ")  # arguments may be values


def _is_forbidden(error: ResponseError) -> bool:
    return isinstance(error, NoPermissionError) or _FORBIDDEN.search(str(error)) is not None


def _line(prefix: bytes) -> str:
    return f"ACL SETUSER <user> ~{prefix.decode(errors='replace')}* {RIGHTS}"
