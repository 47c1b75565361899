"""The methods of the Bot API: which there are, how their parameters are typed, what they answer.

An answer is a function of what Telegram remembers (`Chats`) and of the parameters. A method that
only returns True needs none. What is data, names and constant results, is in `bot_api.toml`, as of
Bot API 10.1; `OfflineBotAPI.answer_next` is for newer ones. This module knows chats and
parameters; it knows no server and no updates.
"""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Callable
from contextlib import suppress
from importlib.resources import files
from itertools import count
from typing import Any, Final

from session_sync.testing.answers import BotAPIError
from session_sync.testing.chats import JSON, SERVICE_FIELDS, Chats
from session_sync.testing.wire import Upload

Answer = Callable[[Chats, JSON], Any]

_API: Final = tomllib.loads(
    files("session_sync.testing").joinpath("bot_api.toml").read_text("utf-8")
)
METHODS: Final[dict[str, str]] = {name.lower(): name for name in _API["methods"].split()}

_MEDIA_ID = count(1)
_TRUE = ("true", "yes", "1")


def _integer(value: str) -> int | str:
    try:
        return int(value)
    except ValueError:
        return value


def _boolean(value: str) -> bool:
    return value.lower() in _TRUE


def _structure(value: str) -> Any:
    try:
        return json.loads(value)
    except ValueError:
        return value


_TYPES: Final[dict[str, Callable[[str], Any]]] = {
    "integer": _integer,
    "boolean": _boolean,
    "structure": _structure,
}
_DECODERS: Final = {
    name: _TYPES[kind] for kind, names in _API["parameters"].items() for name in names.split()
}


def decode(params: JSON) -> JSON:
    """The parameters with the types that the Bot API gives them, however they were passed.

    >>> decode({"chat_id": "1", "text": "[1]", "reply_markup": "{}", "show_alert": "True"})
    {'chat_id': 1, 'text': '[1]', 'reply_markup': {}, 'show_alert': True}
    """
    decoders = _DECODERS
    return {
        name: decoders[name](value) if name in decoders and isinstance(value, str) else value
        for name, value in params.items()
    }


# --- what a sent message holds -------------------------------------------------------------


def _text(params: JSON) -> JSON:
    text = str(params.get("text", ""))
    if not text.strip():
        raise BotAPIError(400, "Bad Request: message text is empty")
    if len(text) > 4096:
        raise BotAPIError(400, "Bad Request: message is too long")
    return {"text": text, **_picked(params, "entities")}


def _picked(params: JSON, *names: str) -> JSON:
    return {name: params[name] for name in names if name in params}


def _file(value: object, params: JSON) -> JSON:
    """What names a file: one on Telegram's servers keeps its id, an upload gets one."""
    if isinstance(value, str) and value.startswith("attach://"):
        value = params.get(value.removeprefix("attach://"), value)
    uploaded = isinstance(value, Upload)
    file_id = f"offline-{next(_MEDIA_ID)}" if uploaded else str(value)
    about = {"file_size": value.size} if isinstance(value, Upload) else {}
    return {"file_id": file_id, "file_unique_id": f"unique-{file_id}", **about}


_MEDIA: Final[dict[str, JSON]] = _API["media"]


def _media(kind: str, source: JSON, params: JSON, field: str) -> JSON:
    if not source.get(field):
        raise BotAPIError(400, f"Bad Request: there is no {kind} in the request")
    content: JSON = {**_file(source[field], params), **_MEDIA[kind]}
    if kind in ("document", "audio", "video") and isinstance(source[field], Upload):
        content["file_name"] = source[field].filename
    return {
        kind: [content] if kind == "photo" else content,
        **_picked(source, "caption", "caption_entities"),
    }


def _poll(params: JSON) -> JSON:
    options = params.get("options", [])
    texts = [option["text"] if isinstance(option, dict) else option for option in options]
    return {
        "poll": {
            "id": str(next(_MEDIA_ID)),
            "question": params.get("question", ""),
            "options": [
                {"persistent_id": str(number), "text": text, "voter_count": 0}
                for number, text in enumerate(texts)
            ],
            "total_voter_count": 0,
            "is_closed": False,
            "is_anonymous": params.get("is_anonymous", True),
            "type": params.get("type", "regular"),
            "allows_multiple_answers": params.get("allows_multiple_answers", False),
            "allows_revoting": params.get("allows_revoting", True),
            "members_only": params.get("members_only", False),
        }
    }


def _venue(params: JSON) -> JSON:
    return {"venue": {"location": _location(params), **_picked(params, "title", "address")}}


def _location(params: JSON) -> JSON:
    try:
        return {name: float(params[name]) for name in ("latitude", "longitude")}
    except (KeyError, ValueError):
        raise BotAPIError(400, "Bad Request: there is no location in the request") from None


