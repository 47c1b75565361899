"""Reads what a pickle says, and does nothing of it: no call, no import, no attribute, no hash.

A pickle is a program, and `pickle.Unpickler` runs it. A `find_class` that knows only harmless names
does not stop that: what it lets through is still called, with arguments of the file's choice
(`bytearray(10**12)`, `UUID.__setstate__`, `ZoneInfo` with any path), BUILD sets attributes on what
it returned, classes included, the EXT opcodes find what another module has registered without
asking it, a memo index or a length makes the C code reserve gigabytes, and a key of nested tuples
is hashed until the stack is full or forever.

So this is a machine of its own, on the parser of `pickletools`. Numbers, texts, bytes, lists and
tuples become what they are. All else, dicts and sets included, becomes a `Thing`: the name of what
would have been called, and what it would have been given. What a name means is for the reader of
the Things to know (`plain.py`); none is looked up here.

Most instructions make no more than their bytes in the file are worth. Those that copy what others
have made could make gigabytes of half a megabyte, so what they copy is paid from a `Budget`.
"""

from __future__ import annotations

from collections.abc import Callable
from pickletools import genops
from sys import getsizeof
from typing import Any, Final

# What the parser raises, or a stack that is not as it should be. All else comes from outside.
_DAMAGED: Final = (
    ValueError,
    TypeError,
    LookupError,
    ArithmeticError,
    AttributeError,
    EOFError,
    RecursionError,
)

PERSISTENT: Final = "<persistent id>"  # the name of a Thing that the writer keeps elsewhere


class ExhaustedError(Exception):
    """More was to be made of a file than its size allows."""


class Budget:
    """How many bytes may be made of a file of `size` bytes by copying what it has once.

    What is copied and thrown away again counts, too, so this bounds the time as well.
    """

    def __init__(self, size: int) -> None:
        self._size: Final = size
        self._most: Final = _SPARE + _TIMES * size
        self._left = self._most

    def spend(self, size: int) -> None:
        """Pay for `size` bytes, or raise ExhaustedError."""
        self._left -= size
        if self._left < 0:
            raise ExhaustedError(
                f"would make more than {self._most >> 20} MB of its {self._size} bytes, by "
                f"repeating them: no bot writes such a file"
            )


# Of what bots store, the most is repeated where all users have the same long text, which a pickle
# has once.
_SPARE: Final = 64 * 2**20
_TIMES: Final = 64


class Global:
    """The name of a class or function. That is all of it: nothing is imported."""

    __slots__ = ("name",)

    def __init__(self, name: str) -> None:
        self.name: Final = name


class Thing:
    """An object as a pickle describes it.

    `name` is that of its class, or of the function that would make it of `args`; `state` is what it
    would be told of itself afterwards (BUILD), None: nothing. `content` is what would be put into
    it: members, or pairs of a key and a value.
    """

    __slots__ = ("args", "content", "name", "state")

    def __init__(self, name: str, args: tuple[Any, ...] = ()) -> None:
        self.name: Final = name
        self.args: Final = args
        self.state: Any = None
        self.content: Final[list[Any]] = []


def read_pickle(data: bytes) -> Any:
    """What the first pickle in `data` describes.

    Returns None, a bool, an int, a float, a str, bytes, a bytearray, a list or tuple of such, a
    `Global` or a `Thing`. What contains itself there contains itself here.

    Raises ValueError, with the number of the byte, if `data` is no pickle of Python 3, or takes far
    more memory or time than its size allows.

    >>> import pickle
    >>> class Evil:
    ...     def __reduce__(self):
    ...         return eval, ("print('evil')",)
    >>> thing = read_pickle(pickle.dumps([1, Evil()]))[1]
    >>> thing.name, thing.args
    ('builtins.eval', ("print('evil')",))
    """
    machine, at = _Machine(Budget(len(data))), 0
    try:
        for opcode, argument, position in genops(data):
            at = position or 0
            if opcode.name == "STOP":
                return machine.stack.pop()
            _ACTIONS[opcode.name](machine, argument)
    except _DAMAGED as error:
        what = f"cannot be read at byte {at} ({type(error).__name__})"
        raise ValueError(f"{what}: damaged, cut off, or no pickle of Python 3") from None
    except ExhaustedError as error:
        raise ValueError(f"{error} (at byte {at})") from None
    raise AssertionError(
        "the parser ends with a STOP or raises"
    )  # pragma: no cover - for type checkers


