"""Tools for the tests of programs that use this library; nothing else in it imports them.

`OfflineBotAPI` is a local server that speaks the Bot API, so that a whole bot runs offline;
`StorageConformance` is a suite of tests for a storage of your own, `SharedStorageConformance` one
for what several processes share.
"""

from session_sync.testing.bot_api import Call, OfflineBotAPI
from session_sync.testing.conformance import StorageConformance
from session_sync.testing.shared_conformance import SharedStorageConformance
from session_sync.testing.users import Button, OfflineChat, OfflineUser, Press, Reply
from session_sync.testing.wire import Upload

__all__ = [
    "Button",
    "Call",
    "OfflineBotAPI",
    "OfflineChat",
    "OfflineUser",
    "Press",
    "Reply",
    "SharedStorageConformance",
    "StorageConformance",
    "Upload",
]
