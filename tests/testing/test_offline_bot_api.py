"""`OfflineBotAPI` as bare HTTP sees it."""

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
from concurrent.futures import ThreadPoolExecutor
from types import FrameType
from typing import Any
from urllib.parse import urlencode

import offline_tools
import pytest
from offline_tools import call, ids, post, text_update
from waiting import SOON

from session_sync.testing import OfflineBotAPI, Upload, chats
from session_sync.testing.wire import HttpServer

telebot = pytest.importorskip("telebot")
telegram_ext = pytest.importorskip("telegram.ext")

api = pytest.fixture(offline_tools.make_api)
patient = pytest.fixture(offline_tools.make_patient)


# -- how parameters arrive


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


# -- getUpdates


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


# -- messages


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


# -- people


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