def _invoice(params: JSON) -> JSON:
    names = ("title", "description", "currency")
    prices = params.get("prices") or []
    total = sum(int(price["amount"]) for price in prices)
    return {"invoice": {**_picked(params, *names), "start_parameter": "", "total_amount": total}}


_CONTENTS: Final[dict[str, Callable[[JSON], JSON]]] = {
    "message": _text,
    "poll": _poll,
    "venue": _venue,
    "invoice": _invoice,
    "location": lambda params: {"location": _location(params)},
    "contact": lambda params: {
        "contact": _picked(params, "phone_number", "first_name", "last_name", "vcard")
    },
    "dice": lambda params: {"dice": {"emoji": params.get("emoji", "🎲"), "value": 1}},
    "game": lambda params: {
        "game": {"title": params.get("game_short_name", ""), "description": "", "photo": []}
    },
}


def _content(kind: str, params: JSON) -> JSON:
    if kind in _MEDIA:
        return _media(kind, params, params, kind)
    if kind in _CONTENTS:
        return _CONTENTS[kind](params)
    return _picked(params, kind, "caption")  # a kind of message with no model of its own here


def _markup(params: JSON) -> JSON | None:
    markup = params.get("reply_markup")
    if markup is None or markup == "":
        return None
    if not isinstance(markup, dict):
        raise BotAPIError(400, "Bad Request: can't parse reply keyboard markup JSON object")
    return markup or None


# --- answers -------------------------------------------------------------------------------


def _send(kind: str) -> Answer:
    def answer(chats: Chats, params: JSON) -> Any:
        content = _content(kind, params)
        return chats.post(chats.chat(params.get("chat_id")), content, params, _markup(params))

    return answer


def _send_media_group(chats: Chats, params: JSON) -> Any:
    media = params.get("media")
    if not isinstance(media, list) or not media:
        raise BotAPIError(400, "Bad Request: there are no media in the request")
    chat = chats.chat(params.get("chat_id"))
    group = {"media_group_id": str(next(_MEDIA_ID))}
    contents = [_media(item["type"], item, params, "media") for item in media]
    return [chats.post(chat, {**content, **group}, params, None) for content in contents]


def _edit(change: Callable[[JSON], JSON]) -> Answer:
    def answer(chats: Chats, params: JSON) -> Any:
        changed = change(params)
        markup = _markup(params)
        if params.get("inline_message_id"):
            return True
        return chats.edit(params.get("chat_id"), params.get("message_id"), changed, markup)

    return answer


def _new_caption(params: JSON) -> JSON:
    return {"caption": params.get("caption", ""), **_picked(params, "caption_entities")}


def _new_media(params: JSON) -> JSON:
    media = params.get("media")
    if not isinstance(media, dict) or media.get("type") not in _MEDIA:
        raise BotAPIError(400, "Bad Request: there is no media in the request")
    return _media(media["type"], media, params, "media")


def _delete_message(chats: Chats, params: JSON) -> Any:
    chats.delete(params.get("chat_id"), params.get("message_id"))
    return True


def _delete_messages(chats: Chats, params: JSON) -> Any:
    for message_id in params.get("message_ids", []):
        with suppress(BotAPIError):  # those that cannot be found are skipped
            chats.delete(params.get("chat_id"), message_id)
    return True


def _pass_on(chats: Chats, params: JSON, message_id: Any, *, forward: bool) -> JSON:
    source = chats.message(params.get("from_chat_id"), message_id)
    if source is None:
        verb = "forward" if forward else "copy"
        raise BotAPIError(400, f"Bad Request: message to {verb} not found")
    content = {name: value for name, value in source.items() if name not in SERVICE_FIELDS}
    if forward:
        content["forward_origin"] = _origin(source)
    elif "caption" in params:
        content["caption"] = params["caption"]
    return chats.post(chats.chat(params.get("chat_id")), content, params, _markup(params))


def _origin(source: JSON) -> JSON:
    if "from" in source:
        return {"type": "user", "date": source["date"], "sender_user": source["from"]}
    about = {"chat": source["chat"], "message_id": source["message_id"]}
    return {"type": "channel", "date": source["date"], **about}


def _forward_message(chats: Chats, params: JSON) -> Any:
    return _pass_on(chats, params, params.get("message_id"), forward=True)


def _copy_message(chats: Chats, params: JSON) -> Any:
    message = _pass_on(chats, params, params.get("message_id"), forward=False)
    return {"message_id": message["message_id"]}


def _pass_on_all(*, forward: bool) -> Answer:
    def answer(chats: Chats, params: JSON) -> Any:
        passed = [
            _pass_on(chats, params, message_id, forward=forward)
            for message_id in params.get("message_ids", [])
        ]
        return [{"message_id": message["message_id"]} for message in passed]

    return answer


