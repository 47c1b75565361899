"""The URL of a store, taken apart, if no character in it would be taken for something else.

This module knows URLs; it knows no storage. What it refuses may be a password, so no part of a URL
is in its messages.
"""

from __future__ import annotations

from typing import Final
from urllib.parse import SplitResult, urlsplit

_QUOTED: Final = 'as urllib.parse.quote(password, safe="") gives it'
_FILES: Final = ("sqlite", "disk")


def split(url: str) -> SplitResult:
    """The parts of `url`.

    Raises ValueError where a `#` would cut the rest off, and where a password has a character that
    would end it: what follows would be taken for a path or for options, and what comes before for
    the server.
    """
    try:
        parts = urlsplit(url)
    except ValueError:  # whose message has a part of it
        raise ValueError(
            f"in the URL of a storage, brackets are for IPv6 addresses; a password with others is "
            f"written {_QUOTED}, [ as %5B and ] as %5D, and so is one that is not ASCII"
        ) from None
    if parts.scheme in _FILES:
        if "#" in url:
            raise ValueError("in the URL of a storage, a # in the name of a file is written %23")
    elif "#" in url or "@" in parts.path + parts.query:
        raise ValueError(
            f"in the URL of a storage, a password with # / ? or @ is written {_QUOTED}, and so is "
            f"any # or @ in what follows the server"
        )
    return parts


def check_port(url: SplitResult) -> None:
    """Raise ValueError if the port is no number."""
    try:
        _ = url.port
    except ValueError:  # whose message has what stands there: a part of a password, perhaps
        raise ValueError(
            f"{url.scheme}://: the port is no number. If there is a password, it is written "
            f"{_QUOTED}"
        ) from None
