"""`OfflineBotAPI` and webhooks."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import offline_tools
import pytest
from offline_tools import call, ids, text_update
from waiting import SOON

from session_sync.testing import OfflineBotAPI

telebot = pytest.importorskip("telebot")
telegram_ext = pytest.importorskip("telegram.ext")

api = pytest.fixture(offline_tools.make_api)


class Hook:
    """A bot's webhook: answers from a list, then 200; remembers what it got."""

    def __init__(self) -> None:
        self.answers: list[tuple[int, Any]] = []
        self.got: list[tuple[Any, str | None]] = []
        self.on_update: Callable[[], object] = lambda: None
        hook = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True

            def do_POST(self) -> None:
                update = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                hook.got.append((update, self.headers["X-Telegram-Bot-Api-Secret-Token"]))
                hook.on_update()
                status, answer = hook.answers.pop(0) if hook.answers else (200, {})
                body = json.dumps(answer).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
                pass

        class Server(HTTPServer):
            def handle_error(self, request: Any, client_address: Any) -> None:
                pass  # the server under test hung up

        self._server = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/hook?x=1"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))
        self._thread.start()

    def texts(self) -> list[str]:
        return [update["message"]["text"] for update, _ in self.got]

    def close(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


@pytest.fixture
def hook() -> Iterator[Hook]:
    hook = Hook()
    yield hook
    hook.close()


@pytest.fixture
def hooked(hook: Hook) -> Iterator[OfflineBotAPI]:
    with OfflineBotAPI() as api:  # closed before the hook, whose one thread serves one connection
        yield api


def test_a_webhook_gets_the_updates_in_order_with_its_secret(
    hook: Hook, hooked: OfflineBotAPI
) -> None:
    hooked.push(text_update("0"))
    answer = call(hooked, "setWebhook", url=hook.url, secret_token="s3cret")
    assert answer == {"ok": True, "result": True, "description": "Webhook was set"}
    for n in range(1, 20):
        hooked.push(text_update(str(n)))
    hooked.confirmed()
    assert hook.texts() == [str(n) for n in range(20)]
    assert {secret for _, secret in hook.got} == {"s3cret"}
    assert hook.got[4][0]["update_id"] == 5


def test_a_failing_webhook_is_tried_again_before_the_next_update(
    hook: Hook, hooked: OfflineBotAPI
) -> None:
    hook.answers = [(500, {}), (403, {})]
    call(hooked, "setWebhook", url=hook.url)
    hooked.push(text_update("a"))
    hooked.push(text_update("b"))
    hooked.confirmed()
    assert hook.texts() == ["a", "a", "a", "b"]
    info = call(hooked, "getWebhookInfo")["result"]
    assert info["url"] == hook.url
    assert info["pending_update_count"] == 0
    assert info["last_error_message"] == "Wrong response from the webhook: 403 Forbidden"


def test_a_method_in_a_webhooks_answer_is_carried_out(hook: Hook, hooked: OfflineBotAPI) -> None:
    hook.answers = [
        (200, {"method": "deleteWebhook"}),  # not allowed there
        (200, {"method": "sendMessage", "chat_id": 1, "text": "From the answer"}),
    ]
    call(hooked, "setWebhook", url=hook.url)
    hooked.push(text_update("a"))
    hooked.push(text_update("b"))
    assert hooked.user(1).reply().text == "From the answer"
    assert hooked.calls_of("deleteWebhook") == []


def test_a_method_that_fails_in_a_webhooks_answer_disturbs_nobody(
    hook: Hook, hooked: OfflineBotAPI, caplog: pytest.LogCaptureFixture
) -> None:
    hook.answers = [
        (200, "no object"),
        (200, {"method": "sendMessage", "chat_id": 1}),
        (200, {"method": "sendInvoice", "chat_id": 1, "prices": [{}]}),
    ]
    call(hooked, "setWebhook", url=hook.url, allowed_updates='["message"]')
    for text in "abcd":
        hooked.push(text_update(text))
    hooked.confirmed()
    assert hook.texts() == ["a", "b", "c", "d"]
    assert hooked.calls_of("sendMessage")[0].error == "Bad Request: message text is empty"
    assert "could not carry out sendInvoice" in caplog.text
    assert call(hooked, "getWebhookInfo")["result"]["allowed_updates"] == ["message"]


def test_polling_and_a_webhook_exclude_each_other(hook: Hook, hooked: OfflineBotAPI) -> None:
    with ThreadPoolExecutor() as pool:
        poll = pool.submit(call, hooked, "getUpdates", timeout=50)
        hooked.call("getUpdates")
        call(hooked, "setWebhook", url=hook.url)
        assert poll.result(SOON)["description"] == "Conflict: terminated by setWebhook request"
    assert "webhook is active" in call(hooked, "getUpdates")["description"]
    assert call(hooked, "deleteWebhook")["description"] == "Webhook was deleted"
    assert call(hooked, "setWebhook", url="")["description"] == "Webhook is already deleted"
    hooked.push(text_update("a"))
    assert ids(call(hooked, "getUpdates")) == [1]
    assert hook.got == []


def test_a_bot_may_delete_its_webhook_from_inside_of_it(hook: Hook, hooked: OfflineBotAPI) -> None:
    hook.on_update = lambda: call(hooked, "deleteWebhook")
    call(hooked, "setWebhook", url=hook.url)
    hooked.push(text_update("a"))
    hooked.confirmed()
    hooked.push(text_update("b"))
    assert ids(call(hooked, "getUpdates")) == [2]


def test_pending_updates_can_be_dropped(api: OfflineBotAPI) -> None:
    api.push(text_update("old"))
    call(api, "deleteWebhook", drop_pending_updates="True")
    assert ids(call(api, "getUpdates")) == []


@pytest.mark.parametrize("url", ["https://127.0.0.1/", "http://example.com/", "nonsense"])
def test_a_webhook_elsewhere_is_refused(api: OfflineBotAPI, url: str) -> None:
    answer = call(api, "setWebhook", url=url)
    assert answer["description"].startswith("Bad Request: bad webhook: an offline server posts")


def test_closing_does_not_wait_for_a_webhook_that_hangs(hook: Hook) -> None:
    reached, released = threading.Event(), threading.Event()

    def hang() -> None:
        reached.set()
        released.wait(30)

    hook.on_update = hang
    with OfflineBotAPI() as api:
        call(api, "setWebhook", url=hook.url)
        api.push(text_update("a"))
        assert reached.wait(SOON)
        start = time.monotonic()
    assert time.monotonic() - start < SOON  # and not 30 s
    released.set()
