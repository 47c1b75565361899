"""Turns the fields of a session into bytes and back, and keeps the type and value of each.

The bytes are JSON, so that an operator can read what `redis-cli GET` or the sqlite shell prints.
What JSON has not is an object with one name that begins with `$`: `{"$tuple": [1, 2]}`. This
package knows values and records; it knows no session and no storage.
"""

from session_sync.storages.codec.codec import Codec

__all__ = ["Codec"]
