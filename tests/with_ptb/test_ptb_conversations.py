"""python-telegram-bot's conversations in the session: `session_sync.ptb.ConversationHandler`."""

from __future__ import annotations

import asyncio
import logging
from contextlib import closing
from enum import Enum, IntEnum
from pathlib import Path
from typing import Any

import ptb_tools
import pytest
from conftest import callback_query, message, run_client
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ptb_tools import KEY, Gate, on_text, process, queue, running, stored

from session_sync import SessionManager, SQLiteStorage, by_chat, by_topic, by_user
from session_sync.ptb import ConversationHandler, install
from session_sync.session.standing import standing_of
from session_sync.testing import OfflineBotAPI

telegram = pytest.importorskip("telegram")
ext = pytest.importorskip("telegram.ext")

pytestmark = pytest.mark.filterwarnings("ignore:.*CallbackQueryHandler:UserWarning")

_no_deprecation = pytest.fixture(autouse=True)(ptb_tools.make_no_deprecation)
sessions = pytest.fixture(params=ptb_tools.STORES)(ptb_tools.make_sessions)
in_memory = pytest.fixture(ptb_tools.make_in_memory)

END = ConversationHandler.END
NAME, AGE = "NAME", "AGE"
GROUP = -100


class FailedError(Exception):
    pass


def command(text: str, user: int = 1, chat: int | None = None) -> dict[str, Any]:
    entities = [{"type": "bot_command", "offset": 0, "length": len(text)}]
    return message(user, text, chat, entities=entities)


def returns(state: object) -> Any:
    async def callback(_update: Any, _context: Any) -> object:
        return state

    return callback


async def take_name(update: Any, context: Any) -> object:
    context.session.name = update.effective_message.text
    return AGE


async def take_age(update: Any, context: Any) -> object:
    context.session.age = update.effective_message.text
    return END


def make_form(**options: Any) -> Any:
    return ConversationHandler(
        entry_points=[ext.CommandHandler("start", returns(NAME))],
        states={
            NAME: [ext.MessageHandler(ext.filters.TEXT & ~ext.filters.COMMAND, take_name)],
            AGE: [ext.MessageHandler(ext.filters.TEXT & ~ext.filters.COMMAND, take_age)],
        },
        fallbacks=[ext.CommandHandler("cancel", returns(END))],
        **{"name": "form", **options},
    )


def make(states: dict[Any, Any], entry: Any = None, **options: Any) -> Any:
    """A conversation that begins with /start, in the first of its states."""
    entry = returns(next(iter(states))) if entry is None else entry
    entry_points = [ext.CommandHandler("start", entry)]
    return ConversationHandler(entry_points, states, [], **{"name": "form", **options})


def where(sessions: SessionManager[Any], key: str = KEY) -> Any:
    """Where the user of a session stands, as it is stored."""
    return (stored(sessions, key) or {}).get("$at", {})


# -- a conversation


def test_a_form_is_filled_in(api: OfflineBotAPI, sessions: SessionManager[Any]) -> None:
    async def main() -> None:
        async with running(api, sessions, make_form()) as app:
            await process(app, command("/start"))
            assert where(sessions) == {"conversation:form:": NAME}
            await process(app, message(text="Alex"), message(text="7"))
            assert stored(sessions) == {"name": "Alex", "age": "7"}
            await process(app, message(text="8"))
            assert stored(sessions) == {"name": "Alex", "age": "7"}

    run_client(main())


def test_another_application_on_the_same_store_goes_on(api: OfflineBotAPI, tmp_path: Path) -> None:
    async def step(update: dict[str, Any]) -> None:  # as after a restart, or in another process
        with closing(SQLiteStorage(tmp_path / "s.db")) as storage:
            async with running(api, SessionManager(storage=storage), make_form()) as app:
                await process(app, update)

    for update in (command("/start"), message(text="Alex"), message(text="7")):
        run_client(step(update))
    with closing(SQLiteStorage(tmp_path / "s.db")) as storage:
        assert storage.get(KEY) == {"name": "Alex", "age": "7"}


