"""A pickle reader that can only build inert data.

The standard unpickler is a small machine whose GLOBAL and REDUCE instructions import and call
whatever the file names. This one is written out instruction by instruction, imports nothing, and
calls only functions that its caller listed (`Admit`), so a file cannot run code by construction.
Memory is bounded by the file's size: declared lengths are compared with the bytes that are left
before anything is allocated, byte strings are views into the file, one Budget for the whole file
limits the instructions and what calls may copy, and only plain scalars may be dictionary keys
(hashing a tuple of tuples that share memory takes exponential time).
"""

import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

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

    def run(self) -> Any:
        while self.budget.instructions > 0:
            self.budget.instructions -= 1
            code = self.take(1)[0]
            if code == 0x2E:  # STOP
                return self.stack.pop()
            instruction = _INSTRUCTIONS.get(code)
            if instruction is None:
                raise UnsafeFileError(
                    f"its pickle holds the instruction {_FORBIDDEN.get(code, hex(code))}, which is "
                    "not admitted"
                )
            instruction(self)
        raise UnsafeFileError(f"its pickle has more than {MAX_INSTRUCTIONS} instructions")

    # reading

    def take(self, count: int) -> memoryview:
        if count > len(self.data) - self.at:
            raise UnsafeFileError(
                f"it is truncated or lies about a length ({count} bytes declared, "
                f"{len(self.data) - self.at} left)"
            )
        self.at += count
        return self.data[self.at - count : self.at]

    def number(self, layout: str) -> Any:
        return struct.unpack(layout, self.take(struct.calcsize(layout)))[0]

    def line(self, longest: int = MAX_LINE, codec: str = "utf-8") -> str:
        start, longest = self.at, min(longest, len(self.data) - self.at)
        for at in range(start, start + longest, MAX_LINE):
            end = bytes(self.data[at : at + MAX_LINE]).find(b"\n")
            if end >= 0:
                self.at = at + end + 1
                if at > start:  # bytes and their text, at most
                    self.budget.charge(_PER_LETTER * (at - start))
                return bytes(self.data[start : at + end]).decode(codec)
        raise UnsafeFileError("its pickle has a text line without an end")

    def text(self, layout: str) -> str:
        return str(self.take(self.number(layout)), "utf-8", "surrogatepass")

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

    def integer_line(self) -> None:
        text = self.line()
        self.push({"00": False, "01": True}[text] if text in ("00", "01") else _int(text))

    def long(self, layout: str) -> None:
        size = self.number(layout)
        if not 0 <= size <= MAX_INT_BYTES:
            raise UnsafeFileError(f"its pickle holds an integer of {size} bytes")
        self.push(int.from_bytes(self.take(size), "little", signed=True))

    def quoted_line(self) -> None:
        text = self.line()
        if len(text) < 2 or text[0] != text[-1] or text[0] not in "'\"" or "\\" in text:
            raise UnsafeFileError("its pickle holds a text line that is not plainly quoted")
        self.push(text[1:-1])

    def store(self, index: int) -> None:
        if not 0 <= index < MAX_MEMO or self.stack[-1] is _MARK:
            raise UnsafeFileError("its pickle is corrupt: a wrong memo entry")
        self.memo[index] = self.stack[-1]

    def protocol(self) -> None:
        if (version := self.take(1)[0]) > 5:
            raise UnsafeFileError(f"its pickle protocol {version} is unknown")

    def add_to_set(self, target: set, items: list) -> None:
        target.update(scalar(item) for item in items)


def _int(text: str) -> int:
    if len(text) > 2 * MAX_INT_BYTES:
        raise UnsafeFileError(f"its pickle holds an integer of {len(text)} digits")
    return int(text.removesuffix("L"))


def _two(m: _Machine) -> list:
    last = m.pop()
    return [m.pop(), last]


def _tuple_of(count: int) -> Callable[[_Machine], None]:
    return lambda m: m.push(tuple([m.pop() for _ in range(count)][::-1]))


def _pair(method: Callable[[_Machine, Any, Any], None]) -> Callable[[_Machine], None]:
    return lambda m: method(m, *_two(m))


def _dict_of(m: _Machine) -> None:
    items, target = m.since_mark(), {}
    m.set_items(target, items)
    m.push(target)


def _extend(m: _Machine, kind: type, add: Callable[[Any, list], Any]) -> None:
    items = m.since_mark()
    add(m.top(kind), items)


def _set_items(m: _Machine, items: list) -> None:
    m.set_items(m.stack[-1], items)


