"""One line about an object: what a notebook shows where a person leaves it at the end of a cell.
Without JAX: reading processes, which need none, have such objects, too.
"""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

LONGEST = 200  # characters


def brief(self: Any) -> str:
    """Name(field=value, ...) of a dataclass or a named tuple, in at most `LONGEST` characters.

    Fields that have their default value are left out. Arrays are told by type and shape, trees of
    arrays by their size, functions by name: it is the `__repr__` of what holds any of these.
    """
    text = _fields(self)
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 2]}…)"


def _fields(thing: Any) -> str:
    if dataclasses.is_dataclass(thing):
        fields = [(f.name, _default(f)) for f in dataclasses.fields(thing) if f.repr]
    else:
        fields = [(name, thing._field_defaults.get(name)) for name in thing._fields]
    values = [(name, getattr(thing, name), default) for name, default in fields]
    told = [f"{name}={_text(value)}" for name, value, default in values if _differs(value, default)]
    return f"{type(thing).__name__}({', '.join(told)})"


def _default(field: dataclasses.Field[Any]) -> Any:
    made = field.default_factory
    return field.default if made is dataclasses.MISSING else made()


def _differs(value: Any, default: Any) -> bool:
    plain = isinstance(value, str | int | float | tuple | dict) and type(value) is type(default)
    return value is not default and not (plain and value == default)


def _is_array(value: Any) -> bool:
    return hasattr(value, "dtype") and hasattr(value, "ndim")


def _arrays(tree: Any) -> Iterator[Any]:
    """The arrays in dicts, lists and tuples."""
    if isinstance(tree, dict | list | tuple):
        for part in tree.values() if isinstance(tree, dict) else tree:
            yield from _arrays(part)
    elif _is_array(tree):
        yield tree


def _text(value: Any) -> str:
    """A field's value."""
    if _is_array(value):
        traced = type(value).__name__.endswith("Tracer")  # its number is not known yet
        if value.ndim or traced or getattr(value, "is_deleted", bool)():
            return f"{value.dtype}[{','.join(map(str, value.shape))}]"
        return str(value)
    if dataclasses.is_dataclass(value) or hasattr(value, "_fields"):
        return _fields(value)
    if isinstance(value, dict | list | tuple):
        arrays = list(_arrays(value))
        if any(leaf.ndim for leaf in arrays):
            return f"<{sum(leaf.size for leaf in arrays):,} numbers in {len(arrays)} arrays>"
        if isinstance(value, list | tuple):
            return f"({', '.join(map(_text, value))}{',' * (len(value) == 1)})"
    while isinstance(value, functools.partial):
        value = value.func
    return getattr(value, "__name__", None) or " ".join(repr(value).split())