def test_messages_that_come_at_once_are_answers_in_their_order(
    api: OfflineBotAPI, sessions: SessionManager[Any]
) -> None:
    async def main() -> None:
        async with running(
            api, sessions, make_form(), build=lambda b: b.concurrent_updates(True)
        ) as app:
            users = range(1, 21)
            await queue(app, *(command("/start", user) for user in users))
            await queue(
                app,
                *(message(user, text) for text in ("Alex", "7", "late") for user in users),
            )
            for user in users:
                at = stored(sessions, f"user:{user}:chat:{user}")
                assert at == {"name": "Alex", "age": "7"}

    run_client(main())


def test_a_fallback_ends_it(api: OfflineBotAPI, in_memory: SessionManager[Any]) -> None:
    async def main() -> None:
        async with running(api, in_memory, make_form()) as app:
            await process(app, command("/cancel"))
            assert stored(in_memory) is None
            await process(app, command("/start"), command("/start"), command("/cancel"))
            assert stored(in_memory) is None

    run_client(main())


@pytest.mark.parametrize("allowed", [False, True])
def test_an_entry_point_begins_it_anew_if_that_is_allowed(
    allowed: bool, api: OfflineBotAPI, in_memory: SessionManager[Any]
) -> None:
    async def main() -> None:
        async with running(api, in_memory, make_form(allow_reentry=allowed)) as app:
            await process(app, command("/start"), message(text="Alex"), command("/start"))
            assert where(in_memory) == {"conversation:form:": NAME if allowed else AGE}

    run_client(main())


def test_nothing_returned_leaves_the_state(
    api: OfflineBotAPI, in_memory: SessionManager[Any]
) -> None:
    form = make({NAME: [on_text(returns(None))]})

    async def main() -> None:
        async with running(api, in_memory, form) as app:
            await process(app, command("/start"), message(), message())
            assert where(in_memory) == {"conversation:form:": NAME}

    run_client(main())


def test_a_state_that_is_not_known_is_stored_with_a_warning(
    api: OfflineBotAPI, in_memory: SessionManager[Any]
) -> None:
    form = make({NAME: [on_text(returns("elsewhere"))]})

    async def main() -> None:
        async with running(api, in_memory, form) as app:
            await process(app, command("/start"))
            with pytest.warns(
                UserWarning, match="unknown to the ConversationHandler form: 'elsewhere'"
            ):
                await process(app, message())
            assert where(in_memory) == {"conversation:form:": "elsewhere"}
            # What a program has no more is left by an entry point.
            await process(app, command("/start"))
            assert where(in_memory) == {"conversation:form:": NAME}

    run_client(main())


def test_to_empty_the_session_leaves_the_state(
    api: OfflineBotAPI, in_memory: SessionManager[Any]
) -> None:
    async def reset(_update: Any, context: Any) -> None:
        context.session = None

    form = make({NAME: [on_text(reset)]})

    async def main() -> None:
        async with running(api, in_memory, form) as app:
            await process(app, command("/start"), message())
            assert where(in_memory) == {"conversation:form:": NAME}

    run_client(main())


# -- errors


@pytest.mark.parametrize("group", ["its own", "a later one"])
def test_a_handler_that_raises_leaves_state_and_session(
    group: str, api: OfflineBotAPI, sessions: SessionManager[Any]
) -> None:
    errors = []

    async def name(update: Any, context: Any) -> object:
        await take_name(update, context)
        if group == "its own":
            raise FailedError
        return AGE

    async def later(update: Any, _context: Any) -> None:
        if update.effective_message.text == "Alex" and group == "a later one":
            raise FailedError

    async def note(_update: Any, context: Any) -> None:
        errors.append(type(context.error))

    form = make({NAME: [on_text(name)], AGE: [on_text(take_age)]})

    async def main() -> None:
        async with running(api, sessions, form, on_text(later)) as app:
            app.add_error_handler(note)
            await process(app, command("/start"), message(text="Alex"))
            assert errors == [FailedError]
            assert stored(sessions) == {"$at": {"conversation:form:": NAME}}

    run_client(main())


