"""`OfflineBotAPI` as telebot, python-telegram-bot and bare HTTP see it."""

from __future__ import annotations

import asyncio
import http.client
import json
import re
import socket
import struct
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, HTTPServer
from types import FrameType
from typing import Any
from urllib.parse import urlencode

import pytest
from conftest import run_client, stop_telebot
from waiting import SOON

from session_sync.testing import OfflineBotAPI, Upload, chats
from session_sync.testing.wire import HttpServer

telebot = pytest.importorskip("telebot")
telegram_ext = pytest.importorskip("telegram.ext")

from telebot import apihelper  # noqa: E402
from telebot import types as telebot_types  # noqa: E402
from telebot import util as telebot_util  # noqa: E402

Answer = dict[str, Any]


@pytest.fixture
def api() -> Iterator[OfflineBotAPI]:
    with OfflineBotAPI(longest_poll=0.2) as api:
        yield api


@pytest.fixture
def patient() -> Iterator[OfflineBotAPI]:
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


# --- how parameters arrive ---


@pytest.mark.parametrize("way", ["query", "urlencoded", "json", "multipart", "chunked"])
def test_parameters_are_typed_alike_however_they_are_passed(api: OfflineBotAPI, way: str) -> None:
    keyboard = {"inline_keyboard": [[{"text": "Yes", "callback_data": "y"}]]}
    typed: dict[str, Any] = {
        "chat_id": 5,
        "text": '["Grüße", &=%]',
        "reply_markup": keyboard,
        "protect_content": True,
    }
    flat = {name: value if name == "text" else json.dumps(value) for name, value in typed.items()}
    path = f"/bot{api.token}/sendMessage"
    if way == "query":
        answer = post(api, f"{path}?{urlencode(flat)}", b"")
    elif way == "urlencoded":
        answer = post(api, path, urlencode(flat).encode())
    elif way == "json":
        answer = post(api, path, json.dumps(typed).encode(), Content_Type="application/json")
    elif way == "multipart":
        parts = [
            f'--XX\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{value}\r\n'
            for name, value in flat.items()
        ]
        body = "".join(parts).encode() + b"--XX--\r\n"
        answer = post(api, path, body, Content_Type="multipart/form-data; boundary=XX")
    else:
        connection = http.client.HTTPConnection(api.url.removeprefix("http://"))
        body = urlencode(flat).encode()
        connection.request("POST", path, iter([body[:10], body[10:]]), encode_chunked=True)
        answer = json.load(connection.getresponse())
        connection.close()
    assert answer["result"]["text"] == typed["text"]
    assert answer["result"]["reply_markup"] == keyboard
    assert api.calls_of("sendMessage")[0].params == typed


def test_an_upload_may_hold_anything(api: OfflineBotAPI) -> None:
    content = b'\r\n--X\r\nname="chat_id"\r\n\r\n-XX\r--XX--\x00\xff'
    body = (
        b'--XX\r\nContent-Disposition: form-data; name="chat_id"\r\n\r\n5\r\n'
        b'--XX\r\nContent-Disposition: form-data; name="document"; filename="a.bin"\r\n'
        b"Content-Type: application/octet-stream\r\n\r\n" + content + b"\r\n--XX--\r\n"
    )
    path = f"/bot{api.token}/sendDocument"
    answer = post(api, path, body, Content_Type='multipart/form-data; boundary="XX"')
    assert answer["result"]["document"]["file_name"] == "a.bin"
    assert api.calls[0].params["document"] == Upload("a.bin", len(content))


def test_a_connection_is_kept_and_answers_are_not_delayed(api: OfflineBotAPI) -> None:
    connection = http.client.HTTPConnection(api.url.removeprefix("http://"))
    connection.connect()
    sock = connection.sock
    took = []
    for _ in range(50):
        start = time.perf_counter()
        connection.request("POST", f"/bot{api.token}/getMe", b"{}")
        response = connection.getresponse()
        assert response.getheader("Content-Length") is not None
        assert json.load(response)["ok"]
        took.append(time.perf_counter() - start)
    assert connection.sock is sock
    assert min(took) < 0.03  # delayed, each of them takes 40 ms and more
    connection.close()


@pytest.mark.parametrize(
    ("path", "body", "code"),
    [
        ("/bot{token}/sendMesage", b"", 404),
        ("/bot1:WRONG/getMe", b"", 401),
        ("/elsewhere", b"", 404),
        ("/bot{token}/sendMessage", b"{", 400),
        ("/bot{token}/sendMessage", b"[1]", 400),
    ],
)
def test_what_telegram_refuses_is_refused(
    api: OfflineBotAPI, path: str, body: bytes, code: int
) -> None:
    answer = post(api, path.format(token=api.token), body, Content_Type="application/json")
    assert answer["error_code"] == code
    descriptions = {404: "Not Found", 401: "Unauthorized"}
    assert answer["description"].startswith(descriptions.get(code, "Bad Request: "))


