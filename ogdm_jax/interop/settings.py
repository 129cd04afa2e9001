"""Checks of what a JSON file, a pickle or a command line says about a network: types and ranges."""

import types
import typing
from collections.abc import Callable, Mapping, Sequence
from numbers import Integral, Real
from typing import Any, cast

import flax.linen as nn
import numpy as np

from ogdm_jax.config import Precondition
from ogdm_jax.diffusion.process import SCHEDULES
from ogdm_jax.interop.inert import quote
from ogdm_jax.interop.recognise import KINDS

PRECONDITIONS = Precondition.__dataclass_fields__["kind"].metadata["choices"]
# What a file may say of a process beside its betas: the setting of config.precondition, and of
# which kinds it is one.
PROCESS = {
    **dict.fromkeys(("diffusion_steps", "rescale_timesteps", "interpolate"), ("adm", "v")),
    "zero_terminal": ("v",),
    "time_scale": ("flow",),
    "sigma_max": ("ve", "smld"),
}
_LARGEST = 2**20  # no width (channels), side (pixels) or count of a real network is larger
_LONGEST = 16  # entries of a list
_MOST_BLOCKS = 64  # of a level: every block is traced
_POSITIVE = np.finfo(np.float32)  # what a positive number may be, once it is float32


def _number(low: float, high: float) -> Callable[[Any], bool]:
    """Whether a value is a number from low up to, but not including, high; NaN is not."""

    def inside(value: Any) -> bool:
        number = isinstance(value, Real) and not isinstance(value, bool)
        return number and bool(low <= cast(float, value) < high)

    return inside


_ABOUT: dict[str, tuple[Callable[[Any], bool], str]] = {
    "kind": (lambda value: value in KINDS, f"one of {', '.join(KINDS)}"),
    "settings": (lambda value: isinstance(value, dict), "a JSON object"),
    "precondition": (lambda value: value in PRECONDITIONS, f"one of {', '.join(PRECONDITIONS)}"),
    "schedule": (lambda value: value in SCHEDULES, f"one of {', '.join(SCHEDULES)}"),
    "sigma_data": (_number(float(_POSITIVE.tiny), float(_POSITIVE.max)), "a positive number"),
    "sigma_max": (_number(0.021, float(_POSITIVE.max)), "a number above 0.02"),
    "dropout": (_number(0, 1), "a number from 0 to below 1"),
    "diffusion_steps": (
        lambda value: isinstance(value, int) and _number(2, 10**5 + 1)(value),
        "a whole number from 2 to 100000",
    ),
    **dict.fromkeys(
        ("rescale_timesteps", "interpolate", "zero_terminal"),
        (lambda value: isinstance(value, bool), "true or false"),
    ),
    "time_scale": (_number(float(_POSITIVE.tiny), 1e6), "a positive number below 1e6"),
}


def check_about(about: Mapping[str, Any], where: str = "") -> None:
    """Checks what is said about a network beside its tensors. None and unknown names pass.

    Raises:
      ValueError: a value of another type or out of range; the sentence begins with where.
    """
    for name, (good, expected) in _ABOUT.items():
        value = about.get(name)
        if value is not None and not good(value):
            raise ValueError(f"{where}{name}: {_shown(value)} given; expected {expected}")


def check_settings(cls: type[nn.Module], settings: Mapping[str, Any]) -> None:
    """Checks a network's settings against the types of its attributes; names it lacks pass.

    Raises:
      ValueError: a value of another type or out of range.
    """
    hints = typing.get_type_hints(cls)
    for name, value in settings.items():
        hint = hints.get(name)
        if name == "dropout":
            check_about({name: value})
        elif name == "num_blocks" and not (_is(value, int) and 1 <= value <= _MOST_BLOCKS):
            raise ValueError(
                f"{name}: {_shown(value)} given; expected a whole number from 1 to {_MOST_BLOCKS}"
            )
        if name.startswith("channel_mult") and hint is not None:  # fractions of the width occur
            hint = float if hint is int else Sequence[float]
        expected = _expected(hint)
        if expected is not None and not _is(value, hint):
            raise ValueError(f"{name}: {_shown(value)} given; expected {expected}")


def _is(value: Any, hint: Any) -> bool:
    arguments = typing.get_args(hint)
    if isinstance(hint, types.UnionType):
        return any(_is(value, option) for option in arguments)
    if typing.get_origin(hint) is Sequence:
        whole = isinstance(value, tuple | list) and len(value) <= _LONGEST
        return whole and all(_is(item, arguments[0]) for item in value)
    if hint is int:
        return isinstance(value, Integral) and _number(0, _LARGEST)(value)
    return _number(0, _LARGEST)(value) if hint is float else isinstance(value, hint)


def _expected(hint: Any) -> str | None:
    """What to call a type; None for those that only code can give, such as a dtype."""
    if isinstance(hint, types.UnionType):
        return _expected(typing.get_args(hint)[0])
    if typing.get_origin(hint) is Sequence:
        return f"a list such as [1, 2], each entry {_expected(typing.get_args(hint)[0])}"
    numbers = {
        int: f"a whole number from 0 to below {_LARGEST}",
        float: f"a number from 0 to below {_LARGEST}",
    }
    return (numbers | {str: "a text", bool: "true or false"}).get(hint)


def _shown(value: Any) -> str:
    return quote(ascii(value))
