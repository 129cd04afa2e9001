"""Command-line options made from Settings: a field `rate` of a group `dsg` is `--dsg.rate 0.2`."""

import argparse
import dataclasses
from typing import Any

from ogdm_jax.config import ConfigError, parse

_EXAMPLES = {"bool": False, "int": 0, "float": 0.0, "str": ""}
# Options of before the methods had their own, and what they are now.
_FORMER = {
    "--rate": "--dsg.rate",
    "--strength": "--dsg.strength",
    "--stop": "--dsg.stop_ratio",
    "--scale": "--METHOD.scale such as --dps.scale (of diffpir: --diffpir.strength)",
    "--interval": "--METHOD.interval such as --dsg.interval",
    "--window": "--METHOD.window such as --dsg.window",
    "--repeats": "--METHOD.repeats such as --dsg.repeats",
    "--repeat-window": "--METHOD.repeat_window such as --dsg.repeat_window",
    "--discriminator": "--dg.discriminator",
    "--discriminator-weight": "--dg.weight",
    "--guidance-weight": "--cfg.weight",
    "--guidance-window": "--cfg.window",
    "--measurement-noise": "--task.noise",
    "--poisson": "--task.poisson",
    "--mask": "--task.mask",
    "--factor": "--task.factor",
    "--blur": "--task.blur",
    "--network": "--task.network",
}


def add_options(parser: argparse.ArgumentParser, group: str, settings: type, about: str) -> None:
    """Adds an option for each field that `config.setting` declared; help and default are the
    field's. Only options that are given reach the namespace.
    """
    options = parser.add_argument_group(f"--{group}", about)
    for field in dataclasses.fields(settings):
        if "help" not in field.metadata:
            continue
        default = "" if field.default in (None, "") else f" (default: {field.default})"
        boolean: dict[str, Any] = {}
        if "bool" in _kind(field):
            boolean = {"nargs": "?", "const": "true"}
        options.add_argument(
            f"--{group}.{field.name}",
            default=argparse.SUPPRESS,
            metavar=_kind(field).upper(),
            help=(field.metadata["help"] + default).replace("%", "%%"),
            **boolean,
        )


def refuse_former(words: list[str]) -> None:
    """Raises ConfigError with the new spelling for an option of before."""
    for word in words:
        option = word.partition("=")[0]
        if option in _FORMER:
            raise ConfigError(f"{option}: is spelled {_FORMER[option]} now")


def given(args: argparse.Namespace) -> dict[str, str]:
    """{"group.field": text} of the options that were given."""
    return {name: value for name, value in vars(args).items() if "." in name}


def values(group: str, settings: type, texts: dict[str, str]) -> dict[str, Any]:
    """{field: value} of those texts ("group.field": text) that are of a group.

    Raises:
      ConfigError: a text that cannot be of the field's type.
    """
    fields = {field.name: field for field in dataclasses.fields(settings)}
    return {
        key.removeprefix(f"{group}."): _value(key, text, fields[key.removeprefix(f"{group}.")])
        for key, text in texts.items()
        if key.startswith(f"{group}.")
    }


def _kind(field: dataclasses.Field[Any]) -> str:
    """The field's type in a word: bool, int, float, str, or LOW,HIGH for two numbers."""
    kind = field.type if isinstance(field.type, str) else getattr(field.type, "__name__", "")
    kind = kind or str(field.type)
    if "tuple" in str(field.type).lower() or "Window" in str(field.type):
        return "low,high"
    return next((word for word in _EXAMPLES if word in str(kind)), "str")


def _value(key: str, text: str, field: dataclasses.Field[Any]) -> Any:
    kind = _kind(field)
    if kind != "low,high":
        return parse(key, text, _EXAMPLES[kind], prefix="--")
    try:
        low, high = (float(part) for part in text.split(","))
    except ValueError:
        raise ConfigError(
            f"--{key}: {text!r} given; expected LOW,HIGH, two numbers such as 0.1,5"
        ) from None
    return low, high