def test_a_state_that_cannot_be_stored_is_an_error_of_its_handler(
    api: OfflineBotAPI, in_memory: SessionManager[Any]
) -> None:
    errors = []

    async def note(_update: Any, context: Any) -> None:
        errors.append(context.error)

    form = make({NAME: [on_text(returns([AGE]))]})

    async def main() -> None:
        async with running(api, in_memory, form) as app:
            app.add_error_handler(note)
            await process(app, command("/start"))
            with pytest.warns(UserWarning, match="unknown"):
                await process(app, message())
            assert where(in_memory) == {"conversation:form:": NAME}

    run_client(main())
    assert [str(error) for error in errors] == [
        "ConversationHandler 'form': a state is of type list, which cannot be stored; take str, "
        "int, bool, float, bytes, tuples of these, or members of an Enum"
    ]


def test_application_handler_stop_sets_its_state_and_ends_the_update(
    api: OfflineBotAPI, in_memory: SessionManager[Any]
) -> None:
    seen = []

    async def stop(_update: Any, _context: Any) -> None:
        raise ext.ApplicationHandlerStop(AGE)

    async def later(update: Any, _context: Any) -> None:
        seen.append(update.effective_message.text)

    form = make({NAME: [on_text(stop)], AGE: [on_text(take_age)]})

    async def main() -> None:
        async with running(api, in_memory, form, on_text(later)) as app:
            await process(app, command("/start"), message(text="Alex"))
            assert where(in_memory) == {"conversation:form:": AGE}
            assert seen == ["/start"]

    run_client(main())


# -- handlers that do not block


def test_the_next_update_waits_for_the_state_of_a_handler_that_does_not_block(
    api: OfflineBotAPI, in_memory: SessionManager[Any]
) -> None:
    gate, seen = [], []

    async def name(update: Any, context: Any) -> object:
        await gate[0]()
        return await take_name(update, context)

    async def wrong(_update: Any, _context: Any) -> None:
        seen.append("waiting")

    states = {
        NAME: [on_text(name, block=False)],
        AGE: [on_text(take_age)],
        ConversationHandler.WAITING: [on_text(wrong)],
    }

    async def main() -> None:
        gate.append(Gate())
        async with running(
            api, in_memory, make(states), build=lambda b: b.concurrent_updates(True)
        ) as app:
            await queue(app, command("/start"))
            later = asyncio.create_task(queue(app, message(text="Alex"), message(text="7")))
            await gate[0].reached()
            assert where(in_memory) == {"conversation:form:": NAME}
            gate[0].open()
            await later
            assert stored(in_memory) == {"name": "Alex", "age": "7"}
            assert seen == []

    run_client(main())


@pytest.mark.parametrize("who", ["handler", "conversation", "defaults"])
def test_whether_it_blocks_is_said_where_ptb_looks(
    who: str, api: OfflineBotAPI, in_memory: SessionManager[Any]
) -> None:
    gate = []

    async def name(update: Any, context: Any) -> object:
        await gate[0]()
        return await take_name(update, context)

    options = {"block": False} if who == "handler" else {}
    form = make(
        {NAME: [on_text(name, **options)], AGE: []},
        **({"block": False} if who == "conversation" else {}),
    )

    def build(builder: Any) -> Any:
        return builder.defaults(ext.Defaults(block=False)) if who == "defaults" else builder

    async def main() -> None:
        gate.append(Gate())
        async with running(api, in_memory, form, build=build) as app:
            await process(app, command("/start"))
            await asyncio.wait_for(process(app, message(text="Alex")), ptb_tools.SOON)
            gate[0].open()
            async with in_memory.session_scope(KEY) as session:  # when its task has ended
                assert session == {"name": "Alex"}
                assert standing_of(session) == {"conversation:form:": AGE}

    run_client(main())


def test_a_handler_that_does_not_block_and_raises_leaves_the_state(
    api: OfflineBotAPI, in_memory: SessionManager[Any]
) -> None:
    async def name(update: Any, context: Any) -> object:
        await take_name(update, context)
        raise FailedError

    form = make({NAME: [on_text(name, block=False)]})

    async def main() -> None:
        async with running(api, in_memory, form) as app:
            app.add_error_handler(returns(None))
            await process(app, command("/start"), message(text="Alex"))
            async with in_memory.session_scope(KEY):
                pass
            assert stored(in_memory) == {"$at": {"conversation:form:": NAME}}

    run_client(main())


