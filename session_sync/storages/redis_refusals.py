"""What a Redis server's refusals mean, and what can be done about them."""

from __future__ import annotations

import re
from typing import Final

from redis.exceptions import NoPermissionError, ResponseError

from ..errors import SessionDecodeError

#: What the user of a server has to be allowed; see docs/storages.md.
RIGHTS: Final = (
    "+evalsha +eval +get +set +del +exists +time +pexpire +pttl "
    "+zadd +zrange +zrem +hget +hset +hdel +rpush +blpop"
)
# Redis 6, 7.0 and 7.2 say it in different words, and in others in a script.
_FORBIDDEN: Final = re.compile(r"no permissions|user executing the script can't|ACL failure", re.I)
_UNKNOWN: Final = re.compile(r"unknown (redis )?command", re.I)


def refusal(error: ResponseError, keys: str, name: bytes, prefix: bytes) -> Exception:
    """What to raise for `error`: as it is, if no more can be said than it says. `keys` are those of
    the sessions, as text; `name` is that of the first in the store, without `prefix`."""
    said = str(error).partition(", with args")[0].rstrip(". ")  # arguments may be values
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
    if isinstance(error, NoPermissionError) or _FORBIDDEN.search(said):
        return NoPermissionError(
            f"session {keys}: {said}. RedisStorage needs more rights than this Redis user has. "
            f"These are enough: ACL SETUSER <user> ~{prefix.decode(errors='replace')}* {RIGHTS} "
            f"(and +select for a database other than 0)"
        )
    if _UNKNOWN.search(said):
        return ResponseError(
            f"session {keys}: {said}. RedisStorage runs Lua scripts (EVALSHA, EVAL). The server "
            f"must know these and the commands that they use, by these names: {RIGHTS}"
        )
    return error
