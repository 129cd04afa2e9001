"""How one setting is declared, with its help and its limits, and how its value is checked.

A group of settings is a frozen dataclass whose fields are made by `setting`. `Group` checks them:

    @dataclasses.dataclass(frozen=True)
    class Settings(Group):
        GROUP = "dsg"
        rate: float = setting(0.2, "guidance rate", least=0, most=1)

Command lines make their options and their help from the same fields.
"""

import ast
import dataclasses
import difflib
import functools
import itertools
import math
import operator
import types
import typing
import unicodedata
import warnings
from collections.abc import Iterable, Mapping, Sequence
from fractions import Fraction
from typing import Any, ClassVar, TypeGuard

from ogdm_jax.brief import brief

_UNITS = {"steps": None, "step": None, "images": 1, "kimg": 1_000, "Mimg": 1_000_000}
_FLOAT32 = (1.2e-38, 3.4e38)  # the smallest and the largest that a device can hold
_WHOLE = 2**31 - 1
_WITHIN = {"least": operator.ge, "above": operator.gt, "most": operator.le, "below": operator.lt}


class ConfigError(ValueError):
    """A setting is unknown, of the wrong type, or out of range; the message is one sentence that
    names it.
    """


def setting(
    default: Any,
    help: str,
    *,
    choices: Iterable[str] | None = None,
    least: float | None = None,
    above: float | None = None,
    most: float | None = None,
    below: float | None = None,
    expected: str = "",
    free: bool = False,
    decided: bool = False,
    was: str = "",
    only: str | tuple[str, ...] = (),
    rising: bool = False,
) -> Any:
    """A field of a dataclass of settings: `dataclasses.field` with what `check` needs as metadata.

    Args:
      default: its value; None where the setting may be left open. Its type is the setting's type.
      help: what the setting means, one line.
      choices: the only values.
      least, above, most, below: limits of a number, or of each number of a tuple; `least` and
        `most` are allowed values, `above` and `below` are not. Numbers are finite in float32,
        whole ones below 2^31, unless `most` says more (math.inf: infinity is a value).
      expected: ends the sentence of an error, in place of words made from the limits.
      free: whether the value may differ when a run is resumed.
      decided: whether it may differ then where a person says so (--override).
      was: the setting's older name; training folders of before have it.
      only: where the setting has an effect, such as "kind=song|openai" or "noise.clip" (is on);
        a name without a dot is of the same group. Of several, one suffices. See effects.py.
      rising: of a tuple: every number is larger than the one before it.
    """
    limits = {"least": least, "above": above, "most": most, "below": below}
    return dataclasses.field(
        default=default,
        metadata={
            "help": help,
            "choices": None if choices is None else tuple(choices),
            "limits": {name: value for name, value in limits.items() if value is not None},
            "expected": expected,
            "free": free,
            "decided": decided,
            "was": was,
            "only": (only,) if isinstance(only, str) else only,
            "rising": rising,
        },
    )


free = functools.partial(setting, free=True)  # may differ when a run is resumed
decided = functools.partial(setting, decided=True)  # may differ then with --override


def check(settings: Any, group: str, prefix: str = "config.") -> None:
    """Checks every field that `setting` declared; whole numbers given for float fields become
    floats, lists for tuple fields become tuples.

    Args:
      settings: an instance of a frozen dataclass.
      group: its name in the configuration; "" for the settings that belong to no group.
      prefix: what stands before the group in a sentence: "config." or "--".

    Raises:
      ConfigError: "config.GROUP.FIELD: VALUE given; expected ..." of the first wrong field.
    """
    hints = _hints(type(settings))
    for field in dataclasses.fields(settings):
        if "limits" not in field.metadata:
            continue
        key = f"{prefix}{group}.{field.name}" if group else prefix + field.name
        value = _typed(key, getattr(settings, field.name), hints[field.name], field)
        object.__setattr__(settings, field.name, value)
        choices = field.metadata["choices"]
        if choices is not None and value is not None and value not in choices:
            raise ConfigError(
                f"{key}: unknown {shown(value)}{suggestion(str(value), choices)}; expected one of "
                f"{', '.join(choices)}"
            )
        for part in value if isinstance(value, tuple) else (value,):
            if wrong := _wrong(part, field):
                raise refusal(key, value, wrong)
        if field.metadata["rising"] and not all(a < b for a, b in itertools.pairwise(value or ())):
            raise refusal(key, value, expected(field))