def _get_chat(chats: Chats, params: JSON) -> Any:
    return {**chats.chat(params.get("chat_id")), **_API["chat"]}


def _get_chat_member(chats: Chats, params: JSON) -> Any:
    chats.chat(params.get("chat_id"))
    user_id = params.get("user_id")
    if user_id == chats.me["id"]:
        return {"status": "member", "user": chats.me}
    person = chats.chat(user_id)
    names = _picked(person, "first_name", "last_name", "username", "language_code")
    return {"status": "member", "user": {"id": person["id"], "is_bot": False, **names}}


def _create_forum_topic(chats: Chats, params: JSON) -> Any:
    chat = chats.chat(params.get("chat_id"))
    topic = {"message_thread_id": chats.next_message_id(chat["id"])}
    return {**topic, "icon_color": 0x6FB9F0, **_picked(params, "name", "icon_color")}


def _command_key(params: JSON) -> str:
    scope = params.get("scope") or {"type": "default"}
    return f"commands {json.dumps(scope, sort_keys=True)} {params.get('language_code', '')}"


def _set_my_commands(chats: Chats, params: JSON) -> Any:
    chats.settings[_command_key(params)] = params.get("commands", [])
    return True


def _delete_my_commands(chats: Chats, params: JSON) -> Any:
    chats.settings.pop(_command_key(params), None)
    return True


def _setter(field: str) -> Answer:
    def answer(chats: Chats, params: JSON) -> Any:
        chats.settings[f"{field} {params.get('language_code', '')}"] = params.get(field, "")
        return True

    return answer


def _getter(field: str) -> Answer:
    def answer(chats: Chats, params: JSON) -> Any:
        default = chats.settings.get(f"{field} ", "")
        return {field: chats.settings.get(f"{field} {params.get('language_code', '')}", default)}

    return answer


def _always(result: Any) -> Answer:
    return lambda chats, params: result


def _always_in_a_chat(result: Any) -> Answer:
    def answer(chats: Chats, params: JSON) -> Any:
        chats.chat(params.get("chat_id"))
        return result

    return answer


def _snake(name: str) -> str:
    return re.sub(r"(?<!^)(?=[A-Z])", "_", name).lower()


_ANSWERS: Final[dict[str, Answer]] = {
    **{name: _send(_snake(name[4:])) for name in METHODS.values() if name.startswith("send")},
    **{name: _always(result) for name, result in _API["results"].items()},
    **{name: _always_in_a_chat(result) for name, result in _API["results_in_a_chat"].items()},
    "sendMediaGroup": _send_media_group,
    "editMessageText": _edit(_text),
    "editMessageCaption": _edit(_new_caption),
    "editMessageMedia": _edit(_new_media),
    "editMessageReplyMarkup": _edit(lambda params: {}),
    "editMessageLiveLocation": _edit(lambda params: {"location": _location(params)}),
    "stopMessageLiveLocation": _edit(lambda params: {}),
    "deleteMessage": _delete_message,
    "deleteMessages": _delete_messages,
    "forwardMessage": _forward_message,
    "copyMessage": _copy_message,
    "forwardMessages": _pass_on_all(forward=True),
    "copyMessages": _pass_on_all(forward=False),
    "getMe": lambda chats, params: chats.me,
    "getChat": _get_chat,
    "getChatMember": _get_chat_member,
    "createForumTopic": _create_forum_topic,
    "setMyCommands": _set_my_commands,
    "deleteMyCommands": _delete_my_commands,
    "getMyCommands": lambda chats, params: chats.settings.get(_command_key(params), []),
    "setMyName": _setter("name"),
    "setMyDescription": _setter("description"),
    "setMyShortDescription": _setter("short_description"),
    "getMyName": _getter("name"),
    "getMyDescription": _getter("description"),
    "getMyShortDescription": _getter("short_description"),
}
# Methods of these kinds return something that a bot would look into; the others return True.
_WITH_RESULT: Final = re.compile(
    "get|create|edit|upload|post|repost|save|export|revoke|stop|replaceManaged|answerGuest"
)


def answer(method: str, chats: Chats, params: JSON) -> Any:
    """The result of a method, by its exact name; raises BotAPIError."""
    answer = _ANSWERS.get(method)
    if answer is not None:
        return answer(chats, params)
    if method not in METHODS.values():
        raise BotAPIError(404, "Not Found")
    if _WITH_RESULT.match(method) and not method.endswith("ForumTopic"):
        raise BotAPIError(
            400,
            f"Bad Request: OfflineBotAPI has no model of {method}; "
            f"give it a result with api.answer_next({method!r}, ...)",
        )
    return True
