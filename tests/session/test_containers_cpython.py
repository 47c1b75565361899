"""CPython's own tests of dict, list and set, run on what a session hands out.

A container goes into a session, the session is closed and opened again, and the test gets what
comes out. A test is left out, with its reason, only if it is about the type itself.
"""

from __future__ import annotations

import itertools
import unittest
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, ClassVar

import pytest

from session_sync import SessionManager
from session_sync.session.containers import SessionDict, SessionList, SessionSet

pytest.importorskip("test.mapping_tests", reason="CPython's `test` package is not installed")

from test import list_tests, mapping_tests, test_set

_keys = map(str, itertools.count(1))


class OutOfASession:
    """Stands for the type under test: called like it, gives the container that a session has."""

    def __init__(self, plain: type, handed_out: type) -> None:
        self.plain = plain
        self.handed_out = handed_out
        self.sessions = SessionManager()
        self.opened = ExitStack()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        key = next(_keys)
        with self.sessions.session_scope(key) as session:
            session["it"] = self.plain(*args, **kwargs)
        scope = self.sessions.session_scope(key)
        session = scope.__enter__()
        # What a test leaves behind (itself inside itself, say) need not be fit to be stored.
        self.opened.callback(scope.__exit__, KeyError, KeyError(), None)
        container = session["it"]
        assert type(container) is self.handed_out
        return container

    def __mro_entries__(self, bases: tuple[object, ...]) -> tuple[type]:
        return (self.handed_out,)  # class A(type2test)

    def fromkeys(self, *args: Any) -> Any:
        return self(self.plain.fromkeys(*args))  # type: ignore[attr-defined]


class HandedOut(unittest.TestCase):
    plain: ClassVar[type]
    handed_out: ClassVar[type]
    basetype: ClassVar[type]

    def setUp(self) -> None:
        self.type2test = self.thetype = OutOfASession(self.plain, self.handed_out)
        self.addCleanup(self.type2test.opened.close)
        super().setUp()


def without(**reasons: str) -> Callable[[type], type]:
    """Leave out the tests of these names (some of which not every Python version has)."""

    def leave_out(cls: type) -> type:
        for name in reasons:
            setattr(cls, name, None)
        return cls

    return leave_out


@without(
    test_copy="wants a copy to be of the same type: ours are plain",
    test_fromkeys="wants a subclass to make its like: ours makes plain dicts",
    test_repr_deep="nests so deep that the session refuses it",
)
class TestDict(HandedOut, mapping_tests.TestHashMappingProtocol):
    plain, handed_out = dict, SessionDict


@without(test_repr_deep="nests so deep that the session refuses it")
class TestList(HandedOut, list_tests.CommonTest):
    plain, handed_out = list, SessionList


@without(
    test_pickling="wants attributes of a subclass in its pickle: ours are plain sets",
    test_weakref="wants its set to be gone when nobody holds it: the session does",
    test_cyclical_repr="wants the type's name in the repr of a set that contains itself",
)
class TestSet(HandedOut, test_set.TestSet):
    plain, handed_out, basetype = set, SessionSet, set


class SetOfSession(HandedOut):
    """For tests that make their sets themselves: those are replaced by a session's."""

    plain, handed_out = set, SessionSet

    def setUp(self) -> None:
        super().setUp()
        for name, value in list(vars(self).items()):
            if type(value) is set:
                setattr(self, name, self.type2test(value))


def _set_tests() -> dict[str, type]:
    """One class for each of CPython's that makes sets in its setUp."""
    names = [
        *("Empty", "Singleton", "Tuple", "Triple", "String", "Bytes", "MixedStringBytes"),
    ]
    found = [getattr(test_set, f"TestBasicOps{name}") for name in names]
    found += [
        getattr(test_set, f"TestOnlySets{name}")
        for name in ("Numeric", "Dict", "Operator", "Tuple", "String", "Generator")
    ]
    found += [
        getattr(test_set, f"TestCopying{name}")
        for name in ("Empty", "Singleton", "Triple", "Tuple", "Nested")
    ]
    found += [test_set.TestBinaryOps, test_set.TestUpdateOps, test_set.TestMutate]
    found += [test_set.TestIdentities]
    classes: dict[str, type] = {}
    for theirs in found:
        body = {"__module__": __name__, "__qualname__": theirs.__name__}
        classes[theirs.__name__] = type(theirs.__name__, (SetOfSession, theirs), body)
    return classes


globals().update(_set_tests())


class SubclassOfSetsInASession(HandedOut):
    plain, handed_out = set, SessionSet

    def constructor1(self, *args: Any) -> Any:
        return self.type2test(*args)

    constructor2 = constructor1


class TestBinaryOpsMutating(
    SubclassOfSetsInASession, test_set.TestBinaryOpsMutating, unittest.TestCase
):
    """A set that changes while it is compared does no harm."""


class TestMethodsMutating(
    SubclassOfSetsInASession, test_set.TestMethodsMutating, unittest.TestCase
):
    """A set that changes while a method of it runs does no harm."""


class OpenSessions:
    """Stands for Session as a type under test: each call gives an empty open session."""

    def __init__(self) -> None:
        self.sessions = SessionManager()
        self.opened = ExitStack()

    def __call__(self) -> Any:
        return self.opened.enter_context(self.sessions.session_scope(next(_keys)))


class TestSession(mapping_tests.BasicTestMappingProtocol):
    def setUp(self) -> None:
        self.type2test = OpenSessions()
        self.addCleanup(self.type2test.opened.close)
