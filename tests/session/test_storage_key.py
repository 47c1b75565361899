"""`StorageKey`: a key as a value, and as the string that is stored."""

from __future__ import annotations

import copy
import pickle
from contextlib import suppress
from dataclasses import FrozenInstanceError
from typing import Any

import pytest
import telegram
from hypothesis import given
from hypothesis import strategies as st
from telegram.constants import ChatID

from session_sync.session.keys import StorageKey

ids = st.integers(-(2**63), 2**63 - 1)

# Texts that are made of what the format is made of find a mix-up sooner.
texts = st.text() | st.lists(
    st.sampled_from(["user", "chat", "thread", "business", "key", ":", "%", "3A", "25", "1", "-"])
).map("".join)

storage_keys = st.fixed_dictionaries(
    {},
    optional={"user": ids, "chat": ids, "thread": ids, "business": texts, "key": texts},
).filter(bool)


class TestStorageKey:
    @given(storage_keys)
    def test_parse_is_the_inverse_of_str(self, parts: dict[str, Any]) -> None:
        key = StorageKey(**parts)
        assert StorageKey.parse(str(key)) == key

    @given(storage_keys, storage_keys)
    def test_two_different_keys_never_have_the_same_text(
        self, parts: dict[str, Any], others: dict[str, Any]
    ) -> None:
        key, other = StorageKey(**parts), StorageKey(**others)
        assert (str(key) == str(other)) == (key == other)

    @given(
        st.lists(
            st.sampled_from(
                ["user:", "chat:", "thread:", "business:", "key:", ":", "1", "0", "-", "%", "%3A"]
            )
        ).map("".join)
        | st.text()
    )
    def test_parse_takes_only_what_a_key_prints(self, text: str) -> None:
        with suppress(ValueError):
            assert str(StorageKey.parse(text)) == text

    def test_the_order_of_the_parts_is_fixed(self) -> None:
        key = StorageKey(key="e", business="d", thread=3, chat=-2, user=1)
        assert str(key) == "user:1:chat:-2:thread:3:business:d:key:e"

    @pytest.mark.parametrize(
        ("key", "text"),
        [
            (StorageKey(key=""), "key:"),
            (StorageKey(business=""), "business:"),
            (StorageKey(business="", key=""), "business::key:"),
            (StorageKey(business="a:key:b"), "business:a%3Akey%3Ab"),
            (StorageKey(business="a", key="b"), "business:a:key:b"),
            (StorageKey(business="%3A"), "business:%253A"),
            (StorageKey(user=1, key="chat:2\n:%"), "user:1:key:chat:2\n:%"),
            (StorageKey(user=0), "user:0"),
        ],
    )
    def test_awkward_values(self, key: StorageKey, text: str) -> None:
        assert str(key) == text
        assert StorageKey.parse(text) == key

    @pytest.mark.parametrize(
        "text",
        [
            *("", ":", "user", "user:", "user:x", "user:+1", "user:01", "user:-0", "user: 1"),
            *("user:1 ", "user:1_0", "user:١", "user:1.0", "user:1\n", ":user:1", "user:1:"),  # noqa: RUF001
            *("chat:1:user:2", "user:1:user:2", "user:1chat:2", "user:1::chat:2", "name:1"),
            *("USER:1", "business:%", "business:%3a", "business:%41", "business:a:b"),
            *(f"user:{2**63}", f"user:{'9' * 5000}", "user:None"),
        ],
    )
    def test_parse_refuses_any_other_text(self, text: str) -> None:
        with pytest.raises(ValueError, match="is not the string of a StorageKey"):
            StorageKey.parse(text)

    def test_a_key_needs_a_part(self) -> None:
        with pytest.raises(ValueError, match="at least one part"):
            StorageKey()

    @pytest.mark.parametrize("name", ["user", "chat", "thread"])
    @pytest.mark.parametrize("value", ["7", True, 7.0, b"7"])
    def test_an_id_that_is_no_int_is_refused(self, name: str, value: object) -> None:
        with pytest.raises(TypeError, match=rf"StorageKey\({name}=...\) takes an int"):
            StorageKey(**{name: value})  # type: ignore[arg-type]

    @pytest.mark.parametrize("value", [2**63, -(2**63) - 1])
    def test_an_id_that_no_store_can_hold_is_refused(self, value: int) -> None:
        with pytest.raises(ValueError, match="64 bits"):
            StorageKey(user=value)

    @pytest.mark.parametrize("name", ["business", "key"])
    @pytest.mark.parametrize("value", [7, b"7", False])
    def test_a_text_that_is_no_str_is_refused(self, name: str, value: object) -> None:
        with pytest.raises(TypeError, match=rf"StorageKey\({name}=...\) takes a str"):
            StorageKey(**{name: value})  # type: ignore[arg-type]

    def test_an_enum_counts_as_its_value(self) -> None:
        key = StorageKey(user=ChatID.ANONYMOUS_ADMIN, key=telegram.constants.ChatType.PRIVATE)
        assert (type(key.user), type(key.key)) == (int, str)
        assert str(key) == "user:1087968824:key:private"

    def test_positions_are_not_taken(self) -> None:
        with pytest.raises(TypeError):
            StorageKey(7)  # type: ignore[misc]

    def test_a_key_does_not_change(self) -> None:
        key = StorageKey(user=7)
        with pytest.raises(FrozenInstanceError):
            key.user = 8  # type: ignore[misc]
        assert not hasattr(key, "__dict__")

    def test_a_key_is_a_value(self) -> None:
        key = StorageKey(user=7, chat=8)
        assert {key: "found"}[StorageKey(chat=8, user=7)] == "found"
        for twin in (pickle.loads(pickle.dumps(key)), copy.copy(key), copy.deepcopy(key)):
            assert twin == key
        assert repr(key) == "StorageKey(user=7, chat=8)"