# -- after a release


@pytest.mark.parametrize("moves_on", [False, True])
def test_after_a_release_the_state_is_set_unless_the_user_has_moved_on(
    moves_on: bool,
    api: OfflineBotAPI,
    in_memory: SessionManager[Any],
    caplog: pytest.LogCaptureFixture,
) -> None:
    gate = []

    async def name(_update: Any, context: Any) -> object:
        await context.session.arelease()
        await gate[0]()
        return AGE

    form = make({NAME: [on_text(name)], AGE: []}, allow_reentry=True)

    async def main() -> None:
        gate.append(Gate())
        async with running(api, in_memory, form) as app:
            await process(app, command("/start"))
            first = asyncio.create_task(process(app, message(text="Alex")))
            await gate[0].reached()
            if moves_on:
                async with in_memory.session_scope(KEY) as session:
                    form.move(session, "elsewhere")
            gate[0].open()
            await first
            kept = "elsewhere" if moves_on else AGE
            assert where(in_memory) == {"conversation:form:": kept}

    with caplog.at_level(logging.ERROR, "session_sync"):
        run_client(main())
    logged = [record.getMessage() for record in caplog.records if record.name == "session_sync"]
    assert len(logged) == moves_on
    assert not moves_on or "the user stands elsewhere by now" in logged[0]


def test_after_a_release_no_other_session_is_kept_until_the_state_is_set(
    api: OfflineBotAPI, in_memory: SessionManager[Any]
) -> None:
    """The user's next update has the session, and waits for the chat's, which the handler has."""
    chats: SessionManager[Any] = SessionManager(get_storage_key=by_chat)
    gate = []

    async def name(_update: Any, context: Any) -> object:
        await context.session.arelease()
        await gate[0]()
        return AGE

    form = make({NAME: [on_text(name)], AGE: [on_text(returns(END))]})

    async def main() -> None:
        gate.append(Gate())
        app = install(ptb_tools.builder(api), in_memory, chat_session=chats).build()
        app.add_handler(form)
        async with app:
            await app.start()
            await process(app, command("/start"))
            first = asyncio.create_task(process(app, message(text="Alex")))
            await gate[0].reached()
            async with in_memory.session_scope(KEY):  # as that update
                gate[0].open()
                await asyncio.wait_for(first, ptb_tools.SOON)
            await app.stop()  # which waits for the state
        assert where(in_memory) == {"conversation:form:": AGE}

    run_client(main())


# -- nested ones


def make_nested(**options: Any) -> Any:
    child = ConversationHandler(
        [on_text(returns("INSIDE"))],
        {
            "INSIDE": [
                ext.CommandHandler("back", returns("BACK")),
                ext.MessageHandler(ext.filters.Regex("^hi$"), returns("INSIDE")),
            ]
        },
        [ext.CommandHandler("leave", returns(END))],
        name="child",
        map_to_parent={"BACK": NAME, END: END},
        **options,
    )
    states = {NAME: [ext.CommandHandler("down", returns("DOWN"))], "DOWN": [child]}
    return make(states)


def test_a_nested_one_maps_its_states_to_those_around_it(
    api: OfflineBotAPI, in_memory: SessionManager[Any]
) -> None:
    async def main() -> None:
        async with running(api, in_memory, make_nested()) as app:
            await process(app, command("/start"), command("/down"), message())
            inside = {"conversation:form:": "DOWN", "conversation:child:": "INSIDE"}
            assert where(in_memory) == inside
            await process(app, message())
            assert where(in_memory) == inside
            await process(app, command("/back"))
            assert where(in_memory) == {"conversation:form:": NAME}
            await process(app, command("/down"), message(), command("/leave"))
            assert stored(in_memory) is None

    run_client(main())


