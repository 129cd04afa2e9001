"""The door: a configuration file and "--config.KEY=VALUE" become `Config`, and `Config` becomes
JSON and back. Nothing else of the package reads a ConfigDict.
"""

import dataclasses
import importlib.util
import json
import math
import shlex
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import ml_collections
from ml_collections import ConfigDict

from ogdm_jax.config.fields import ConfigError, parse, suggestion
from ogdm_jax.config.whole import GROUPS, Config, flatten, plain, resolve

_ML = str(Path(ml_collections.__file__).parent)
SHIPPED = Path(__file__).parent.parent / "configs"  # in a checkout a link to configs/ at the top


def editable(methods: Mapping[str, Mapping[str, Any]]) -> ConfigDict:
    """All settings with their defaults, to be changed in a configuration file: locked, so that a
    misspelled name is refused.

    Args:
      methods: {method: its settings}, the groups that the package's own groups are joined with.
    """
    return ConfigDict({**plain(Config()), **methods}).lock()


def load(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """The settings of a configuration file with overrides of the form "key.sub=value".

    Args:
      path: a file that defines get_config() -> ConfigDict, or the name of a shipped one.
      overrides: texts such as "train.duration=10 kimg", "network.channel_mult=(1,2)",
        "data.batch=64".

    Raises:
      ConfigError: the file is missing or defines no get_config, a key is unknown, a value is NaN,
        of another type or out of range.
    """
    return resolve(read(path, overrides).to_dict())


def read(path: str | Path, overrides: Sequence[str] = ()) -> ConfigDict:
    """As `load`, before the values are checked: the keys are those that a person may type."""
    found = _found(path)
    with _said(found):
        module = _module(found)
        if not callable(getattr(module, "get_config", None)):
            raise ConfigError(
                f"--config: {str(path)!r} defines no get_config(); expected def get_config() -> "
                "ConfigDict"
            )
        config = module.get_config()
        if not isinstance(config, ConfigDict):
            raise ConfigError(
                f"--config: get_config() of {str(path)!r} returns {type(config).__name__}; "
                "expected a ConfigDict, such as that of configs/base.py with changes"
            )
        config = ConfigDict(config.to_dict()).lock()
    for text in overrides:
        override(config, text)
    return config


def _found(path: str | Path) -> Path:
    """The file of a path; of a name such as "cifar10_edm" or "configs/cifar10_edm.py", where there
    is no such file, the shipped one.
    """
    path = Path(path)
    if path.is_file():
        return path
    shipped = SHIPPED / f"{path.stem}.py"
    if path.parent in (Path(), Path("configs")) and shipped.is_file():
        return shipped
    names = [file.stem for file in SHIPPED.glob("*.py")]
    raise ConfigError(
        f"--config: {str(path)!r} is no file{suggestion(path.stem, names)}; expected a "
        "configuration such as configs/digits.py"
    )


def _module(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"config_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise ConfigError(f"--config: {str(path)!r} is no Python file; expected NAME.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@contextmanager
def _said(path: Path) -> Iterator[None]:
    """Turns whatever a configuration file raises into one sentence with its line."""
    try:
        yield
    except ConfigError:
        raise
    except (Exception, SystemExit) as error:
        frames = traceback.extract_tb(error.__traceback__)
        lines = [f.lineno for f in frames if Path(f.filename).resolve() == path.resolve()]
        line = error.lineno if isinstance(error, SyntaxError) else lines[-1] if lines else None
        text = " ".join(str(error.args[0] if error.args else "").split())[:300]
        names = "" if frames[-1].filename.startswith(_ML) else f"{type(error).__name__}: "
        raise ConfigError(
            f"--config: {str(path)!r}{f', line {line}' if line else ''}: {names}{text}; expected a "
            "Python file with get_config() -> ConfigDict"
        ) from None


def override(config: ConfigDict, text: str) -> None:
    """Applies one "key.sub=value" to a configuration in place, keeping the type of the value that
    is there.

    Raises:
      ConfigError: no "=", an unknown key, or a value of another type.
    """
    key, equals, value = text.partition("=")
    if not equals:
        raise ConfigError(f"--config.{key}: no value given; expected --config.{key}=VALUE")
    node, leaf = _walk(config, key)
    old = node[leaf]
    if isinstance(old, ConfigDict):
        raise ConfigError(
            f"--config.{key}: is a group of settings ({', '.join(sorted(old))}); expected one of "
            "its keys"
        )
    node[leaf] = parse(key, value, old)


def _walk(config: ConfigDict, key: str) -> tuple[ConfigDict, str]:
    """The group in which a key lies, and its last name."""
    node: Any = config
    group = config
    parts = key.split(".")
    for i, part in enumerate(parts):
        group, known = node, sorted(node) if isinstance(node, ConfigDict) else []
        if part not in known:
            where = ".".join(parts[:i]) or "the configuration"
            raise ConfigError(
                f"--config.{key}: unknown key {part!r}{_meant(where, part, known)}; {where} has "
                f"{', '.join(known) or 'no sub-keys'}"
            )
        node = group[part]
    return group, parts[-1]


def _meant(group: str, name: str, known: list[str]) -> str:
    """The new name of a renamed setting of a group, else the nearest known one."""
    fields = dataclasses.fields(GROUPS[group]) if group in GROUPS else ()
    new = [field.name for field in fields if field.metadata["was"] == name]
    return f"; it is now {new[0]}" if new else suggestion(name, known)


def spelled(config: ConfigDict) -> list[str]:
    """Every setting as one could type it: ["--config.seed=0", ...]."""
    text = lambda value: ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
    return [
        f"--config.{k}={shlex.quote(text(v)) if v != '' else ''}"
        for k, v in flatten(config.to_dict()).items()
    ]


def changed(config: Config | Mapping[str, Any]) -> list[str]:
    """Lines "key=value" of the settings that differ from those of configs/base.py, in order."""
    defaults = flatten(read(SHIPPED / "base.py").to_dict())
    values = sorted(flatten(config).items())
    return [f"{key}={value!r}" for key, value in values if defaults.get(key) != value]


def to_json(config: Config) -> str:
    """The configuration as JSON, which has no infinity: {"float": "inf"}. from_json gives it back,
    tuples too.
    """
    return json.dumps(_encoded(plain(config)), indent=1, sort_keys=True, allow_nan=False)


def from_json(text: str) -> Config:
    """The configuration of to_json's text, also of an older version of this package."""
    values = _decoded(json.loads(text))  # `make` knows older names
    if "task" not in values and "precondition" not in values:
        values["task"] = "discriminator"  # only a denoiser's configuration had that group
    return resolve(values)


def _encoded(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _encoded(v) for k, v in value.items()}
    if isinstance(value, (tuple, list)):
        return [_encoded(v) for v in value]
    return {"float": str(value)} if isinstance(value, float) and math.isinf(value) else value


def _decoded(value: Any) -> Any:
    if isinstance(value, dict):
        if set(value) == {"float"}:
            return float(value["float"])
        return {k: _decoded(v) for k, v in value.items()}
    return tuple(_decoded(v) for v in value) if isinstance(value, list) else value