def say(api: OfflineBotAPI, request: bytes) -> bytes:
    """What the server answers to these bytes, after which there are no more."""
    host, _, port = api.url.removeprefix("http://").partition(":")
    with socket.create_connection((host, int(port)), timeout=20) as sock:
        sock.sendall(request)
        sock.shutdown(socket.SHUT_WR)
        with sock.makefile("rb") as stream:
            return stream.read()


@pytest.mark.parametrize(
    ("request_", "reason"),
    [
        (b"\x16\x03\x01 what is this\r\n\r\n", b"not enough values|too many values"),
        (b"PUT / HTTP/1.1\r\n\r\n", b"only GET and POST are understood"),
        (b"POST / HTTP/1.1\r\nContent-Le", b"a header line without an end"),
        (b"POST / HTTP/1.1\r\nContent-Length: -1\r\n\r\n", b"a body of -1 bytes"),
        (b"POST / HTTP/1.1\r\nContent-Length: 9\r\n\r\n{}", b"the body ended early"),
        (
            b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\nFFFFFFFFF\r\n",
            b"the body is too long",
        ),
    ],
)
def test_garbage_on_a_connection_disturbs_nobody(
    api: OfflineBotAPI, request_: bytes, reason: bytes
) -> None:
    answer = say(api, request_)
    assert answer.startswith(b"HTTP/1.1 400 ")
    assert re.search(rb"Bad Request: .*(" + reason + b")", answer)
    assert call(api, "GETME")["result"]["username"] == "offline_bot"


