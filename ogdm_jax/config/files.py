"""Configurations: loaded from a Python file, overridden on the command line, checked before
anything is compiled.
"""

import importlib.util
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from ogdm_jax.config.fields import ConfigError, parse, require, suggestion

SHIPPED = Path(__file__).parent.parent / "configs"  # in a checkout a link to configs/ at the top

# What may differ between a workdir's saved configuration and the one that resumes it: length,
# bookkeeping, hardware.
RESUMABLE = (
    "train.",
    "log.",
    "sample.",
    "evaluate.",
    "parallel.",
    "data.data_dir",
    "data.memory_limit",
    "data.workers",
    "sp.teacher",
)
_TRAINED_WITH = ("sample.sigma_min", "sample.sigma_max")  # they also clip the training levels


def load(path: str | Path, overrides: Sequence[str] = ()) -> ConfigDict:
    """Loads get_config() of a Python file and applies overrides of the form "key.sub=value".

    Args:
      path: a file that defines get_config() -> ConfigDict.
      overrides: texts such as "train.duration=10 kimg", "network.channel_mult=(1,2)",
        "methods=ogdm,stf".

    Returns:
      The locked configuration.

    Raises:
      ConfigError: the file is missing or defines no get_config, a key is unknown, a value is NaN or
      of another type.
    """
    path = Path(path)
    if not path.is_file():
        raise ConfigError(
            f"--config: {str(path)!r} is no file; expected a configuration such as "
            "configs/digits.py"
        )
    spec = importlib.util.spec_from_file_location(f"config_{path.stem}", path)
    assert spec is not None and spec.loader is not None  # of a file that ends in .py
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    if not hasattr(loaded, "get_config"):
        raise ConfigError(
            f"--config: {str(path)!r} defines no get_config(); expected def get_config() -> "
            "ConfigDict"
        )
    config = loaded.get_config().lock()
    for text in overrides:
        override(config, text)
    for key, value in flatten(config).items():
        require(not (isinstance(value, float) and math.isnan(value)), key, value, "a number")
    return config


def override(config: ConfigDict, text: str) -> None:
    """Applies one "key.sub=value" to a configuration in place, keeping the type of the value that
    is there.

    Raises:
      ConfigError: no "=", an unknown key, or a value of another type.
    """
    key, equals, value = text.partition("=")
    if not equals:
        raise ConfigError(f"--config.{key}: no value given; expected --config.{key}=VALUE")
    node, *_, leaf = _walk(config, key)
    old = node[leaf]
    if isinstance(old, ConfigDict):
        raise ConfigError(
            f"--config.{key}: is a group of settings ({', '.join(sorted(old))}); expected one of "
            "its keys"
        )
    node[leaf] = parse(key, value, old)


def _walk(config: ConfigDict, key: str) -> tuple[ConfigDict, str]:
    node, parts = config, key.split(".")
    for i, part in enumerate(parts):
        if not isinstance(node, ConfigDict) or part not in node:
            known = ", ".join(sorted(node)) if isinstance(node, ConfigDict) else "no sub-keys"
            where = ".".join(parts[:i]) or "the configuration"
            near = suggestion(part, node) if isinstance(node, ConfigDict) else ""
            raise ConfigError(f"--config.{key}: unknown key {part!r}{near}; {where} has {known}")
        if i < len(parts) - 1:
            node = node[part]
    return node, parts[-1]


def to_json(config: ConfigDict) -> str:
    """The configuration as JSON, which has no infinity: {"float": "inf"}. from_json gives it back,
    tuples too.
    """
    return json.dumps(_plain(config), indent=1, sort_keys=True, allow_nan=False)


def from_json(text: str) -> ConfigDict:
    """A locked configuration from to_json's text."""
    return ConfigDict(_restored(json.loads(text))).lock()


def _plain(value: Any) -> Any:
    if isinstance(value, (ConfigDict, dict)):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, (tuple, list)):
        return [_plain(v) for v in value]
    return {"float": str(value)} if isinstance(value, float) and math.isinf(value) else value


def _restored(value: Any) -> Any:
    """What _plain was given."""
    if isinstance(value, dict):
        if set(value) == {"float"}:
            return float(value["float"])
        return {k: _restored(v) for k, v in value.items()}
    return tuple(_restored(v) for v in value) if isinstance(value, list) else value


def flatten(config: ConfigDict | Mapping, prefix: str = "") -> dict[str, Any]:
    """{"group.key": value} of every leaf."""
    out = {}
    for key, value in config.items():
        out |= (
            flatten(value, f"{prefix}{key}.")
            if isinstance(value, (ConfigDict, dict))
            else {prefix + key: value}
        )
    return out


def check_same_run(saved: ConfigDict, config: ConfigDict, methods: Sequence[str]) -> None:
    """Refuses to resume a workdir with settings that would make it another run.

    Settings of RESUMABLE may differ (but not the levels that also clip training), and so may those
    of a method (of all `methods`) that neither run uses.

    Raises:
      ConfigError: naming the first settings that differ, with both values.
    """
    old, new = (flatten(_restored(_plain(c))) for c in (saved, config))
    used = set(config.methods) | set(saved.methods)
    idle = set(methods) - used
    differ = [
        f"{k} ({old.get(k)!r} there, {new.get(k)!r} now)"
        for k in sorted(old | new)
        if old.get(k) != new.get(k)
        and not (k.startswith(RESUMABLE) and k not in _TRAINED_WITH)
        and k.split(".")[0] not in idle
    ]
    if differ:
        raise ConfigError(
            f"--workdir holds a run of another configuration: {'; '.join(differ[:4])}; "
            "expected the same settings or a new --workdir"
        )
