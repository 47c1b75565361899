"""Strings that UTF-8 cannot hold: halves of surrogate pairs, which Python's strings may have.

This module knows how they are escaped; it does not know where they are.
"""

from __future__ import annotations

import re
from typing import Any, Final

from session_sync.storages.codec.malformed import expect, same

FIELD_ESCAPE: Final = "$str:"
SURROGATE: Final = re.compile("[\ud800-\udfff]")
_ESCAPED: Final = re.compile(r"\\(?:\\|u(d[89a-f][0-9a-f]{2}))")


def escaped(text: str) -> str:
    return text.replace("\\", "\\\\").encode("utf-8", "backslashreplace").decode()


def unescaped(body: Any) -> str:
    text = _ESCAPED.sub(
        lambda found: chr(int(found[1], 16)) if found[1] else "\\", expect(str, body)
    )
    return same(text, escaped(text) if SURROGATE.search(text) else None, body)


def unescaped_name(name: str) -> str:
    return unescaped(name.removeprefix(FIELD_ESCAPE)) if name.startswith(FIELD_ESCAPE) else name