def test_who_asks_whether_to_send_a_body_is_told_to(api: OfflineBotAPI) -> None:
    line = f"POST /bot{api.token}/getMe HTTP/1.1\r\n".encode()
    answer = say(api, line + b"Expect: 100-continue\r\nContent-Length: 2\r\n\r\n{}")
    assert answer.startswith(b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\n")


def test_who_hangs_up_before_the_answer_disturbs_nobody(patient: OfflineBotAPI) -> None:
    connection = http.client.HTTPConnection(patient.url.removeprefix("http://"))
    connection.request("POST", f"/bot{patient.token}/getUpdates", "timeout=50")
    patient.call("getUpdates")
    linger = struct.pack("ii", 1, 0)  # close() resets the connection
    connection.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
    connection.close()
    patient.push(text_update("a"))
    assert ids(call(patient, "getUpdates")) == [1]


@pytest.mark.parametrize(
    ("boundary", "body", "reason"),
    [
        ("", b"", "multipart without a boundary"),
        ("; boundary=XX", b"--XX\r\n\r\n1\r\n--XX--\r\n", "a part without a name"),
        ("; boundary=XX", b'--XX\r\nContent-Disposition: form-data; name="a"\r\n\r\n1', "an end"),
    ],
)
def test_a_form_that_is_cut_off_is_refused(
    api: OfflineBotAPI, boundary: str, body: bytes, reason: str
) -> None:
    path = f"/bot{api.token}/sendMessage"
    answer = post(api, path, body or b"x", Content_Type=f"multipart/form-data{boundary}")
    assert answer["error_code"] == 400
    assert reason in answer["description"]


def test_what_it_cannot_carry_out_is_an_error_of_the_server(
    api: OfflineBotAPI, caplog: pytest.LogCaptureFixture
) -> None:
    answer = call(api, "sendInvoice", chat_id=1, prices="[{}]")
    assert answer["error_code"] == 500
    assert "could not answer" in caplog.text
    assert call(api, "getMe")["ok"]


@pytest.mark.parametrize("token", ["", "123456", "123456:", "alex:SECRET"])
def test_a_token_looks_like_telegrams(token: str) -> None:
    with pytest.raises(ValueError, match="a number, a colon and a secret"):
        OfflineBotAPI(token)


# --- getUpdates ---


def test_updates_are_numbered_and_forgotten_when_confirmed(api: OfflineBotAPI) -> None:
    numbers = [api.push(text_update(str(n))) for n in range(5)]
    assert numbers == [1, 2, 3, 4, 5]
    assert ids(call(api, "getUpdates", limit=2)) == [1, 2]
    assert ids(call(api, "getUpdates")) == [1, 2, 3, 4, 5]
    assert ids(call(api, "getUpdates", offset=4)) == [4, 5]
    assert ids(call(api, "getUpdates")) == [4, 5]
    assert api.pending == 2
    assert ids(call(api, "getUpdates", offset=-1)) == [5]
    assert ids(call(api, "getUpdates", offset=-10)) == [5]
    assert ids(call(api, "getUpdates", offset=6)) == []
    api.confirmed(timeout=0)


def test_at_most_a_hundred_updates_come_at_once(api: OfflineBotAPI) -> None:
    for n in range(150):
        api.push(text_update(str(n)))
    assert len(ids(call(api, "getUpdates", limit=1000))) == 100
    assert len(ids(call(api, "getUpdates", limit=0))) == 1


def test_a_pushed_update_is_the_callers_to_change(api: OfflineBotAPI) -> None:
    update = text_update("before")
    api.push(update)
    update["message"]["text"] = "after"
    assert call(api, "getUpdates")["result"][0]["message"]["text"] == "before"


def test_a_long_poll_ends_with_the_next_update(patient: OfflineBotAPI) -> None:
    with ThreadPoolExecutor() as pool:
        poll = pool.submit(call, patient, "getUpdates", timeout=50)
        patient.call("getUpdates")
        patient.push(text_update("now"))
        assert ids(poll.result(timeout=SOON)) == [1]


def test_a_long_poll_without_updates_ends_empty(patient: OfflineBotAPI) -> None:
    start = time.monotonic()
    assert ids(call(patient, "getUpdates", timeout=1)) == []
    assert 0.9 < time.monotonic() - start < SOON


def test_of_two_polls_the_older_one_ends_in_conflict(patient: OfflineBotAPI) -> None:
    with ThreadPoolExecutor() as pool:
        older = pool.submit(call, patient, "getUpdates", timeout=50)
        patient.call("getUpdates")
        newer = pool.submit(call, patient, "getUpdates", timeout=50)
        failed = older.result(timeout=SOON)
        assert failed["error_code"] == 409
        assert failed["description"].startswith("Conflict: terminated by other getUpdates request")
        patient.push(text_update("now"))
        assert ids(newer.result(timeout=SOON)) == [1]
    errors = [c.error for c in patient.calls_of("getUpdates")]
    assert errors == [failed["description"], None]


def test_closing_ends_a_long_poll_at_once_and_leaves_no_thread() -> None:
    before = set(threading.enumerate())
    api = OfflineBotAPI()
    idle = http.client.HTTPConnection(api.url.removeprefix("http://"))
    idle.connect()
    with ThreadPoolExecutor() as pool:
        poll = pool.submit(call, api, "getUpdates", timeout=50)
        api.call("getUpdates")
        start = time.monotonic()
        api.close()
        assert time.monotonic() - start < SOON  # and not 50 s
        assert ids(poll.result(timeout=SOON)) == []
    api.close()
    idle.close()
    assert set(threading.enumerate()) == before


def test_closing_waits_for_the_thread_of_a_connection_that_is_just_ending() -> None:
    closed = threading.Event()
    was_closed_before: list[bool] = []
    is_ending = threading.Event()

    def profile(frame: FrameType, event: str, _arg: object) -> None:
        if event == "return" and frame.f_code is HttpServer._serve.__code__:
            is_ending.set()
            was_closed_before.append(closed.wait(0.3))

    threading.setprofile(profile)
    try:
        api = OfflineBotAPI()
        client = http.client.HTTPConnection(api.url.removeprefix("http://"))
        client.connect()
        client.close()
        assert is_ending.wait(SOON)
    finally:
        threading.setprofile(None)  # type: ignore[arg-type]
    api.close()
    closed.set()
    assert was_closed_before == [False]


def test_only_updates_that_the_bot_asked_for_arrive(api: OfflineBotAPI) -> None:
    member = {"chat_member": {"chat": {"id": -1, "type": "group", "title": "G"}}}
    api.push(member)  # before the bot's first word: it waits for it
    api.push(text_update("hi"))
    wanted = json.dumps(["chat_member"])
    first = call(api, "getUpdates", allowed_updates=wanted)
    assert [set(update) for update in first["result"]] == [{"update_id", "chat_member"}]
    api.push(text_update("dropped"))
    api.push(member)
    assert ids(call(api, "getUpdates", offset=2)) == [4]
    call(api, "getUpdates", offset=5, allowed_updates="[]")  # back to the default
    api.push(member)
    api.push(text_update("hi"))
    assert ids(call(api, "getUpdates")) == [6]


# --- messages ---


def test_a_message_has_what_telegram_gives_it(api: OfflineBotAPI) -> None:
    forum = api.group(-1005, title="Forum", is_forum=True)
    alex = api.user(1, first_name="Alex")
    asked = alex.send("hello", chat=forum, thread=7)
    answer = call(
        api,
        "sendMessage",
        chat_id=forum.id,
        text="Hello",
        message_thread_id=7,
        business_connection_id="b",
        reply_parameters=json.dumps({"message_id": asked["message_id"]}),
    )
    message = answer["result"]
    assert message.pop("date") == pytest.approx(time.time(), abs=10)
    assert message == {
        "message_id": asked["message_id"] + 1,
        "from": api.me,
        "chat": forum.raw,
        "text": "Hello",
        "message_thread_id": 7,
        "is_topic_message": True,
        "business_connection_id": "b",
        "reply_to_message": asked,
    }


def test_messages_are_numbered_by_chat(api: OfflineBotAPI) -> None:
    def number(chat_id: int) -> int:
        return int(call(api, "sendMessage", chat_id=chat_id, text="x")["result"]["message_id"])

    assert [number(1), number(1), number(2), number(1)] == [1, 2, 1, 3]


@pytest.mark.parametrize(
    ("method", "params", "description"),
    [
        ("sendMessage", {"chat_id": 1}, "message text is empty"),
        ("sendMessage", {"chat_id": 1, "text": " \n"}, "message text is empty"),
        ("sendMessage", {"chat_id": 1, "text": "x" * 4097}, "message is too long"),
        ("sendMessage", {"text": "x"}, "chat_id is empty"),
        ("sendMessage", {"text": "x", "chat_id": "alex"}, "chat not found"),
        ("sendPhoto", {"chat_id": 1}, "there is no photo in the request"),
        ("editMessageText", {"chat_id": 1, "message_id": 9, "text": "x"}, "message to edit not"),
        ("deleteMessage", {"chat_id": 1, "message_id": 9}, "message to delete not found"),
        ("forwardMessage", {"chat_id": 1, "from_chat_id": 1, "message_id": 9}, "message to forw"),
        ("sendChatAction", {"action": "typing"}, "chat_id is empty"),
        ("sendLocation", {"chat_id": 1, "latitude": 1}, "there is no location in the request"),
        ("sendVenue", {"chat_id": 1, "latitude": 1, "longitude": "x"}, "there is no location"),
        ("sendMediaGroup", {"chat_id": 1, "media": "[]"}, "there are no media in the request"),
        ("sendMessage", {"chat_id": 1, "text": "x", "reply_markup": "{"}, "can't parse reply"),
        ("editMessageMedia", {"chat_id": 1, "message_id": 1}, "there is no media in the request"),
        ("getMyStarBalance", {}, "OfflineBotAPI has no model of getMyStarBalance"),
    ],
)
def test_a_bad_request_is_called_so(
    api: OfflineBotAPI, method: str, params: dict[str, Any], description: str
) -> None:
    answer = call(api, method, **params)
    assert answer["error_code"] == 400
    assert answer["description"].startswith(f"Bad Request: {description}")
    assert api.calls[-1].error == answer["description"]


def test_a_message_can_be_edited_copied_forwarded_and_deleted_once(api: OfflineBotAPI) -> None:
    call(api, "sendMessage", chat_id=1, text="one")
    place = {"chat_id": 1, "message_id": 1}
    assert call(api, "editMessageText", **place, text="two")["result"]["text"] == "two"
    unchanged = call(api, "editMessageText", **place, text="two")
    assert unchanged["description"].startswith("Bad Request: message is not modified")
    source = {"from_chat_id": 1, "message_id": 1}
    assert call(api, "copyMessage", chat_id=2, **source)["result"] == {"message_id": 1}
    forwarded = call(api, "forwardMessage", chat_id=2, **source)["result"]
    assert forwarded["text"] == "two"
    assert forwarded["forward_origin"]["sender_user"] == api.me
    assert call(api, "deleteMessage", **place)["result"] is True
    assert call(api, "deleteMessage", **place)["error_code"] == 400


def test_captions_media_and_keyboards_can_be_changed(api: OfflineBotAPI) -> None:
    place = {"chat_id": 1, "message_id": 1}
    keyboard = {"inline_keyboard": [[{"text": "Yes", "callback_data": "y"}]]}
    call(api, "sendPhoto", chat_id=1, photo="file-1", caption="one")
    edited = call(api, "editMessageCaption", **place, caption="two")["result"]
    assert edited["caption"] == "two"
    media = json.dumps({"type": "document", "media": "file-2", "caption": "three"})
    markup = json.dumps(keyboard)
    edited = call(api, "editMessageMedia", **place, media=media, reply_markup=markup)["result"]
    assert edited["document"]["file_id"] == "file-2"
    assert edited["caption"] == "three"
    assert edited["reply_markup"] == keyboard
    assert call(api, "editMessageText", inline_message_id="7", text="four")["result"] is True


def test_several_messages_are_passed_on_at_once(api: OfflineBotAPI) -> None:
    call(api, "sendMessage", chat_id="@news", text="one")
    call(api, "sendPhoto", chat_id="@news", photo="file-1", caption="two")
    source = {"chat_id": 1, "from_chat_id": "@news"}
    passed = call(api, "forwardMessages", **source, message_ids="[1, 2]")["result"]
    assert passed == [{"message_id": 1}, {"message_id": 2}]
    assert call(api, "copyMessages", **source, message_ids="[2]")["result"] == [{"message_id": 3}]
    copied = call(api, "copyMessage", **source, message_id=2, caption="three")["result"]
    assert copied == {"message_id": 4}
    alex = api.user(1)
    got = [alex.reply().raw for _ in range(4)]
    assert [one.get("caption", one.get("text")) for one in got] == ["one", "two", "two", "three"]


def test_what_was_written_in_a_channel_comes_from_the_channel(api: OfflineBotAPI) -> None:
    call(api, "sendMessage", chat_id="@news", text="one")
    source = {"from_chat_id": "@news", "message_id": 1}
    origin = call(api, "forwardMessage", chat_id=1, **source)["result"]["forward_origin"]
    assert origin["type"] == "channel"
    assert origin["chat"]["username"] == "news"


def test_a_message_of_a_kind_without_a_model_has_what_it_was_given(api: OfflineBotAPI) -> None:
    checklist = {"title": "Shopping", "tasks": []}
    sent = call(api, "sendChecklist", chat_id=1, checklist=json.dumps(checklist))["result"]
    assert sent["checklist"] == checklist


def test_only_so_many_messages_are_remembered(
    api: OfflineBotAPI, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chats, "KEPT_MESSAGES", 10)
    for number in range(11):
        call(api, "sendMessage", chat_id=1, text=str(number))
    source = {"chat_id": 2, "from_chat_id": 1}
    assert "not found" in call(api, "copyMessage", **source, message_id=1)["description"]
    assert call(api, "copyMessage", **source, message_id=2)["ok"]


def test_settings_are_remembered(api: OfflineBotAPI) -> None:
    commands = [{"command": "start", "description": "Start"}]
    scope = json.dumps({"type": "all_private_chats"})
    call(api, "setMyCommands", commands=json.dumps(commands), scope=scope)
    assert call(api, "getMyCommands", scope=scope)["result"] == commands
    assert call(api, "getMyCommands")["result"] == []
    call(api, "deleteMyCommands", scope=scope)
    assert call(api, "getMyCommands", scope=scope)["result"] == []
    call(api, "setMyName", name="Robot")
    assert call(api, "getMyName", language_code="de")["result"] == {"name": "Robot"}


def test_a_planned_failure_comes_once(api: OfflineBotAPI) -> None:
    api.fail_next("sendMessage", 429, retry_after=3)
    api.fail_next("sendmessage", 403)
    failed = call(api, "sendMessage", chat_id=1, text="x")
    assert failed["parameters"] == {"retry_after": 3}
    assert failed["description"] == "Too Many Requests: retry after 3"
    assert call(api, "sendMessage", chat_id=1, text="x")["error_code"] == 403
    assert call(api, "sendMessage", chat_id=1, text="x")["ok"]
    with pytest.raises(ValueError, match="no method 'sendMesage'"):
        api.fail_next("sendMesage")


def test_a_planned_answer_serves_methods_of_tomorrow(api: OfflineBotAPI) -> None:
    api.answer_next("getTomorrow", [1])
    assert call(api, "getTomorrow")["result"] == [1]
    assert call(api, "getTomorrow")["error_code"] == 404


# --- people ---


def test_commands_are_marked_in_utf16_units(api: OfflineBotAPI) -> None:
    message = api.user(1).send("😀 /go@offline_bot a/b /x")
    assert [(e["offset"], e["length"]) for e in message["entities"]] == [(3, 15), (23, 2)]


def test_each_reader_reads_each_reply_once(api: OfflineBotAPI) -> None:
    group = api.group(-1001)
    alex, kim = api.user(1), api.user(2)
    for text, thread in (("a", 7), ("b", 8), ("c", 7)):
        call(api, "sendMessage", chat_id=group.id, text=text, message_thread_id=thread)
    call(api, "sendMessage", chat_id=1, text="private")
    call(api, "sendMessage", chat_id=1, text="business", business_connection_id="b")
    assert [alex.reply(chat=group, thread=7).text for _ in range(2)] == ["a", "c"]
    assert [kim.reply(chat=group).text for _ in range(3)] == ["a", "b", "c"]
    assert alex.reply().text == "private"
    assert alex.reply(business="b").text == "business"


def test_a_missing_reply_says_what_the_bot_did_instead(api: OfflineBotAPI) -> None:
    call(api, "sendMessage", chat_id=2, text="wrong chat")
    call(api, "sendMessage", chat_id=1)
    api.push(text_update("hi"))
    with pytest.raises(TimeoutError) as caught:
        api.user(1).reply(timeout=0)
    assert str(caught.value) == (
        "no reply in chat 1, and 0 s have passed; the bot last called: "
        "sendMessage(chat_id=2, text='wrong chat'); "
        "sendMessage(chat_id=1) -> Bad Request: message text is empty; "
        "updates that it has not confirmed: 1"
    )


def test_a_coroutine_waits_for_a_call(api: OfflineBotAPI) -> None:
    async def main() -> str:
        waiting = asyncio.create_task(api.acall("sendMessage", chat_id=1))
        for chat_id in (2, 1):
            await asyncio.to_thread(call, api, "sendMessage", chat_id=chat_id, text=str(chat_id))
        return str((await waiting).params["text"])

    assert asyncio.run(main()) == "1"


def test_a_user_writes_through_a_business_connection(api: OfflineBotAPI) -> None:
    alex = api.user(7, first_name="Alex")
    assert repr(alex) == "<OfflineUser 7 'Alex'>"
    alex.send("hi", business="b1")
    update = call(api, "getUpdates")["result"][0]
    assert update["business_message"]["business_connection_id"] == "b1"
    call(api, "sendMessage", chat_id=7, text="hello", business_connection_id="b1")
    assert alex.reply(business="b1").text == "hello"


def test_a_wait_that_blocks_its_event_loop_says_so(api: OfflineBotAPI) -> None:
    async def main() -> None:
        with pytest.raises(TimeoutError, match="await the `await_"):
            api.user(1).reply(timeout=0)

    asyncio.run(main())


def test_a_reply_waits_for_its_own_edits(api: OfflineBotAPI) -> None:
    call(api, "sendMessage", chat_id=1, text="0")
    reply = api.user(1).reply()
    for text in ("1", "2"):
        call(api, "editMessageText", chat_id=1, message_id=reply.message_id, text=text)
    assert reply.edit().text == "1"
    assert reply.edit().edit().text == "2"


def test_a_button_that_is_not_there_is_named(api: OfflineBotAPI) -> None:
    keyboard = json.dumps({"keyboard": [["Yes", {"text": "No"}]]})
    message = call(api, "sendMessage", chat_id=1, text="Sure?", reply_markup=keyboard)["result"]
    assert "reply_markup" not in message  # Telegram returns inline keyboards only
    alex = api.user(1)
    reply = alex.reply()
    assert [button.text for button in reply.buttons] == ["Yes", "No"]
    with pytest.raises(LookupError, match=r"no button 'Maybe'.*'Sure\?'.*text='Yes'"):
        alex.press(reply, "Maybe")
    with pytest.raises(ValueError, match="no callback query"):
        alex.press(reply, "Yes")


def test_many_threads_share_the_server(api: OfflineBotAPI) -> None:
    alex = api.user(1)

    def work(_: int) -> list[int]:
        written = [alex.send("hi")["message_id"] for _ in range(50)]
        sent = [call(api, "sendMessage", chat_id=1, text="x") for _ in range(20)]
        return written + [answer["result"]["message_id"] for answer in sent]

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(8) as pool:
            numbers = sorted(number for some in pool.map(work, range(8)) for number in some)
    finally:
        sys.setswitchinterval(interval)
    assert numbers == list(range(1, 561))
    assert len(api.calls_of("sendMessage")) == 160
    assert api.pending == 400
    assert ids(call(api, "getUpdates", offset=301)) == list(range(301, 401))


# --- webhook ---


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


# --- telebot ---


@pytest.fixture
def bot(api: OfflineBotAPI, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A telebot that polls in a thread. Its requests sessions are kept by thread: ours goes."""
    monkeypatch.setattr(apihelper, "API_URL", api.telebot_url)
    bot = telebot.TeleBot(api.token)

    @bot.message_handler(commands=["start"])
    def start(message: Any) -> None:
        markup = telebot_types.InlineKeyboardMarkup()
        markup.add(telebot_types.InlineKeyboardButton("Yes", callback_data="vote:yes"))
        bot.reply_to(message, f"Hello, {message.from_user.first_name}", reply_markup=markup)

    @bot.callback_query_handler(func=lambda query: True)
    def pressed(query: Any) -> None:
        bot.answer_callback_query(query.id, "Thanks", show_alert=True)
        place = {"chat_id": query.message.chat.id, "message_id": query.message.message_id}
        bot.edit_message_text(f"You said {query.data}", **place)

    @bot.message_handler(content_types=["text"])
    def echo(message: Any) -> None:
        bot.send_message(message.chat.id, message.text, message_thread_id=message.message_thread_id)

    thread = threading.Thread(
        target=bot.infinity_polling, kwargs={"timeout": 5, "long_polling_timeout": 1}
    )
    thread.start()
    api.call("getUpdates")
    yield bot
    stop_telebot(bot)
    thread.join()
    telebot_util.per_thread("req_session", lambda: None, True)


def test_telebot_polls_and_answers(api: OfflineBotAPI, bot: Any) -> None:
    alex = api.user(1, first_name="Alex")
    asked = alex.send("/start")
    reply = alex.reply()
    assert reply.text == "Hello, Alex"
    assert reply.raw["reply_to_message"]["message_id"] == asked["message_id"]
    press = alex.press(reply, "Yes")
    assert press.answer()["text"] == "Thanks"
    assert press.id
    assert reply.edit().text == "You said vote:yes"
    assert reply.edit().buttons == []
    api.confirmed()


def test_telebot_answers_in_groups_and_topics(api: OfflineBotAPI, bot: Any) -> None:
    forum = api.group(-1001, title="Forum", is_forum=True)
    alex = api.user(1)
    alex.send("in topic 7", chat=forum, thread=7)
    assert alex.reply(chat=forum, thread=7).text == "in topic 7"


@pytest.fixture
def caller(api: OfflineBotAPI, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A telebot that does not poll. telebot keeps a requests session by thread: close ours."""
    monkeypatch.setattr(apihelper, "API_URL", api.telebot_url)
    apihelper._get_req_session(reset=True)
    yield telebot.TeleBot(api.token, threaded=False)
    apihelper._get_req_session().close()
    apihelper._get_req_session(reset=True)


def test_telebot_reads_every_kind_of_answer(api: OfflineBotAPI, caller: Any) -> None:
    assert caller.get_me().username == "offline_bot"
    assert caller.send_photo(1, b"JPEG", caption="Cat").photo[-1].file_size == 4
    assert caller.send_document(1, "file-1").document.file_id == "file-1"
    assert caller.send_sticker(1, "sticker-1").sticker.file_id == "sticker-1"
    media = [telebot_types.InputMediaPhoto("a", caption="A"), telebot_types.InputMediaPhoto("b")]
    assert [message.message_id for message in caller.send_media_group(1, media)] == [4, 5]
    assert caller.send_poll(1, "Q?", ["a", "b"]).poll.options[1].text == "b"
    assert caller.send_location(1, 1.5, 2.5).location.latitude == 1.5
    assert caller.send_chat_action(1, "typing") is True
    assert caller.get_chat(1).type == "private"
    assert caller.get_chat_member(-100, 1).status == "member"
    assert caller.get_chat_member(-100, caller.get_me().id).user.is_bot
    assert caller.get_chat_member_count(-100) == 2
    assert caller.get_chat_administrators(-100) == []
    prices = [telebot_types.LabeledPrice("Tea", 150), telebot_types.LabeledPrice("Milk", 50)]
    invoice = caller.send_invoice(1, "Cart", "Tea", "payload", "", "EUR", prices).invoice
    assert (invoice.title, invoice.currency, invoice.total_amount) == ("Cart", "EUR", 200)
    assert caller.send_contact(1, "+1", "Alex").contact.first_name == "Alex"
    assert caller.copy_message(2, 1, 1).message_id == 1
    assert caller.delete_messages(1, [1, 2, 99]) is True
    assert caller.set_my_commands([telebot_types.BotCommand("start", "Start")]) is True
    assert caller.get_my_commands()[0].command == "start"
    assert caller.create_forum_topic(-100, "Topic").name == "Topic"
    assert caller.answer_inline_query("1", []) is True


def test_telebot_raises_what_the_api_answers(api: OfflineBotAPI, caller: Any) -> None:
    api.fail_next("sendMessage", 429, retry_after=7)
    with pytest.raises(apihelper.ApiTelegramException) as caught:
        caller.send_message(1, "x")
    assert caught.value.error_code == 429
    assert caught.value.result_json["parameters"]["retry_after"] == 7
    assert caller.set_webhook("http://127.0.0.1:1/") is True
    assert caller.get_webhook_info().url == "http://127.0.0.1:1/"
    assert caller.remove_webhook() is True


# --- python-telegram-bot ---


def application(api: OfflineBotAPI) -> Any:
    builder = telegram_ext.Application.builder().token(api.token).base_url(api.base_url)
    app = builder.build()

    async def start(update: Any, context: Any) -> None:
        from telegram import InlineKeyboardButton, InlineKeyboardMarkup

        markup = InlineKeyboardMarkup([[InlineKeyboardButton("Yes", callback_data="vote:yes")]])
        name = update.effective_user.first_name
        await update.message.reply_text(f"Hello, {name}", reply_markup=markup)

    async def pressed(update: Any, context: Any) -> None:
        await update.callback_query.answer("Thanks", show_alert=True)
        await update.callback_query.edit_message_text(f"You said {update.callback_query.data}")

    app.add_handler(telegram_ext.CommandHandler("start", start))
    app.add_handler(telegram_ext.CallbackQueryHandler(pressed))
    return app


async def converse(api: OfflineBotAPI) -> None:
    alex = api.user(1, first_name="Alex")
    alex.send("/start")
    reply = await alex.areply()
    assert reply.text == "Hello, Alex"
    press = alex.press(reply, "vote:yes")
    assert await press.aanswer() == {
        "callback_query_id": press.id,
        "text": "Thanks",
        "show_alert": True,
    }
    assert (await reply.aedit()).text == "You said vote:yes"
    await api.aconfirmed()


def test_ptb_polls_and_answers(patient: OfflineBotAPI) -> None:
    async def main() -> None:
        async with application(patient) as app:
            await app.start()
            await app.updater.start_polling()
            await converse(patient)
            await app.updater.stop()
            await app.stop()

    run_client(main())


def test_ptb_serves_a_webhook(patient: OfflineBotAPI) -> None:
    pytest.importorskip("tornado")

    async def main() -> None:
        async with application(patient) as app:
            await app.start()
            port = free_port()
            await app.updater.start_webhook(
                listen="127.0.0.1",
                port=port,
                url_path="hook",
                webhook_url=f"http://127.0.0.1:{port}/hook",
                secret_token="s3cret",
                drop_pending_updates=True,
            )
            await converse(patient)
            await app.bot.delete_webhook()
            await app.updater.stop()
            await app.stop()

    run_client(main())


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def test_ptb_processes_an_update_by_hand(api: OfflineBotAPI) -> None:
    async def main() -> None:
        from telegram import Update

        async with application(api) as app:
            alex = api.user(1, first_name="Alex")
            message = alex.send("/start")
            await app.process_update(Update.de_json({"update_id": 1, "message": message}, app.bot))
            assert alex.reply(timeout=0).text == "Hello, Alex"

    asyncio.run(main())


def test_ptb_reads_every_kind_of_answer(
    api: OfflineBotAPI, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PTB_TIMEDELTA", "1")  # else RetryAfter warns of a deprecation

    async def main() -> None:
        from telegram import BotCommand, InputMediaPhoto, error

        async with application(api) as app:
            bot = app.bot
            assert bot.username == "offline_bot"
            photo = await bot.send_photo(1, b"JPEG", caption="Cat")
            assert (photo.photo[-1].file_size, photo.caption) == (4, "Cat")
            for kind in ("audio", "document", "animation", "sticker", "video", "voice"):
                sent = await getattr(bot, f"send_{kind}")(1, "file-1")
                assert getattr(sent, kind).file_id == "file-1"
            note = await bot.send_video_note(1, "file-1")
            assert note.video_note.length == 1
            album = [InputMediaPhoto(b"one"), InputMediaPhoto("file-2")]
            sizes = [m.photo[0].file_size for m in await bot.send_media_group(1, album)]
            assert sizes == [3, None]
            assert (await bot.send_poll(1, "Q?", ["a", "b"])).poll.options[1].text == "b"
            assert (await bot.send_dice(1)).dice.value == 1
            assert (await bot.send_venue(1, 1.5, 2.5, "T", "A")).venue.location.longitude == 2.5
            assert (await bot.send_contact(1, "+1", "Kim")).contact.first_name == "Kim"
            assert (await bot.get_chat("@news")).type == "channel"
            assert (await bot.get_chat_member(-100, 1)).user.id == 1
            assert (await bot.forward_message(2, 1, photo.message_id)).forward_origin
            assert await bot.set_my_commands([BotCommand("start", "Start")])
            assert (await bot.get_my_commands())[0].command == "start"
            assert (await bot.create_forum_topic(-100, "Topic")).name == "Topic"
            api.fail_next("sendMessage", 429, retry_after=7)
            with pytest.raises(error.RetryAfter):
                await bot.send_message(1, "x")
            api.fail_next("sendMessage", 403)
            with pytest.raises(error.Forbidden, match="bot was blocked by the user"):
                await bot.send_message(1, "x")

    asyncio.run(main())