class Group:
    """A group: its fields are checked when it is made, and what concerns several of them after. Its
    text is one short line.

    Attributes:
      GROUP: its name in the configuration; "": that of the class in small letters.
      PREFIX: what stands before the name in a sentence.
    """

    GROUP: ClassVar[str] = ""
    PREFIX: ClassVar[str] = "config."

    def __init_subclass__(cls) -> None:
        cls.__repr__ = brief  # the dataclass would make one of its own

    def __post_init__(self) -> None:
        """Raises ConfigError for a setting out of range."""
        check(self, self._name, self.PREFIX)
        self._check_together()

    @property
    def _name(self) -> str:
        return self.GROUP or type(self).__name__.lower()

    def _check_together(self) -> None:
        """Checks what concerns several fields of the group."""

    def _require(self, condition: bool, name: str, expected: str) -> None:
        """Raises ConfigError with the name and value of a field unless the condition holds."""
        if not condition:
            raise refusal(f"{self.PREFIX}{self._name}.{name}", getattr(self, name), expected)


@functools.cache
def _hints(kind: type) -> dict[str, Any]:
    return typing.get_type_hints(kind)


def shown(value: Any) -> str:
    """A value as Python writes it, cut where it is too long for a sentence."""
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:80]}... ({len(text)} characters)"


def expected(field: dataclasses.Field[Any]) -> str:
    """What a field takes, in words: for errors and for help."""
    if field.metadata["expected"]:
        return field.metadata["expected"]
    if field.metadata["choices"] is not None:
        return f"one of {', '.join(field.metadata['choices'])}"
    limits = {k: v for k, v in field.metadata["limits"].items() if not math.isinf(v)}
    kind, default = str(field.type), field.default
    sample = default[0] if isinstance(default, tuple) and default else default
    if isinstance(sample, str) or "str" in kind:
        return "text"
    if isinstance(sample, bool):
        return "true or false"
    whole = isinstance(sample, int) or "int" in kind
    noun = "a whole number" if whole else "a number"
    if isinstance(default, tuple) or "tuple" in kind:
        order = "rising " * field.metadata["rising"]
        noun = f"{order}{noun[2:]}s{', each' if limits else ''}"
    if limits == {"least": 0, "most": 1}:
        return f"{noun} from 0 to 1"
    if limits == {"above": 0} and noun == "a number":
        return "a positive number"
    words = {"least": "of at least", "above": "above", "most": "of at most", "below": "below"}
    if whole and "above" in limits:
        limits = {("least" if k == "above" else k): v + (k == "above") for k, v in limits.items()}
    return " and ".join(
        [noun, *(f"{words[name]} {value:g}" for name, value in limits.items())]
    ).replace(f"{noun} and", noun, 1)


def _typed(key: str, value: Any, hint: Any, field: dataclasses.Field[Any]) -> Any:
    """The value as the field's declared type, NumPy's numbers as Python's; raises ConfigError where
    it is of another one.
    """
    union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    kinds = typing.get_args(hint) if union else (hint,)
    value = _plain(value)
    if value is None:
        if types.NoneType in kinds:
            return None
        raise ConfigError(f"{key}: None given; expected {expected(field)}")
    kind = next(kind for kind in kinds if kind is not types.NoneType)
    if tuple in (kind, typing.get_origin(kind)):
        return _entries(key, value, typing.get_args(kind), field)
    if kind is float and is_number(value):
        return _float(value)
    whole = isinstance(kind, type) and isinstance(value, kind)
    if whole and isinstance(value, bool) == (kind is bool) or not isinstance(kind, type):
        return value
    example = "" if field.default is None else f" such as {field.default!r}"
    raise ConfigError(
        f"{key}: {shown(value)} is of another type; expected {kind.__name__}{example}"
    )


def _plain(value: Any) -> Any:
    """NumPy's numbers as Python's, also among entries."""
    if type(value) in (list, tuple):
        return type(value)(map(_plain, value))
    return value.tolist() if type(value).__module__ == "numpy" else value


def _entries(
    key: str, value: Any, kinds: tuple[Any, ...], field: dataclasses.Field[Any]
) -> tuple[Any, ...]:
    """The value as a tuple of entries of those types; `...` as the second: as many as there are."""
    example = f"something like {field.default!r}" if field.default else expected(field)
    if not isinstance(value, (list, tuple)):
        raise ConfigError(f"{key}: {shown(value)} is of another type; expected {example}")
    endless = len(kinds) < 2 or kinds[1] is Ellipsis
    if not endless and len(value) != len(kinds):
        raise refusal(key, value, expected(field))
    kind = kinds[0] if kinds else object
    fits = {float: is_number, int: lambda v: is_number(v) and isinstance(v, int)}
    is_fit = fits.get(kind, lambda v: isinstance(v, kind))
    if not all(is_fit(entry) for entry in value):
        raise ConfigError(f"{key}: {shown(value)} has entries of another type; expected {example}")
    return tuple(value)