def test_a_nested_one_that_stops_the_update_tells_the_one_around_it(
    api: OfflineBotAPI, in_memory: SessionManager[Any]
) -> None:
    async def stop(_update: Any, _context: Any) -> None:
        raise ext.ApplicationHandlerStop("BACK")

    seen: list[str] = []

    async def later(update: Any, _context: Any) -> None:
        seen.append(update.effective_message.text)

    child = ConversationHandler([on_text(stop)], {}, [], name="child", map_to_parent={"BACK": "UP"})
    form = make({NAME: [child], "UP": []})

    async def main() -> None:
        async with running(api, in_memory, form, on_text(later)) as app:
            await process(app, command("/start"), message(text="Alex"))
            assert where(in_memory) == {"conversation:form:": "UP"}
            assert seen == ["/start"]

    run_client(main())


# -- beside PTB's own

OUTCOMES = st.sampled_from([None, END, 0, 1, 2, "stop 1", "stop end", "raise"])
COMMANDS = ("a", "b", "c")


@st.composite
def tables(draw: Any, child: bool = True) -> dict[str, Any]:
    """What a conversation does: for each state, fallback and entry point, commands and outcomes."""

    def some() -> dict[str, Any]:
        return draw(st.dictionaries(st.sampled_from(COMMANDS), OUTCOMES, max_size=2))

    return {
        "entry": {"start": 0, **some()},
        "states": {state: some() for state in range(3)},
        "fallbacks": some(),
        "allow_reentry": draw(st.booleans()),
        "child": draw(st.none() | tables(child=False)) if child else None,
        "map": draw(st.dictionaries(st.sampled_from([END, 0, 1]), st.integers(0, 2))),
    }


def conversation_of(kind: Any, table: dict[str, Any], name: str, told: list[Any]) -> Any:
    def handler(place: object, text: str, outcome: Any) -> Any:
        async def callback(_update: Any, context: Any) -> object:
            told.append((name, place, text))
            if kind is ConversationHandler:
                context.session.told = [*context.session.get("told", []), (name, place, text)]
            if outcome == "raise":
                raise FailedError
            if outcome in ("stop 1", "stop end"):
                raise ext.ApplicationHandlerStop(1 if outcome == "stop 1" else END)
            return outcome

        return ext.CommandHandler(text, callback)

    def handlers(place: object, given: dict[str, Any]) -> list[Any]:
        return [handler(place, text, outcome) for text, outcome in given.items()]

    states: dict[Any, Any] = {n: handlers(n, given) for n, given in table["states"].items()}
    if table["child"] is not None:
        states[2].insert(0, conversation_of(kind, table["child"], "child", told))
    return kind(
        handlers("entry", table["entry"]),
        states,
        handlers("fallback", table["fallbacks"]),
        allow_reentry=table["allow_reentry"],
        name=name,
        map_to_parent=table["map"] if name == "child" else None,
    )


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    table=tables(),
    texts=st.lists(st.sampled_from(["start", "start", *COMMANDS]), min_size=3, max_size=12),
)
def test_it_does_what_ptbs_own_does(
    table: dict[str, Any], texts: list[str], api: OfflineBotAPI
) -> None:
    async def run(kind: Any) -> list[Any]:
        told: list[Any] = []
        sessions: SessionManager[Any] = SessionManager()
        app = install(ptb_tools.builder(api), sessions).build()
        app.add_handler(conversation_of(kind, table, "form", told))
        app.add_error_handler(returns(None))
        async with app:
            for text in texts:
                told.append(text)
                await process(app, command(f"/{text}"))
        return told

    assert run_client(run(ConversationHandler)) == run_client(run(ext.ConversationHandler))


# -- per chat, per user, per message


def test_per_chat_alone_it_is_in_the_chats_session(
    api: OfflineBotAPI, in_memory: SessionManager[Any]
) -> None:
    chats: SessionManager[Any] = SessionManager(get_storage_key=by_chat)
    form = make({NAME: [on_text(returns(AGE))], AGE: []}, per_user=False)

    async def main() -> None:
        app = install(ptb_tools.builder(api), in_memory, chat_session=chats).build()
        app.add_handler(form)
        async with app:
            await process(app, command("/start", 1, GROUP), message(2, "Kim", GROUP))
        assert where(chats, "chat:-100") == {"conversation:form:": AGE}
        assert stored(in_memory, "user:1:chat:-100") is None

    run_client(main())


