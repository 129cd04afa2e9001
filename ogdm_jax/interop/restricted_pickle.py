"""A pickle reader that can only build inert data.

The standard unpickler is a small machine whose GLOBAL and REDUCE instructions import and call
whatever the file names. Here the standard library's pickletools takes the instructions apart, which
acts on none of them, and this machine carries them out: it imports nothing, and calls only
functions that its caller listed (`Admit`), so a file cannot run code by construction. Memory is
bounded by the file's size: declared lengths are compared with the bytes that are left before
anything is allocated, byte strings are views into the file, one Budget for the whole file limits
the instructions and what calls may copy, and only plain scalars may be dictionary keys (hashing a
tuple of tuples that share memory takes exponential time).
"""

import pickletools
import struct
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import IO, Any, cast

from ogdm_jax.interop.inert import (
    MAX_INSTRUCTIONS,
    Budget,
    Global,
    Inert,
    Module,
    UnsafeFileError,
    quote,
    scalar,
)

MAX_INT_BYTES = 64  # of an integer
MAX_LINE = 4096  # bytes of a line of text
# entries of the memo: the format's own limit in binary. Numbers written as text have none, and
# could be keys that all collide.
MAX_MEMO = 2**32
_PER_ITEM = 100  # bytes of an item of a dictionary or set, about
_PER_REFERENCE = 8  # bytes
_PER_LETTER = 2  # bytes of a long line: texts of protocol 0 hold bytes
_VIEWED = b"BC\x8e"  # instructions whose argument is a byte string
_MARK = object()

Admit = Callable[[str, str], Any]
Persistent = Callable[[Any], Any]


def _type(value: Any) -> str:
    return f"type {type(value).__name__}"


def _weight(value: Any) -> int:
    """Bytes that a call may spend on an argument; what lies deeper in it is only referred to."""
    if isinstance(value, str | bytes | memoryview):
        return len(value)
    return _PER_ITEM * len(value) if isinstance(value, list | tuple | dict | set | frozenset) else 0


def load(
    data: memoryview, start: int, admit: Admit, budget: Budget, persistent: Persistent | None = None
) -> tuple[Any, int]:
    """Reads the one pickle that begins at data[start].

    Args:
      data: the file.
      start: bytes in front of the pickle.
      admit: (module, name) -> what stands for that global: a Global, or a value of its own.
      budget: of the whole file.
      persistent: resolves torch's references to storages; None: there are none.

    Returns:
      The object, and the position after the pickle's last instruction.

    Raises:
      UnsafeFileError: an instruction, global or length that is not admitted, or a used-up budget.
    """
    machine = _Machine(data, start, admit, budget, persistent)
    try:
        with warnings.catch_warnings():  # of an escape in a text that means nothing, and stays
            warnings.simplefilter("ignore", DeprecationWarning)
            return machine.run(), machine.at
    except UnsafeFileError:
        raise
    except (IndexError, KeyError) as error:  # a pop from an empty stack, a memo entry never written
        raise UnsafeFileError("its pickle is corrupt: an instruction finds no operand") from error
    except (
        TypeError,
        ValueError,
        AttributeError,
        ArithmeticError,
        RecursionError,
        MemoryError,
        struct.error,
    ) as error:
        raise UnsafeFileError(f"its pickle is corrupt ({quote(str(error))})") from error