def _append(m: _Machine) -> None:
    item = m.pop()
    m.top(list).append(item)


def _new_object_with_names(m: _Machine) -> None:
    names, args, cls = m.pop(), m.pop(), m.pop()
    if names != {} and isinstance(args, tuple):
        args = (*args, names)
    m.new_object(args, cls)


# instruction byte -> action, in the order of the standard library's pickletools
_INSTRUCTIONS: dict[int, Callable[[_Machine], Any]] = {
    ord("I"): _Machine.integer_line,
    ord("J"): lambda m: m.push(m.number("<i")),
    ord("K"): lambda m: m.push(m.number("<B")),
    ord("M"): lambda m: m.push(m.number("<H")),
    ord("L"): lambda m: m.push(_int(m.line())),
    0x8A: lambda m: m.long("<B"),
    0x8B: lambda m: m.long("<i"),
    ord("F"): lambda m: m.push(float(m.line())),
    ord("G"): lambda m: m.push(m.number(">d")),
    ord("S"): _Machine.quoted_line,
    ord("T"): lambda m: m.push(str(m.take(m.number("<I")), "latin1")),
    ord("U"): lambda m: m.push(str(m.take(m.number("<B")), "latin1")),
    ord("B"): lambda m: m.push(m.take(m.number("<I"))),
    ord("C"): lambda m: m.push(m.take(m.number("<B"))),
    0x8E: lambda m: m.push(m.take(m.number("<Q"))),
    0x96: lambda m: m.push(m.take(m.number("<Q"))),
    ord("N"): lambda m: m.push(None),
    0x88: lambda m: m.push(True),
    0x89: lambda m: m.push(False),
    ord("V"): lambda m: m.push(m.line(len(m.data), "raw-unicode-escape")),
    0x8C: lambda m: m.push(m.text("<B")),
    ord("X"): lambda m: m.push(m.text("<I")),
    0x8D: lambda m: m.push(m.text("<Q")),
    ord("]"): lambda m: m.push([]),
    ord("a"): _append,
    ord("e"): lambda m: _extend(m, list, list.extend),
    ord("l"): lambda m: m.push(m.since_mark()),
    ord(")"): lambda m: m.push(()),
    ord("t"): lambda m: m.push(tuple(m.since_mark())),
    0x85: _tuple_of(1),
    0x86: _tuple_of(2),
    0x87: _tuple_of(3),
    ord("}"): lambda m: m.push({}),
    ord("d"): _dict_of,
    ord("s"): lambda m: _set_items(m, _two(m)),
    ord("u"): lambda m: _set_items(m, m.since_mark()),
    0x8F: lambda m: m.push(set()),
    0x90: lambda m: _extend(m, set, m.add_to_set),
    0x91: lambda m: m.push(frozenset(scalar(item) for item in m.since_mark())),
    ord("0"): lambda m: m.stack.pop(),
    ord("1"): lambda m: m.since_mark(),
    ord("2"): lambda m: m.push(m.stack[-1]),
    ord("("): lambda m: m.push(_MARK),
    ord("g"): lambda m: m.push(m.memo[_int(m.line())]),
    ord("h"): lambda m: m.push(m.memo[m.number("<B")]),
    ord("j"): lambda m: m.push(m.memo[m.number("<I")]),
    ord("p"): lambda m: m.store(_int(m.line())),
    ord("q"): lambda m: m.store(m.number("<B")),
    ord("r"): lambda m: m.store(m.number("<I")),
    0x94: lambda m: m.store(len(m.memo)),
    ord("c"): lambda m: m.find(m.line(), m.line()),
    0x93: _pair(_Machine.find),
    ord("R"): _Machine.reduce,
    ord("b"): _Machine.build,
    0x81: lambda m: m.new_object(*_two(m)[::-1]),
    0x92: _new_object_with_names,
    0x80: _Machine.protocol,
    # FRAME: a hint for buffers; lengths are checked where they are used
    0x95: lambda m: m.take(8),
    ord("Q"): _Machine.persist,
}
_FORBIDDEN = {
    ord("i"): "INST (make an object by a class name)",
    ord("o"): "OBJ (make an object of a class)",
    ord("P"): "PERSID (a text reference)",
    0x82: "EXT1 (a registered extension)",
    0x83: "EXT2 (a registered extension)",
    0x84: "EXT4 (a registered extension)",
    0x97: "NEXT_BUFFER (data outside the file)",
    0x98: "READONLY_BUFFER (data outside the file)",
}
