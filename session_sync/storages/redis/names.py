"""Names in Redis: of a record, by its key, and of what lies beside it.

A key is what a storage is given, the full key of a session; a name is what the server calls
something of it. This module knows both; it knows no server.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Final

LOCK: Final = b":lock"  # behind the name of a record: the name of its lock


class Names:
    """The names of one storage: those that begin with its prefix."""

    def __init__(self, prefix: str) -> None:
        if "{" in prefix or "}" in prefix:
            raise ValueError(
                f"prefix must have no braces, not {prefix!r}: braces mark the part of a name that "
                f"says on which node of a cluster it lies, and that is the session's key"
            )
        self.prefix: Final = prefix.encode("utf-8", "surrogatepass")

    def of(self, key: str) -> bytes:
        """The name of the record."""
        text = key.replace("%", "%25").replace("{", "%7B").replace("}", "%7D")
        # Empty braces are none for a cluster; a lone percent sign comes from no key.
        return self.prefix + b"{" + (text.encode("utf-8", "surrogatepass") or b"%") + b"}"

    def of_opening(self, key: str, token: bytes) -> Sequence[bytes]:
        """The names that the scripts are given as KEYS: see scripts/common.lua."""
        data = self.of(key)
        return [data, data + LOCK, data + b":queue", data + b":seen", data + b":closed:" + token]

    def key_of(self, name: bytes) -> str | None:
        """The key of which the name of a record was made, if it was."""
        escaped = name[len(self.prefix) + 1 : -1]
        try:
            text = "" if escaped == b"%" else escaped.decode("utf-8", "surrogatepass")
        except UnicodeDecodeError:
            return None
        key = text.replace("%7B", "{").replace("%7D", "}").replace("%25", "%")
        return key if self.of(key) == name else None

    def pattern(self, end: bytes = b"") -> bytes:
        """What SCAN is told to find the names of all records, with `end` behind them."""
        return re.sub(rb"([\\*?\[\]])", rb"\\\1", self.prefix) + b"{*}" + end


def wake_of(name: bytes, token: bytes) -> bytes:
    """The name of the list on which the waiter that has `token` blocks."""
    return name + b":wake:" + token