@dataclass
class _Machine:
    """The state of one pickle while it is read; the methods are its instructions."""

    data: memoryview
    at: int
    admit: Admit
    budget: Budget
    persistent: Persistent | None
    stack: list = field(default_factory=list)
    memo: dict[int, Any] = field(default_factory=dict)
    code: bytes = b""

    def run(self) -> Any:
        for instruction, argument, _ in pickletools.genops(cast(IO[bytes], self)):
            self.budget.instructions -= 1
            if self.budget.instructions < 0:
                raise UnsafeFileError(f"its pickle has more than {MAX_INSTRUCTIONS} instructions")
            if instruction.name == "STOP":
                return self.stack.pop()
            if instruction.name not in _INSTRUCTIONS:
                raise UnsafeFileError(
                    f"its pickle holds the instruction {instruction.name}, which is not admitted"
                )
            _INSTRUCTIONS[instruction.name](self, argument)

    # reading, as pickletools asks for it

    def tell(self) -> int:
        self.code = self.data[self.at : self.at + 1].tobytes()  # of the instruction that begins
        return self.at

    def read(self, count: int) -> bytes | memoryview:
        if count > len(self.data) - self.at:
            raise UnsafeFileError(
                f"it is truncated or lies about a length ({count} bytes declared, "
                f"{len(self.data) - self.at} left)"
            )
        self.at += count
        part = self.data[self.at - count : self.at]
        # of at most 8 bytes are a length and the instruction itself
        return part if self.code in _VIEWED and count > 8 else part.tobytes()

    def readline(self) -> bytes:
        start, longest = self.at, len(self.data) - self.at
        longest = longest if self.code == b"V" else min(longest, MAX_LINE)
        for at in range(start, start + longest, MAX_LINE):
            end = self.data[at : at + MAX_LINE].tobytes().find(b"\n")
            if end >= 0:
                self.at = at + end + 1
                if at > start:  # bytes and their text, at most
                    self.budget.charge(_PER_LETTER * (at - start))
                return self.data[start : self.at].tobytes()
        raise UnsafeFileError("its pickle has a text line without an end")

    # stack

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def pop(self) -> Any:
        value = self.stack.pop()
        if value is _MARK:
            raise UnsafeFileError("its pickle is corrupt: a mark stands where a value belongs")
        return value

    def top(self, kind: type) -> Any:
        target = self.stack[-1]
        if isinstance(target, Module) and kind is list:
            return target.items
        if not isinstance(target, kind):
            raise UnsafeFileError(f"its pickle is corrupt: it adds items to {_type(target)}")
        return target

    def since_mark(self) -> list:
        for i in range(len(self.stack) - 1, -1, -1):
            if self.stack[i] is _MARK:
                items = self.stack[i + 1 :]
                del self.stack[i:]
                return items
        raise UnsafeFileError("its pickle is corrupt: a mark is missing")

    # instructions that build

    def set_items(self, target: Any, items: list) -> None:
        target = target.state if isinstance(target, Module) else target
        if not isinstance(target, dict):
            raise UnsafeFileError(f"its pickle is corrupt: it adds named items to {_type(target)}")
        if len(items) % 2:
            raise UnsafeFileError("its pickle is corrupt: a key has no value")
        for key, value in zip(items[::2], items[1::2], strict=True):
            target[scalar(key)] = value

    def add_items(self, items: list) -> None:
        self.set_items(self.stack[-1], items)

    def find(self, module: Any, name: Any) -> None:
        if not (isinstance(module, str) and isinstance(name, str)):
            raise UnsafeFileError("its pickle is corrupt: the name of a global is not a text")
        self.budget.charge(len(module) + len(name))
        self.push(self.admit(module, name))

    def reduce(self) -> None:
        args, function = self.pop(), self.pop()
        if not isinstance(function, Global) or function.call is None or not isinstance(args, tuple):
            raise UnsafeFileError(
                f"it calls {quote(getattr(function, 'name', function))}, which is not admitted as "
                "a function"
            )
        self.charge(args)
        self.push(function.call(*args))

    def new_object(self, args: Any, cls: Any) -> None:
        admitted = isinstance(cls, Global) and cls.is_class and isinstance(args, tuple)
        if not admitted or cls.call is None:
            raise UnsafeFileError(
                f"it makes an object of {quote(getattr(cls, 'name', cls))}, which is not admitted "
                "as a class"
            )
        self.charge(args)
        self.push(cls.call(*args))

    def charge(self, args: tuple) -> None:
        self.budget.charge(_PER_REFERENCE * len(args))
        self.budget.charge(sum(map(_weight, args)))

    def build(self) -> None:
        state = self.pop()
        target = self.stack[-1]
        self.charge(state if isinstance(state, tuple) else (state,))
        if isinstance(target, Inert):
            target.build(state)
        elif not isinstance(target, dict):
            # Attributes of an OrderedDict (`_metadata` of state dicts) are dropped.
            raise UnsafeFileError(f"it gives a state to {_type(target)}")

    def persist(self) -> None:
        if self.persistent is None:
            raise UnsafeFileError("it refers to data outside its pickle")
        self.push(self.persistent(self.pop()))

    def literal(self, value: Any) -> None:
        if isinstance(value, int) and value.bit_length() > 8 * MAX_INT_BYTES:
            raise UnsafeFileError(f"its pickle holds an integer of {value.bit_length()} bits")
        self.push(value)

    def store(self, index: int) -> None:
        if not 0 <= index < MAX_MEMO or self.stack[-1] is _MARK:
            raise UnsafeFileError("its pickle is corrupt: a wrong memo entry")
        self.memo[index] = self.stack[-1]

    def protocol(self, version: int) -> None:
        if version > 5:
            raise UnsafeFileError(f"its pickle protocol {version} is unknown")

    def add_to_set(self, target: set, items: list) -> None:
        target.update(scalar(item) for item in items)


