"""A local Bot API in a process of its own, so that it shares no GIL with the bot that it serves.

It says where it is. For each number that it reads, it queues so many messages, from 50 users in
turn, and says so.
"""

from __future__ import annotations

import json
import sys

from session_sync.testing import OfflineBotAPI

from .fields import TOKEN, USER

USERS = 50


def main() -> None:
    with OfflineBotAPI(TOKEN, longest_poll=0.1) as api:
        users = [api.user(USER + number, first_name="Alex") for number in range(USERS)]
        print(json.dumps({"base_url": api.base_url, "telebot_url": api.telebot_url}), flush=True)
        for line in iter(sys.stdin.readline, ""):
            for number in range(int(line)):
                users[number % USERS].send("hi")
            print("queued", flush=True)


if __name__ == "__main__":
    main()
