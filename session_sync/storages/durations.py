"""Options that say for how long: a number of seconds, or a timedelta.

This module knows numbers; it knows no storage.
"""

from __future__ import annotations

import math
from datetime import timedelta
from typing import SupportsFloat


def seconds_of(duration: float | timedelta, name: str) -> float:
    """`duration` in seconds.

    Raises TypeError if it is neither a number nor a timedelta, and ValueError if it is negative or
    infinite; both name `name`.
    """
    seconds = _seconds(duration)
    if seconds is None or not 0 <= seconds < math.inf:
        error = TypeError if seconds is None else ValueError
        raise error(
            f"{name} must be a number of seconds, 0 or more (or a timedelta), not {duration!r}"
        )
    return seconds


def _seconds(duration: object) -> float | None:
    """None: it is no duration."""
    if isinstance(duration, timedelta):
        return duration.total_seconds()
    return float(duration) if isinstance(duration, SupportsFloat) else None


def life_time(ttl: float | timedelta) -> float:
    """How many seconds a stored session lives when it is left alone.

    Raises TypeError if `ttl` is neither a number nor a timedelta, and ValueError if it is not more
    than 0.
    """
    seconds = _seconds(ttl)
    if seconds is None or not 0 < seconds < math.inf:
        error = TypeError if seconds is None else ValueError
        raise error(
            f"ttl must be a positive number of seconds (or a timedelta), not {ttl!r}; None keeps "
            f"sessions forever"
        )
    return seconds