def _two(m: _Machine) -> list:
    last = m.pop()
    return [m.pop(), last]


def _tuple_of(count: int) -> Callable[[_Machine, Any], None]:
    return lambda m, _: m.push(tuple([m.pop() for _ in range(count)][::-1]))


def _dict_of(m: _Machine, _: Any) -> None:
    items, target = m.since_mark(), {}
    m.set_items(target, items)
    m.push(target)


def _extend(m: _Machine, kind: type, add: Callable[[Any, list], Any]) -> None:
    items = m.since_mark()
    add(m.top(kind), items)


def _append(m: _Machine, _: Any) -> None:
    item = m.pop()
    m.top(list).append(item)


def _new_object_with_names(m: _Machine, _: Any) -> None:
    names, args, cls = m.pop(), m.pop(), m.pop()
    if names != {} and isinstance(args, tuple):
        args = (*args, names)
    m.new_object(args, cls)


_Action = Callable[[_Machine, Any], Any]  # of the machine and the instruction's argument
_LITERALS = "INT BININT BININT1 BININT2 LONG LONG1 LONG4 FLOAT BINFLOAT STRING BINSTRING"
_LITERALS += " SHORT_BINSTRING BINBYTES SHORT_BINBYTES BINBYTES8 UNICODE SHORT_BINUNICODE"
_LITERALS += " BINUNICODE BINUNICODE8"
# the instructions that are admitted, by pickletools' names
_INSTRUCTIONS: dict[str, _Action] = {
    **dict.fromkeys(_LITERALS.split(), _Machine.literal),
    **dict.fromkeys(("GET", "BINGET", "LONG_BINGET"), lambda m, index: m.push(m.memo[index])),
    **dict.fromkeys(("PUT", "BINPUT", "LONG_BINPUT"), _Machine.store),
    "BYTEARRAY8": lambda m, content: m.push(memoryview(content)),
    "NONE": lambda m, _: m.push(None),
    "NEWTRUE": lambda m, _: m.push(True),
    "NEWFALSE": lambda m, _: m.push(False),
    "EMPTY_LIST": lambda m, _: m.push([]),
    "APPEND": _append,
    "APPENDS": lambda m, _: _extend(m, list, list.extend),
    "LIST": lambda m, _: m.push(m.since_mark()),
    "EMPTY_TUPLE": lambda m, _: m.push(()),
    "TUPLE": lambda m, _: m.push(tuple(m.since_mark())),
    "TUPLE1": _tuple_of(1),
    "TUPLE2": _tuple_of(2),
    "TUPLE3": _tuple_of(3),
    "EMPTY_DICT": lambda m, _: m.push({}),
    "DICT": _dict_of,
    "SETITEM": lambda m, _: m.add_items(_two(m)),
    "SETITEMS": lambda m, _: m.add_items(m.since_mark()),
    "EMPTY_SET": lambda m, _: m.push(set()),
    "ADDITEMS": lambda m, _: _extend(m, set, m.add_to_set),
    "FROZENSET": lambda m, _: m.push(frozenset(scalar(item) for item in m.since_mark())),
    "POP": lambda m, _: m.stack.pop(),
    "POP_MARK": lambda m, _: m.since_mark(),
    "DUP": lambda m, _: m.push(m.stack[-1]),
    "MARK": lambda m, _: m.push(_MARK),
    "MEMOIZE": lambda m, _: m.store(len(m.memo)),
    "GLOBAL": lambda m, names: m.find(*names.split(" ", 1)),
    "STACK_GLOBAL": lambda m, _: m.find(*_two(m)),
    "REDUCE": lambda m, _: m.reduce(),
    "BUILD": lambda m, _: m.build(),
    "NEWOBJ": lambda m, _: m.new_object(*_two(m)[::-1]),
    "NEWOBJ_EX": _new_object_with_names,
    "PROTO": _Machine.protocol,
    "FRAME": lambda m, _: None,  # a hint for buffers; lengths are checked where they are used
    "BINPERSID": lambda m, _: m.persist(),
}
