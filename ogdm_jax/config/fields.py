"""How one setting is declared, with its help and its limits, and how its value is checked.

A group of settings is a frozen dataclass whose fields are made by `setting` and whose
`__post_init__` calls `check`:

    @dataclasses.dataclass(frozen=True)
    class Settings:
        rate: float = setting(0.2, "guidance rate", least=0, most=1)

        def __post_init__(self) -> None:
            check(self, "GROUP")

Command lines make their options and their help from the same fields.
"""

import ast
import dataclasses
import difflib
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeGuard

_UNITS = {"steps": None, "step": None, "images": 1, "kimg": 1_000, "Mimg": 1_000_000}


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
) -> Any:
    """A field of a dataclass of settings: `dataclasses.field` with what `check` needs as metadata.

    Args:
      default: its value; None where the setting may be left open. Its type is the setting's type.
      help: what the setting means, one line.
      choices: the only values.
      least, above, most, below: limits of a number, or of each number of a tuple; `least` and
        `most` are allowed values, `above` and `below` are not.
      expected: ends the sentence of an error, in place of words made from the limits.
      free: whether the value may differ when a run is resumed.
      decided: whether it may differ then where a person says so (--override).
      was: the setting's older name; training folders of before have it.
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
        },
    )


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
    for field in dataclasses.fields(settings):
        if "limits" not in field.metadata:
            continue
        key = f"{prefix}{group}.{field.name}" if group else prefix + field.name
        value = _typed(key, getattr(settings, field.name), field)
        object.__setattr__(settings, field.name, value)
        choices = field.metadata["choices"]
        if choices is not None and value is not None:
            if value not in choices:
                raise ConfigError(f"{key}: unknown {value!r}; expected one of {', '.join(choices)}")
        parts = value if isinstance(value, tuple) else (value,)
        if not all(_within(part, field.metadata["limits"]) for part in parts):
            raise ConfigError(f"{key}: {value!r} given; expected {expected(field)}")


def expected(field: dataclasses.Field[Any]) -> str:
    """What a field takes, in words: for errors and for help."""
    if field.metadata["expected"]:
        return field.metadata["expected"]
    if field.metadata["choices"] is not None:
        return f"one of {', '.join(field.metadata['choices'])}"
    limits = field.metadata["limits"]
    sample = (
        field.default[0] if isinstance(field.default, tuple) and field.default else field.default
    )
    noun = "a whole number" if is_number(sample) and isinstance(sample, int) else "a number"
    if limits == {"least": 0, "most": 1}:
        return "a number from 0 to 1"
    if limits == {"above": 0} and noun == "a number":
        return "a positive number"
    words = {"least": "of at least", "above": "above", "most": "of at most", "below": "below"}
    if noun == "a whole number" and "above" in limits:
        limits = {("least" if k == "above" else k): v + (k == "above") for k, v in limits.items()}
    return " and ".join(
        [noun, *(f"{words[name]} {value:g}" for name, value in limits.items())]
    ).replace(f"{noun} and", noun, 1)


def _typed(key: str, value: Any, field: dataclasses.Field[Any]) -> Any:
    """The value as the field's type; raises ConfigError where it is of another one."""
    default = field.default
    if isinstance(value, float) and math.isnan(value):
        raise ConfigError(f"{key}: {value!r} given; expected a number")
    if default is None or value is None:
        if value is None and default is not None:
            raise ConfigError(f"{key}: None given; expected {expected(field)}")
        if default is None and "float" in str(field.type) and is_number(value):
            return float(value)
        return tuple(value) if isinstance(value, list) else value
    if isinstance(default, tuple) and isinstance(value, (list, tuple)):
        value = tuple(value)
        if default and not all(is_number(v) == is_number(default[0]) for v in value):
            raise ConfigError(
                f"{key}: {value!r} has entries of another type; expected something like {default!r}"
            )
        return value
    if isinstance(default, float) and is_number(value):
        return float(value)
    if isinstance(value, type(default)) and isinstance(value, bool) == isinstance(default, bool):
        return value
    kind = type(default).__name__
    raise ConfigError(f"{key}: {value!r} is of another type; expected {kind} such as {default!r}")


def _within(value: Any, limits: Mapping[str, float]) -> bool:
    """Whether a number is inside the limits; what is no number has none."""
    if not is_number(value):
        return True
    return (
        value >= limits.get("least", -math.inf)
        and value <= limits.get("most", math.inf)
        and ("above" not in limits or value > limits["above"])
        and ("below" not in limits or value < limits["below"])
    )


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
    value: Any
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        value = (
            tuple(part.strip() for part in text.split(",") if part.strip())
            if isinstance(old, tuple)
            else text
        )
    if isinstance(old, tuple):
        value = tuple(value) if isinstance(value, (tuple, list)) else (value,)
        if old and value and not all(is_number(v) == is_number(old[0]) for v in value):
            raise ConfigError(
                f"{prefix}{key}: {text!r} has entries of another type; expected something like "
                f"{old!r}"
            )
        return value
    if isinstance(old, float) and (
        is_number(value) or text.strip().lower() in ("inf", "-inf")
    ):  # no literal says inf
        return float(value)
    if isinstance(old, int) and isinstance(value, float) and value.is_integer():
        value = int(value)
    if old is not None and type(value) is not type(old):
        raise ConfigError(
            f"{prefix}{key}: {text!r} is of another type; expected {type(old).__name__} such as "
            f"{old!r}"
        )
    return value


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
            f"{key}: {text!r} is no duration; expected a number and one of {', '.join(_UNITS)}"
        )
    per_unit = _UNITS[unit]
    return math.ceil(amount) if per_unit is None else math.ceil(amount * per_unit / batch)


def require(condition: bool, key: str, value: Any, expected: str) -> None:
    """Raises ConfigError "config.key: value ...; expected ..." unless the condition holds."""
    if not condition:
        raise ConfigError(f"config.{key}: {value!r} given; expected {expected}")


def choose(key: str, value: str, options: Mapping[str, Any] | Sequence[str]) -> Any:
    """The option of that name; raises ConfigError listing the names otherwise."""
    if value not in options:
        raise ConfigError(f"config.{key}: unknown {value!r}; expected one of {', '.join(options)}")
    return options[value] if isinstance(options, Mapping) else value
