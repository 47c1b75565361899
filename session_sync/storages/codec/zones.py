"""Time zones: those of `datetime.timezone` and of zoneinfo, by their name.

This module knows the text of a zone; it knows no moment.
"""

from __future__ import annotations

import re
from datetime import timedelta, timezone, tzinfo
from typing import Any, Final
from zoneinfo import ZoneInfo

from session_sync.storages.codec.malformed import MALFORMED, MalformedError, expect
from session_sync.storages.places import short

_OFFSET: Final = re.compile(r"([+-])(\d\d):(\d\d)(?::(\d\d)(?:\.(\d{6}))?)?\Z", re.ASCII)


def name_of(zone: timezone | None) -> str | None:
    """The name that a program gave to a fixed offset."""
    if zone is None:
        return None
    name = zone.tzname(None)
    return None if name == timezone(zone.utcoffset(None)).tzname(None) else name


def zone_of(text: str, name: Any) -> tuple[str, tzinfo | None]:
    """`text` without the offset at its end, and the zone of both."""
    offset = _OFFSET.search(text)
    if offset is None:
        return text, None if name is None else _zone(expect(str, name))
    sign, *digits = offset.groups(default="0")
    hours, minutes, seconds, microseconds = map(int, digits)
    delta = timedelta(0, seconds, microseconds, 0, minutes, hours)
    delta = -delta if sign == "-" else delta
    zone = timezone(delta) if name is None else timezone(delta, expect(str, name))
    return text[: offset.start()], zone


def _zone(name: str) -> ZoneInfo:
    try:
        return ZoneInfo(name)
    except TimeoutError:  # a signal handler's
        raise
    except (*MALFORMED, ImportError, OSError):  # it may be the name of a folder, say
        raise MalformedError(
            f"has the time zone {short(name)}, unknown here (is the package tzdata installed?)"
        ) from None
