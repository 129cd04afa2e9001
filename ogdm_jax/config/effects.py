"""Which settings have an effect: one that a person changes on a command line does, or is refused.

`setting(only=...)` declares where. A setting of a file that has none is harmless, as files are
overlays of files; so is one of a method that is off, which a command line may keep: it is said.
"""

import dataclasses
import fnmatch
from collections.abc import Mapping, Sequence
from typing import Any

from ogdm_jax.config.fields import ConfigError, require, shown
from ogdm_jax.config.whole import GROUPS, Config, flatten


def idle(config: Config, methods: Mapping[str, type]) -> dict[str, str]:
    """{"group.key": where it would have an effect} of the settings that have none in this run.

    Args:
      config: of the run.
      methods: {method: the dataclass of its settings}, of all training methods.
    """
    if config.task != "denoiser":  # its network is not one of ours, its groups are fewer
        return {}
    values, found = flatten(config), {}
    own = {name: config.settings(name, kind) for name, kind in methods.items()}
    for name, settings in own.items():
        values |= {f"{name}.{key}": value for key, value in vars(settings).items()}
    for group, kind in {**GROUPS, **methods}.items():
        off = group in methods and group not in config.methods
        for field in dataclasses.fields(kind):
            only = field.metadata.get("only", ())
            if off:
                found[f"{group}.{field.name}"] = f"config.methods={group}"
            elif only and not any(_holds(values, _full(group, text)) for text in only):
                words = " or ".join(_words(_full(group, text)) for text in only)
                found[f"{group}.{field.name}"] = words
    return found


def _full(group: str, condition: str) -> str:
    return condition if "." in condition else f"{group}.{condition}"


def _holds(values: Mapping[str, Any], condition: str) -> bool:
    key, equals, wanted = condition.partition("=")
    if not equals:
        return bool(values[key])
    return any(fnmatch.fnmatchcase(str(values[key]), one) for one in wanted.split("|"))


def _words(condition: str) -> str:
    key, equals, wanted = condition.partition("=")
    return f"config.{key}={' or '.join(wanted.split('|'))}" if equals else f"config.{key} set"


def check_typed(
    config: Config, before: Mapping[str, Any], typed: Sequence[str], methods: Mapping[str, type]
) -> str:
    """Refuses what a person changes on a command line without any effect.

    Args:
      config: with the changes.
      before: {"group.key": value} of the file.
      typed: "key=value", as for `config.load`.
      methods: as in `idle`.

    Returns:
      A sentence about changed settings of methods that are off, or "".

    Raises:
      ConfigError: naming the setting and where it has an effect.
    """
    now, without = flatten(config), idle(config, methods)
    keys = dict.fromkeys(text.partition("=")[0] for text in typed)
    vain = [key for key in keys if key in without and now.get(key) != before.get(key)]
    for key in vain:
        group = key.partition(".")[0]
        if group not in methods or group in config.methods:
            raise ConfigError(
                f"--config.{key}: {shown(now.get(key))} given, which has no effect here; expected "
                f"it only with {without[key]}"
            )
    off = ", ".join(dict.fromkeys(key.partition(".")[0] for key in vain))
    return f"without effect, as config.methods has no {off}: {', '.join(vain)}" if vain else ""


def check_sense(config: Config) -> None:
    """Raises ConfigError for settings that contradict each other, wherever they come from."""
    if config.task != "denoiser":
        need = f"none where no denoiser but the {config.task} is trained"
        require(not config.methods, "methods", config.methods, need)
        require(not config.ema.stds, "ema.stds", config.ema.stds, "none where one is trained")
        need = "'' where a discriminator is trained, which holds out images by dg.held_out"
        good = config.task == "autoencoder" or not config.data.heldout
        require(good, "data.heldout", config.data.heldout, need)
        return
    given = config.precondition
    pure, drawn = given.kind == "v" and given.zero_terminal, config.noise.distribution
    need = "v with precondition.zero_terminal: others never train the step of pure noise"
    require(not pure or drawn == "v", "noise.distribution", drawn, need)
    alone, kind = config.init.weights == "text", config.network.kind
    fits = kind == "sd" or not alone
    need = f"ema or params with network.kind {kind}, which takes no text"
    require(fits, "init.weights", config.init.weights, need)
    dropout, seen = config.data.label_dropout, config.data.conditional
    need = "0 without data.conditional: there are no labels to hide"
    seen = seen or config.network.kind == "sd"
    require(seen or not dropout, "data.label_dropout", dropout, need)
