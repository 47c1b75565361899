"""What the tests of `OfflineBotAPI` share: calls by bare HTTP."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlencode

import pytest

from session_sync.testing import OfflineBotAPI

telebot = pytest.importorskip("telebot")
telegram_ext = pytest.importorskip("telegram.ext")

Answer = dict[str, Any]


def make_api() -> Iterator[OfflineBotAPI]:
    with OfflineBotAPI(longest_poll=0.2) as api:
        yield api


def make_patient() -> Iterator[OfflineBotAPI]:
    with OfflineBotAPI() as api:
        yield api


def call(api: OfflineBotAPI, method: str, **params: Any) -> Answer:
    return post(api, f"/bot{api.token}/{method}", urlencode(params).encode())


def post(api: OfflineBotAPI, path: str, body: bytes, **headers: str) -> Answer:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    request = urllib.request.Request(api.url + path, body, named)
    try:
        response = urllib.request.urlopen(request, timeout=30)
    except urllib.error.HTTPError as error:
        response = error
    with response:
        answer: Answer = json.load(response)
        assert response.status == answer.get("error_code", 200)
    return answer


def text_update(text: str) -> dict[str, Any]:
    user = {"id": 1, "is_bot": False, "first_name": "Alex"}
    chat = {"id": 1, "type": "private", "first_name": "Alex"}
    return {"message": {"message_id": 1, "date": 1, "from": user, "chat": chat, "text": text}}


def ids(answer: Answer) -> list[int]:
    return [update["update_id"] for update in answer["result"]]
