"""Where methods are found: the files of this folder, those that other packages name in the entry
point group `ogdm_jax.methods`, and those that a notebook registers.
"""

import dataclasses
import functools
import importlib
import importlib.metadata
import pkgutil
from collections.abc import Callable
from types import ModuleType
from typing import Any

from ogdm_jax import methods
from ogdm_jax.config import Config, ConfigError, check_sense, suggestion
from ogdm_jax.config.whole import GROUPS

GROUP = "ogdm_jax.methods"
_OF_TASKS = (("dg", "discriminator"), ("vae", "autoencoder"))  # groups that tasks have
_REGISTERED: dict[str, ModuleType] = {}


def register(
    name: str,
    settings: type,
    training: Callable[..., Any] | None = None,
    build: Callable[..., Any] | None = None,
) -> None:
    """Makes a method known in this process, as an entry point makes one of a package: a notebook
    names it in `config.methods` from then on. Once more with the same name replaces it.

    Args:
      name: of the method and of its group of settings.
      settings: its dataclass.
      training: (settings, context) -> Slots, of a training method.
      build: (settings, session) -> Guidance, of a sampling method.

    Raises:
      ValueError: a name that a file or a package has taken, or neither function.
    """
    if name in modules() and name not in _REGISTERED:
        raise ValueError(f"name: {name!r} is taken; expected the name of no known method")
    given = {"training": training, "build": build}
    functions = {key: function for key, function in given.items() if function is not None}
    if not functions:
        raise ValueError(f"training, build: neither given for {name!r}; expected one or both")
    module = ModuleType(name)
    vars(module).update(functions, Settings=settings)
    _REGISTERED[name] = module
    modules.cache_clear()


@functools.cache
def modules() -> dict[str, ModuleType]:
    """Every method's module by name: those with `Settings`, and `training(settings, context)` or,
    for sampling, `build(settings, session)`.

    Raises:
      ValueError: two methods of one name.
    """
    found = {
        m.name: importlib.import_module(f"{methods.__name__}.{m.name}")
        for m in pkgutil.iter_modules(methods.__path__)
    }
    for entry in importlib.metadata.entry_points(group=GROUP):
        if entry.name in found:
            raise ValueError(
                f"{GROUP}: {entry.value} brings a method named {entry.name!r}, which is taken; "
                "expected another name"
            )
        found[entry.name] = entry.load()
    found |= _REGISTERED
    return {name: module for name, module in sorted(found.items()) if hasattr(module, "Settings")}


def sampling() -> dict[str, ModuleType]:
    """The sampling methods by name."""
    return {name: module for name, module in modules().items() if hasattr(module, "build")}


def training() -> dict[str, ModuleType]:
    """The training methods by name."""
    return {name: module for name, module in modules().items() if hasattr(module, "training")}


def training_method(name: str) -> ModuleType:
    """The module of a training method. Raises ConfigError with the known names if there is none."""
    known = training()
    if name not in known:
        raise ConfigError(
            f"config.methods: unknown method {name!r}{suggestion(name, known)}; expected some of "
            f"{', '.join(known)}"
        )
    return known[name]


def settings_types() -> dict[str, type]:
    """{training method: the dataclass of its settings}."""
    return {name: module.Settings for name, module in training().items()}


def defaults() -> dict[str, dict[str, Any]]:
    """The settings of every training method, by name: groups of the base configuration."""
    return {name: dataclasses.asdict(kind()) for name, kind in settings_types().items()}


def check_settings(config: Config) -> None:
    """Raises ConfigError for an unknown method or group, a setting of any method that is out of
    range, and settings that contradict each other.
    """
    for name in config.methods:
        training_method(name)
    kinds = settings_types()
    for name, kind in kinds.items():
        config.settings(name, kind)
    for name in config.others:
        if name not in kinds and (name, config.task) not in _OF_TASKS:
            near = suggestion(name, [*kinds, *GROUPS])
            raise ConfigError(f"config.{name}: no group of settings and no method{near}")
    check_sense(config)