def test_what_the_key_does_not_say_the_name_does(
    api: OfflineBotAPI, in_memory: SessionManager[Any]
) -> None:
    people: SessionManager[Any] = SessionManager(get_storage_key=by_user)

    async def main() -> None:
        async with running(api, people, make_form()) as app:
            await process(app, command("/start"), command("/start", 1, GROUP))
            await process(app, message(1, "Alex", GROUP))
            assert where(people, "user:1") == {
                "conversation:form:1": NAME,
                "conversation:form:-100": AGE,
            }
        async with running(api, people, make_form(name="other", per_chat=False)) as app:
            await process(app, command("/start", 2), message(2, "Kim", GROUP))
            assert where(people, "user:2") == {"conversation:other:": AGE}

    run_client(main())


def test_per_message_each_keyboard_has_one_of_its_own(
    api: OfflineBotAPI, in_memory: SessionManager[Any]
) -> None:
    form = ConversationHandler(
        [ext.CallbackQueryHandler(returns("PRESSED"))],
        {"PRESSED": [ext.CallbackQueryHandler(returns(END))]},
        [],
        name="form",
        per_message=True,
    )

    async def main() -> None:
        async with running(api, in_memory, form) as app:
            first, second = callback_query(), callback_query()
            await process(app, first, second)
            numbers = [u["callback_query"]["message"]["message_id"] for u in (first, second)]
            assert where(in_memory) == {
                f"conversation:form:{number}": "PRESSED" for number in numbers
            }
            await process(app, first)
            assert where(in_memory) == {f"conversation:form:{numbers[1]}": "PRESSED"}
            async with in_memory.session_scope(KEY) as session:
                assert form.state(session, message=numbers[1]) == "PRESSED"

    run_client(main())


def test_what_is_in_no_conversation_is_left_to_others(
    api: OfflineBotAPI, in_memory: SessionManager[Any]
) -> None:
    seen = []

    async def later(update: Any, _context: Any) -> None:
        seen.append(update.update_id)

    post = message(text="news")
    post["channel_post"] = post.pop("message")
    form = ConversationHandler([ext.TypeHandler(telegram.Update, returns(NAME))], {}, [], name="a")

    async def main() -> None:
        async with running(api, in_memory, form) as app:
            app.add_handler(ext.TypeHandler(telegram.Update, later))
            await process(app, post)
        assert seen == [post["update_id"]]

    run_client(main())


def test_a_key_that_several_users_share_tells_their_conversations_apart(
    api: OfflineBotAPI,
) -> None:
    """It says nothing of these two users, and of all others who they are."""
    shared: SessionManager[Any] = SessionManager(
        get_storage_key=lambda update: (
            "family" if update.effective_user.id > 99 else str(update.effective_user.id)
        )
    )

    async def main() -> None:
        async with running(api, shared, make_form()) as app:
            await process(app, command("/start", 100, GROUP), message(200, "Kim", GROUP))
            assert where(shared, "family") == {"conversation:form:-100:100": NAME}

    run_client(main())


def test_names_with_colons_are_told_apart(
    api: OfflineBotAPI, in_memory: SessionManager[Any]
) -> None:
    people: SessionManager[Any] = SessionManager(get_storage_key=by_user)

    async def main() -> None:
        async with running(api, people, make_form(), make_form(name="form:-100")) as app:
            await process(app, command("/start", 1, GROUP))
            assert set(where(people, "user:1")) == {
                "conversation:form:-100",
                "conversation:form%3A-100:-100",
            }

    run_client(main())


# -- states


class Step(Enum):
    NAME = 1
    AGE = ("no", "state")


