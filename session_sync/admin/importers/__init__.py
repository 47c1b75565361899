"""Takes over what a bot has stored with telebot's states or PTB's persistence.

    >>> from session_sync.admin.importers import IMPORTERS
    >>> sorted(IMPORTERS)
    ['ptb-pickle', 'telebot-pickle', 'telebot-redis']

Each importer reads a source and yields the key of a session, as text, with the fields of it; or,
for one that cannot be taken over, with the SessionDecodeError that says why. Sources are only read,
and pickles are read by `pickles.py`, which runs nothing of what they say. No framework is imported.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Final

from .plain import Imported
from .ptb import ptb_pickle
from .telebot import telebot_pickle
from .telebot_redis import telebot_redis

__all__ = ["IMPORTERS", "Imported"]

#: What each is called on the command line.
IMPORTERS: Final[dict[str, Callable[[str], Iterator[Imported]]]] = {
    "telebot-pickle": telebot_pickle,
    "telebot-redis": telebot_redis,
    "ptb-pickle": ptb_pickle,
}