def _float(value: int | float) -> float:
    try:
        return float(value)
    except OverflowError:  # a whole number above 1e308
        return math.copysign(math.inf, value)


def _wrong(value: Any, field: dataclasses.Field[Any]) -> str:
    """What is expected in place of a number or text out of all limits; "" for a good one."""
    limits = field.metadata["limits"]
    if isinstance(value, str):
        odd = any(unicodedata.category(sign) in ("Cc", "Cs") for sign in value)
        return "text of one line, in UTF-8" if odd else ""
    if not is_number(value):
        return ""
    if isinstance(value, float):
        if math.isnan(value):
            return "a number"
        if math.isinf(value) and value not in limits.values():
            return "a finite number"
        if value and math.isfinite(value) and not _FLOAT32[0] <= abs(value) <= _FLOAT32[1]:
            return "0 or a number from 1.2e-38 to 3.4e38, which float32 can hold"
    elif abs(value) > (largest := max(_WHOLE, limits.get("most", 0))):
        return f"a whole number of at most {largest}"
    within = all(_WITHIN[name](value, limit) for name, limit in limits.items())
    return "" if within else expected(field)


def is_number(value: Any) -> TypeGuard[int | float]:
    """Whether a value is an int or a float; a truth value is neither."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def parse(key: str, text: str, old: Any, prefix: str = "--config.") -> Any:
    """Reads text as the type of old: bool, int, float, str or tuple; None-valued settings take any
    literal.

    Raises:
      ConfigError: "PREFIXkey: ..." for a text of another type.
    """
    if isinstance(old, str):
        return text
    if isinstance(old, bool):
        if text.lower() in ("true", "false", "1", "0"):
            return text.lower() in ("true", "1")
        raise ConfigError(f"{prefix}{key}: {text!r} is not a truth value; expected true or false")
    value = _literal(text)
    if isinstance(old, tuple):
        if value is text:
            value = [part.strip() for part in text.split(",") if part.strip()]
        return tuple(value) if isinstance(value, (tuple, list)) else (value,)
    if isinstance(old, float):
        if is_number(value):
            return _float(value)
        if text.strip().lower() in ("inf", "-inf"):  # no literal says it
            return float(text)
    if isinstance(old, int) and isinstance(value, float) and value.is_integer():
        value = int(value)
    if old is not None and type(value) is not type(old):
        raise ConfigError(
            f"{prefix}{key}: {shown(text)} is of another type; expected {type(old).__name__} such "
            f"as {old!r}"
        )
    return value


def _literal(text: str) -> Any:
    """The value that a text is in Python; the text itself where it is none."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of "1or 2" and the like
            return ast.literal_eval(text.strip())
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return text


def suggestion(word: str, known: Iterable[str]) -> str:
    """Words that offer the known word most like `word`: "; did you mean X?", or nothing."""
    near = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean {near[0]}?" if near else ""


def duration(text: str | int, batch: int, key: str = "duration") -> int:
    """Optimiser steps of a duration such as "2000 steps", "500 kimg" or "200 Mimg" (images rounded
    up to whole steps).

    Raises:
      ConfigError: not a number and a unit, or negative.
    """
    number, _, unit = str(text).strip().partition(" ")
    unit = unit.strip() or "steps"
    try:
        amount = float(number)
    except ValueError:
        amount = math.nan
    if unit not in _UNITS or not math.isfinite(amount) or amount < 0:
        raise ConfigError(
            f"{key}: {shown(text)} is no duration; expected a number and one of {', '.join(_UNITS)}"
        )
    exact = Fraction(repr(amount))  # of the digits that were written: 4.03 kimg are 4030 images
    steps = exact if (per_unit := _UNITS[unit]) is None else exact * per_unit / batch
    if steps > _WHOLE:
        raise ConfigError(f"{key}: {shown(text)} given; expected at most {_WHOLE} steps")
    return math.ceil(steps)


def refusal(name: str, value: Any, expected: str) -> ConfigError:
    """The error "name: value given; expected ..."."""
    return ConfigError(f"{name}: {shown(value)} given; expected {expected}")


def require(condition: bool, key: str, value: Any, expected: str) -> None:
    """Raises ConfigError "config.key: value given; expected ..." unless the condition holds; of an
    option, such as --num, the key is its name.
    """
    if not condition:
        name = key if key.startswith("--") else f"config.{key}"
        raise refusal(name, value, expected)


def choose(key: str, value: str, options: Mapping[str, Any] | Sequence[str]) -> Any:
    """The option of that name; raises ConfigError listing the names otherwise."""
    if value not in options:
        near = suggestion(value, options)
        raise ConfigError(
            f"config.{key}: unknown {shown(value)}{near}; expected one of {', '.join(options)}"
        )
    return options[value] if isinstance(options, Mapping) else value