class Number(IntEnum):
    NAME = 0
    AGE = 1


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("a", "b"),
        (0, 1),
        (True, False),
        (0.5, 1.5),
        (b"a", b"b"),
        (("a", 1), ("a", (2, "b"))),
        (Step.NAME, Step.AGE),
        (Number.NAME, Number.AGE),
        ((Step.NAME, 1), (Step.NAME, 2)),
        ("", None),
    ],
    ids=repr,
)
def test_states_come_back_as_they_are(
    first: Any, second: Any, api: OfflineBotAPI, tmp_path: Path
) -> None:
    form = make({first: [on_text(returns(second))], **({} if second is None else {second: []})})

    async def main() -> None:
        with closing(SQLiteStorage(tmp_path / "s.db")) as storage:
            sessions: SessionManager[Any] = SessionManager(storage=storage)
            async with running(api, sessions, form) as app:
                await process(app, command("/start"))
                async with sessions.session_scope(KEY) as session:
                    assert form.state(session) is first or form.state(session) == first
                await process(app, message())
                async with sessions.session_scope(KEY) as session:
                    kept = first if second is None else second
                    assert form.state(session) == kept
                    assert type(form.state(session)) is type(kept)

    run_client(main())


def test_a_state_can_be_added_later(api: OfflineBotAPI, in_memory: SessionManager[Any]) -> None:
    form = make({NAME: [on_text(returns("LATER"))]})
    form.states["LATER"] = [on_text(returns(END))]

    async def main() -> None:
        async with running(api, in_memory, form) as app:
            await process(app, command("/start"), message())
            assert where(in_memory) == {"conversation:form:": "LATER"}
            await process(app, message())
            assert stored(in_memory) is None

    run_client(main())


def test_what_another_program_has_stored_is_left_by_an_entry_point(
    api: OfflineBotAPI, in_memory: SessionManager[Any]
) -> None:
    in_memory.storage.set(KEY, {"$at": {"conversation:form:": ["no", "state"]}})

    async def main() -> None:
        async with running(api, in_memory, make_form()) as app:
            await process(app, message())
            await process(app, command("/start"))
            assert where(in_memory) == {"conversation:form:": NAME}

    run_client(main())


def test_a_number_stands_for_the_member_that_it_equals(
    api: OfflineBotAPI, in_memory: SessionManager[Any]
) -> None:
    form = make({Number.NAME: [on_text(returns(1))], Number.AGE: [on_text(returns(END))]})

    async def main() -> None:
        async with running(api, in_memory, form) as app:
            await process(app, command("/start"), message())
            async with in_memory.session_scope(KEY) as session:
                assert form.state(session) is Number.AGE
            await process(app, message())
            assert stored(in_memory) is None

    run_client(main())


def test_from_outside_a_user_can_be_moved(
    api: OfflineBotAPI, in_memory: SessionManager[Any]
) -> None:
    form = make_form()

    async def main() -> None:
        async with running(api, in_memory, form) as app:
            async with in_memory.session_scope(KEY) as session:
                assert form.state(session) is None
                form.move(session, AGE)
                assert form.state(session) == AGE
                with pytest.raises(TypeError, match="type object"):
                    form.move(session, object())
                with pytest.raises(ValueError, match="needs no IDs besides the session, not chat"):
                    form.state(session, chat=1)
            await process(app, message(text="7"))
            assert stored(in_memory) == {"age": "7"}
            async with in_memory.session_scope(KEY) as session:
                form.move(session, NAME)
                form.move(session, END)
                assert form.state(session) is None

    run_client(main())


# -- refused


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"name": None}, ValueError, "needs a name"),
        ({"persistent": True}, ValueError, "leave persistent=True away"),
        ({"conversation_timeout": 5}, NotImplementedError, "not available yet"),
        ({"states": {frozenset(): []}}, TypeError, "of type frozenset"),
        ({"states": {1: [], (1, object()): []}}, TypeError, "of type object"),
        ({"states": {Step.NAME: [], ("enum", "Step", "NAME"): []}}, ValueError, "stored alike"),
        (
            {"fallbacks": [ext.ConversationHandler([], {}, [], name="own")]},
            TypeError,
            "import that one from session_sync.ptb",
        ),
    ],
    ids=lambda value: str(value)[:20],
)
def test_what_cannot_work_is_refused_at_once(
    options: dict[str, Any], error: type[Exception], words: str
) -> None:
    given = {"entry_points": [], "states": {}, "fallbacks": [], "name": "form", **options}
    with pytest.raises(error, match=words):
        ConversationHandler(**given)