class _Machine:
    def __init__(self, budget: Budget) -> None:
        self._budget: Final = budget
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}  # a dict: the indices are the file's, and may be anything
        self._below: Final[list[list[Any]]] = []  # the stacks under the marks

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def mark(self, _argument: object) -> None:
        self._below.append(self.stack)
        self.stack = []

    def since_mark(self) -> list[Any]:
        items, self.stack = self.stack, self._below.pop()
        return items

    def last(self, count: int) -> list[Any]:
        if len(self.stack) < count:
            raise IndexError
        items = self.stack[-count:]
        del self.stack[-count:]
        return items

    # -- the stack itself

    def pop(self, _argument: object) -> None:
        if self.stack:
            self.stack.pop()
        else:
            self.since_mark()

    def pop_mark(self, _argument: object) -> None:
        self.since_mark()

    def dup(self, _argument: object) -> None:
        self.push(self.stack[-1])

    def put(self, index: int) -> None:
        self.memo[index] = self.stack[-1]

    def memoize(self, _argument: object) -> None:
        self.memo[len(self.memo)] = self.stack[-1]

    def get(self, index: int) -> None:
        self.push(self.memo[index])

    # -- containers

    def append(self, _argument: object) -> None:
        self._fill(self.last(1))

    def appends(self, _argument: object) -> None:
        self._fill(self.since_mark())

    def set_item(self, _argument: object) -> None:
        self._fill(_pairs(self.last(2)))

    def set_items(self, _argument: object) -> None:
        self._fill(_pairs(self.since_mark()))

    def _fill(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if type(target) is list:
            target.extend(items)
        elif type(target) is Thing:
            target.content.extend(items)
        else:
            raise TypeError

    # -- objects

    def make_global(self, argument: str) -> None:
        module, _, name = argument.partition(" ")
        self.push(self._global(module, name))

    def make_stack_global(self, _argument: object) -> None:
        self.push(self._global(*self.last(2)))

    def make_extension(self, code: int) -> None:
        self.push(Global(f"copyreg.extension_{code}"))

    def persistent(self, argument: object) -> None:
        self.push(Thing(PERSISTENT))

    def persistent_from_stack(self, _argument: object) -> None:
        self.stack[-1] = Thing(PERSISTENT)

    def call(self, _argument: object) -> None:
        function, args = self.last(2)
        self.push(self._described(function, args))

    def new_with_names(self, _argument: object) -> None:
        cls, args, named = self.last(3)
        self.push(self._described(cls, self._copied((*args, named))))

    def instance(self, argument: str) -> None:
        args = self.since_mark()
        self.make_global(argument)
        self.push(self._described(self.stack.pop(), tuple(args)))

    def instance_from_stack(self, _argument: object) -> None:
        cls, *args = self.since_mark()
        self.push(self._described(cls, tuple(args)))

    def build(self, _argument: object) -> None:
        (state,) = self.last(1)
        target = self.stack[-1]
        if type(target) is not Thing:
            raise TypeError
        target.state = state

    # -- what copies, and has to be paid for

    def _global(self, module: object, name: object) -> Global:
        if type(module) is not str or type(name) is not str:
            raise TypeError
        return self._named(_MODULES.get(module, module), name)

    def _named(self, owner: str, name: str) -> Global:
        full = f"{owner}.{name}"
        self._budget.spend(getsizeof(full))
        return Global(full)

    def _copied(self, args: tuple[Any, ...]) -> tuple[Any, ...]:
        self._budget.spend(getsizeof(args))
        return args

    def _described(self, function: object, args: object) -> Global | Thing:
        if not isinstance(function, Global | Thing) or type(args) is not tuple:
            raise TypeError
        name = function.name
        if args and type(args[0]) is Global:
            if name in _CONSTRUCTORS:
                rest = self._copied(args[2:])
                return Thing(args[0].name, tuple(arg for arg in rest if arg is not None))
            if name == "builtins.getattr" and len(args) == 2 and type(args[1]) is str:
                return self._named(args[0].name, args[1])  # how old protocols write a nested name
        return Thing(name, args)


# Python 2's names, which protocols 0 to 2 are written with.
_MODULES: Final = {"__builtin__": "builtins", "copy_reg": "copyreg"}

# Functions that make an object of the class which they are given first: its name says more.
_CONSTRUCTORS: Final = frozenset(
    ("copyreg._reconstructor", "telegram.ext._picklepersistence._reconstruct_to")
)


def _pairs(items: list[Any]) -> list[tuple[Any, Any]]:
    return list(zip(items[::2], items[1::2], strict=True))


def _thing(name: str, content: list[Any]) -> Thing:
    thing = Thing(name)
    thing.content.extend(content)
    return thing


_Action = Callable[[_Machine, Any], None]

_NUMBERS: Final = (
    *("INT", "BININT", "BININT1", "BININT2"),
    *("LONG", "LONG1", "LONG4"),
    *("FLOAT", "BINFLOAT"),
)
_TEXTS: Final = (
    *("UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"),
    *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"),
)

# What is missing here is refused: STRING and its like, which only Python 2 writes, and buffers that
# lie outside of the file.
_ACTIONS: Final[dict[str, _Action]] = {
    **dict.fromkeys(_NUMBERS + _TEXTS, _Machine.push),
    "PROTO": lambda machine, argument: None,
    "FRAME": lambda machine, argument: None,  # a length that nothing here relies on
    "NONE": lambda machine, argument: machine.push(None),
    "NEWTRUE": lambda machine, argument: machine.push(True),
    "NEWFALSE": lambda machine, argument: machine.push(False),
    "MARK": _Machine.mark,
    "POP": _Machine.pop,
    "POP_MARK": _Machine.pop_mark,
    "DUP": _Machine.dup,
    **dict.fromkeys(("PUT", "BINPUT", "LONG_BINPUT"), _Machine.put),
    "MEMOIZE": _Machine.memoize,
    **dict.fromkeys(("GET", "BINGET", "LONG_BINGET"), _Machine.get),
    "EMPTY_LIST": lambda machine, argument: machine.push([]),
    "LIST": lambda machine, argument: machine.push(machine.since_mark()),
    "APPEND": _Machine.append,
    "APPENDS": _Machine.appends,
    "EMPTY_TUPLE": lambda machine, argument: machine.push(()),
    "TUPLE": lambda machine, argument: machine.push(tuple(machine.since_mark())),
    "TUPLE1": lambda machine, argument: machine.push(tuple(machine.last(1))),
    "TUPLE2": lambda machine, argument: machine.push(tuple(machine.last(2))),
    "TUPLE3": lambda machine, argument: machine.push(tuple(machine.last(3))),
    "EMPTY_DICT": lambda machine, argument: machine.push(Thing("builtins.dict")),
    "DICT": lambda machine, argument: machine.push(
        _thing("builtins.dict", _pairs(machine.since_mark()))
    ),
    "SETITEM": _Machine.set_item,
    "SETITEMS": _Machine.set_items,
    "EMPTY_SET": lambda machine, argument: machine.push(Thing("builtins.set")),
    "ADDITEMS": _Machine.appends,
    "FROZENSET": lambda machine, argument: machine.push(
        _thing("builtins.frozenset", machine.since_mark())
    ),
    "GLOBAL": _Machine.make_global,
    "STACK_GLOBAL": _Machine.make_stack_global,
    **dict.fromkeys(("EXT1", "EXT2", "EXT4"), _Machine.make_extension),
    "PERSID": _Machine.persistent,
    "BINPERSID": _Machine.persistent_from_stack,
    "REDUCE": _Machine.call,
    "NEWOBJ": _Machine.call,
    "NEWOBJ_EX": _Machine.new_with_names,
    "INST": _Machine.instance,
    "OBJ": _Machine.instance_from_stack,
    "BUILD": _Machine.build,
}
