"""What the objects of a file become: records that hold what the file says and do nothing."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

# instructions of a file; a pickled EDM network has about 170 per tensor: 92,000 for ImageNet
MAX_INSTRUCTIONS = 1_000_000
_MOST_IN_KEY = 16  # values of a tuple that is a key


class UnsafeFileError(ValueError):
    """A file that is refused: it asks for code, or its bytes contradict each other.

    The text is one sentence.
    """


@dataclass
class Budget:
    """What reading one file may still cost, pickles inside pickles included.

    A few bytes of a pickle can name a long text, list or array again and again. Code that copies
    what a file names therefore calls `charge` before it copies.

    Attributes:
      bytes: memory beside that of the file itself.
      instructions: of pickles.
    """

    bytes: int
    instructions: int = MAX_INSTRUCTIONS

    @classmethod
    def of(cls, file_size: int) -> "Budget":
        """The budget of a file of so many bytes."""
        return cls(4 * file_size + (16 << 20))

    def charge(self, count: int, what: str = "contents unfold", where: str = "") -> None:
        """Takes `count` bytes from the budget.

        Raises:
          UnsafeFileError: it is used up; what and where complete the sentence.
        """
        self.bytes -= count
        if self.bytes < 0:
            place = f" (at {quote(where)})" if where else ""
            raise UnsafeFileError(f"its {what} to more than 4 times the file's size{place}")


@dataclass(frozen=True)
class Global:
    """What an admitted `module.name` stands for.

    Attributes:
      name: in full.
      call: what the instruction REDUCE calls; None: nothing.
      is_class: whether the instruction NEWOBJ may call it, too.
    """

    name: str
    call: Callable[..., Any] | None = None
    is_class: bool = False


class Inert:
    """Base of the records that stand for objects."""

    def build(self, state: Any) -> None:
        """Takes what the instruction BUILD would have given to __setstate__.

        Raises:
          UnsafeFileError: this kind of record has no state, or the state is not of its kind.
        """
        raise UnsafeFileError(f"it gives a state to type {type(self).__name__}")


@dataclass
class Module(Inert):
    """An nn.Module, a path, a setting or any other object, kept as data: nothing is constructed.

    Attributes:
      name: the class that the file names, without its package.
      state: the attributes, and the items of a dictionary's subclass.
      items: the arguments of its construction, and the items of a list's subclass.
    """

    name: str
    state: dict[str, Any] = field(default_factory=dict)
    items: list = field(default_factory=list)

    def build(self, state: Any) -> None:
        """Sets the attributes: of a dictionary, or (of a class with slots) of two."""
        parts = state if isinstance(state, tuple) and len(state) == 2 else (state,)
        if not all(part is None or isinstance(part, dict) for part in parts):
            self.items.append(state)
            return
        for part in filter(None, parts):
            self.state.update(part)


@dataclass
class Odd(Inert):
    """A tensor that is not plain numbers in a file; what: its kind and what to do, for messages."""

    what: str

    def build(self, state: Any) -> None:
        """Attributes carry no numbers: dropped."""


def scalar(key: Any) -> Any:
    """A key of a dictionary or an item of a set, once it is known to be plain.

    Python hashes integers modulo 2^61 - 1: without a limit a file could choose keys that all
    collide. Classes, records and tuples of plain values become texts.
    """
    if isinstance(key, Global):
        return key.name
    items = key.items if isinstance(key, Module) else key
    if isinstance(key, tuple | Module) and len(items) <= _MOST_IN_KEY:
        if all(isinstance(item, str | int | float | None) for item in items):
            words = [item[:80] if isinstance(item, str) else str(scalar(item)) for item in items]
            return f"{key.name[:80] if isinstance(key, Module) else ''}({', '.join(words)})"
    if not isinstance(key, str | int | float | None):
        raise UnsafeFileError(f"its pickle has a key of type {type(key).__name__}")
    if isinstance(key, int) and not -(2**63) <= key < 2**64:
        raise UnsafeFileError("its pickle has a whole number of more than 64 bits as a key")
    return key


def quote(text: Any) -> str:
    """A text from a file, shortened and escaped so that a message stays one readable line."""
    text = text if isinstance(text, str) else type(text).__name__
    return ascii(text if len(text) <= 80 else text[:77] + "...")[1:-1]