def test_two_of_one_name_are_refused(api: OfflineBotAPI, in_memory: SessionManager[Any]) -> None:
    app = install(ptb_tools.builder(api), in_memory).build()
    app.add_handler(make_nested())
    with pytest.raises(ValueError, match="two ConversationHandlers have the name 'child'"):
        app.add_handler(make({}, returns(None), name="child"))
    app.add_handlers([make({}, returns(None), name="other")])


def test_one_that_was_removed_gives_up_its_name(
    api: OfflineBotAPI, in_memory: SessionManager[Any]
) -> None:
    app = install(ptb_tools.builder(api), in_memory).build()
    form = make_nested()
    app.add_handler(form)
    app.remove_handler(form)
    app.add_handler(make({}, returns(None), name="child"))
    with pytest.raises(ValueError, match="'child'"):
        app.add_handler(form)
    app.add_handler(make_form())  # whose name has not been taken by what was refused


def test_one_is_for_the_sessions_of_one_application(
    api: OfflineBotAPI, in_memory: SessionManager[Any]
) -> None:
    form = make_form()
    for _ in range(2):
        install(ptb_tools.builder(api), in_memory).build().add_handler(form)
    other = install(ptb_tools.builder(api), SessionManager()).build()
    with pytest.raises(ValueError, match="'form' was added to another application"):
        other.add_handler(form)


def test_a_key_function_that_fails_is_named(api: OfflineBotAPI) -> None:
    app = install(
        ptb_tools.builder(api), SessionManager(get_storage_key=lambda u: u.message.contact.user_id)
    ).build()
    with pytest.raises(ValueError, match=r"get_storage_key raised AttributeError.*made up"):
        app.add_handler(make_form())


def test_topics_have_no_conversation_in_common(
    api: OfflineBotAPI, in_memory: SessionManager[Any]
) -> None:
    chats: SessionManager[Any] = SessionManager(get_storage_key=by_topic)
    app = install(ptb_tools.builder(api), in_memory, chat_session=chats).build()
    with pytest.raises(ValueError, match="different sessions"):
        app.add_handler(make_form(per_user=False))


@pytest.mark.parametrize("wanted", ["per_chat", "per_user"])
def test_without_a_session_that_fits_it_is_refused(
    wanted: str, api: OfflineBotAPI, in_memory: SessionManager[Any]
) -> None:
    other = {"per_chat": "per_user", "per_user": "per_chat"}[wanted]
    app = install(ptb_tools.builder(api), in_memory).build()
    by = {"per_chat": "by_chat", "per_user": "by_user"}[wanted]
    with pytest.raises(ValueError, match=rf"different sessions.*get_storage_key={by}"):
        app.add_handler(make_form(**{other: False}))


def test_a_lazy_manager_is_refused(api: OfflineBotAPI) -> None:
    app = install(ptb_tools.builder(api), SessionManager(lazy=True)).build()
    with pytest.raises(ValueError, match="without lazy=True"):
        app.add_handler(make_form())


async def errors_of(app: Any, update: dict[str, Any]) -> list[str]:
    """What the error handlers are told."""
    errors = []

    async def note(_update: Any, context: Any) -> None:
        errors.append(str(context.error))

    app.add_error_handler(note)
    await process(app, update)
    return errors


def test_without_install_the_first_update_says_so(api: OfflineBotAPI) -> None:
    async def main() -> None:
        app = ptb_tools.builder(api).build()
        app.add_handler(make_form())
        async with app:
            (error,) = await errors_of(app, command("/start"))
        assert "added to an application without sessions" in error
        assert "build the application with session_sync.ptb.install" in error

    run_client(main())


def test_an_update_without_a_key_has_no_state(api: OfflineBotAPI) -> None:
    sessions: SessionManager[Any] = SessionManager(get_storage_key=lambda _update: None)

    async def main() -> None:
        async with running(api, sessions, make_form()) as app:
            seen = []

            async def plain(update: Any, _context: Any) -> None:
                seen.append(update.effective_message.text)

            app.add_handler(on_text(plain))
            (error,) = await errors_of(app, command("/start"))
            await process(app, message(text="for another handler"))
        assert "this Update belongs to no session" in error
        assert seen == ["for another handler"]

    run_client(main())
