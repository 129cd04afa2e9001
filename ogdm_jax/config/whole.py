"""All settings of a run: the groups and those of methods, typed, nested or flat."""

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeVar

from ogdm_jax.brief import brief
from ogdm_jax.config.diffusion import Noise, Precondition
from ogdm_jax.config.fields import ConfigError, check, duration, require, setting, suggestion
from ogdm_jax.config.groups import Data, Ema, Evaluate, Init, Log, Optim, Parallel, Sample, Train
from ogdm_jax.config.network import Network

Settings = TypeVar("Settings")


@dataclasses.dataclass(frozen=True)
class Config:
    """All settings of a run; nothing behind the entry points reads anything else.

    Attributes:
      others: {method: its settings as plain values}; `Config.settings` makes them the method's own
        dataclass.
    """

    seed: int = setting(0, "of every draw", least=0, most=2**32 - 1, decided=True)
    task: str = setting(
        "denoiser",
        "what is trained: a denoiser, a discriminator that guides one, or an autoencoder",
        choices=("denoiser", "discriminator", "autoencoder"),
    )
    methods: tuple[str, ...] = setting(
        (), "training methods that are on, by name, with commas between them", decided=True
    )
    data: Data = Data()
    network: Network = Network()
    precondition: Precondition = Precondition()
    noise: Noise = Noise()
    optim: Optim = Optim()
    ema: Ema = Ema()
    init: Init = Init()
    train: Train = Train()
    parallel: Parallel = Parallel()
    log: Log = Log()
    sample: Sample = Sample()
    evaluate: Evaluate = Evaluate()
    others: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    __repr__ = brief

    def __post_init__(self) -> None:
        check(self, "")
        once = "each method once"
        require(len(set(self.methods)) == len(self.methods), "methods", self.methods, once)
        for key, text in flatten(self).items():
            if key in DURATIONS and (key, text) != ("optim.decay", WHOLE_RUN):
                duration(text, self.data.batch, f"config.{key}")
        every, features = self.evaluate.every, self.evaluate.features
        if self.steps(every) and not (features or self.data.heldout):
            need = "'0 steps' while evaluate.features and data.heldout are ''"
            require(False, "evaluate.every", every, need)

    def steps(self, text: str) -> int:
        """Optimiser steps of one of this run's durations."""
        text = self.train.duration if text == WHOLE_RUN else text
        return duration(text, self.data.batch)

    def settings(self, name: str, kind: type[Settings]) -> Settings:
        """The group of a method as the dataclass that the method declares, checked.

        Raises:
          ConfigError: an unknown key or a value out of range.
        """
        return make(kind, self.others.get(name, {}), name)


GROUPS: dict[str, Any] = {
    field.name: type(field.default)
    for field in dataclasses.fields(Config)
    if dataclasses.is_dataclass(field.default)
}
WHOLE_RUN = "train.duration"  # as a value of optim.decay
DURATIONS = (
    *("optim.ramp", "optim.decay", "ema.halflife", "ema.snapshots", "log.every", "sample.every"),
    *("evaluate.every", "train.duration", "train.save_every", "train.keep_every"),
)


def make(kind: type[Settings], values: Mapping[str, Any], group: str) -> Settings:
    """A dataclass of settings from the values of a group; what is not given keeps its default.

    Raises:
      ConfigError: a key that the dataclass does not have, with the nearest that it has; a value out
        of range.
    """
    fields = dataclasses.fields(kind)  # type: ignore[arg-type]
    known = [field.name for field in fields]
    older = {field.metadata.get("was", ""): field.name for field in fields}
    values = {older.get(name, name): value for name, value in values.items()}
    for name in values:
        if name not in known:
            key = f"{group}.{name}" if group else name
            raise ConfigError(
                f"config.{key}: unknown key {name!r}{suggestion(name, known)}; "
                f"{group or 'the configuration'} has {', '.join(sorted(known))}"
            )
    return kind(**values)


def resolve(values: Mapping[str, Any]) -> Config:
    """The typed settings of nested plain values: {"seed": 0, "data": {"batch": 64}, ...}. Groups
    that are not declared here are methods' own.

    Raises:
      ConfigError: as `make`.
    """
    top: dict[str, Any] = {}
    others: dict[str, Mapping[str, Any]] = {}
    for name, value in values.items():
        if name in GROUPS:
            require(isinstance(value, Mapping), name, value, "a group of settings")
            top[name] = make(GROUPS[name], value, name)
        elif isinstance(value, Mapping):
            if name != "others":  # folders of before have an empty group of this name
                others[name] = value
        else:
            top[name] = value
    return make(Config, top | {"others": others}, "")


def plain(config: Config) -> dict[str, Any]:
    """Nested plain values of a configuration, those of methods at the top: what `resolve` takes."""
    values = dataclasses.asdict(config)
    others = values.pop("others")
    return {**values, **others}


def replace(config: Config, changes: Mapping[str, Any]) -> Config:
    """The configuration with other values, {"optim.accumulate": 2}; it is checked anew."""
    values = plain(config)
    for key, value in changes.items():
        group, _, leaf = key.rpartition(".")
        (values[group] if group else values)[leaf] = value
    return resolve(values)


def flatten(config: Config | Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"group.key": value} of every leaf."""
    values = plain(config) if isinstance(config, Config) else config
    found: dict[str, Any] = {}
    for key, value in values.items():
        nested = isinstance(value, Mapping)
        found |= flatten(value, f"{prefix}{key}.") if nested else {prefix + key: value}
    return found
