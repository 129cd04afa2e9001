"""The runs of a study: trained where they are missing, measured where that is missing.

OUT/NAME-seedK/    the training folder of configuration NAME and seed K
OUT/study.json     what was asked for, every measurement, and the summary
OUT/study.md       the summary as a table
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from ogdm_jax import records
from ogdm_jax.config import Config, ConfigError, Sample
from ogdm_jax.methods import discovery
from ogdm_jax.metrics.features import FeatureSpace
from ogdm_jax.metrics.statistics import trained_on
from ogdm_jax.models import Model
from ogdm_jax.sampling import generate
from ogdm_jax.training import checkpoint, loop, resume, steps
from ogdm_jax.training.evaluate import Draw, measure_samplers
from ogdm_jax.training.workdir import TrainedModel, open_workdir

NAME = "study.json"
PLAIN = "plain"  # as a length of the moving average: the one that training keeps
_SPACE = "features_trained_on"  # in a measurement's protocol
APART = 1_000_000  # between the first image seeds of two training seeds
Log = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class Arm:
    """One of the configurations that are compared.

    Attributes:
      name: of the person's choice.
      configs: {seed: its settings}.
      samplers: that were compiled for its model.
    """

    name: str
    configs: Mapping[int, Config]
    samplers: dict[Any, Any] = dataclasses.field(default_factory=dict)

    def folder(self, out: epath.Path, seed: int) -> epath.Path:
        """The training folder of a seed."""
        return out / f"{self.name}-seed{seed}"


@dataclasses.dataclass(frozen=True)
class Way:
    """One way to draw the images of a measurement.

    Attributes:
      checkpoint: its step, "best", or "newest".
      ema: PLAIN, or the relative width of a moving average that is reconstructed.
      sampler: entries of the configuration's sampler that are replaced.
    """

    checkpoint: str
    ema: str
    sampler: Mapping[str, Any]


def length(config: Config) -> int:
    """Optimiser steps of a run."""
    return config.steps(config.train.duration)


def state(arm: Arm, out: epath.Path, seed: int) -> int:
    """The newest complete checkpoint of a run; 0 without any.

    Raises:
      ConfigError: the folder holds a run of other settings.
    """
    folder, config = arm.folder(out, seed), arm.configs[seed]
    done = steps.complete(folder)
    if not done:
        return 0
    try:
        found = checkpoint.find(folder, done[-1], "--out")
        resume.check(folder, found, config, discovery.settings_types())
    except ConfigError as error:
        raise ConfigError(f"{folder}: {error}") from None
    return done[-1]


def check_sampler(settings: Sample, words: Mapping[str, Any], model: Model | None = None) -> None:
    """Raises ConfigError for settings of a sampler that cannot be, with some replaced."""
    generate.check_settings(generate.replaced(settings, words), model)


def train(arm: Arm, out: epath.Path, seed: int, log: Log) -> bool:
    """Trains the run of a seed to its end, from its newest checkpoint; whether anything was left.

    Raises:
      As `training.loop.train`.
    """
    config, folder = arm.configs[seed], arm.folder(out, seed)
    if state(arm, out, seed) >= length(config):
        return False
    log(f"\n{arm.name}, seed {seed}")
    loop.train(config, folder, log)
    return True


@dataclasses.dataclass(frozen=True)
class Ruler:
    """How images are measured.

    Attributes:
      space: the features.
      real: features of the reference [n, dim].
      reference: name of it.
      num: images of a distance.
      draw: model -> its `Draw`.
      about: model -> how its samples are compared (`training.evaluate.compared`).
      vae: of `open_workdir`, for all runs.
      decoder: hash of the autoencoder, where it is another than the one that made the latents.
    """

    space: FeatureSpace
    real: np.ndarray
    reference: str
    num: int
    draw: Callable[[TrainedModel], Draw]
    about: Callable[[TrainedModel], Mapping[str, str]]
    vae: str = ""
    decoder: str = ""

    def protocol(self, trained: TrainedModel, sampler: Sample) -> dict[str, Any]:
        """What has to be equal for a measurement to be the one that is asked for."""
        drawn = {k: v for k, v in vars(sampler).items() if k not in ("num", "every")}
        measured = {"features": self.space.name, "num": self.num, "reference": self.reference}
        compared = {f"compared_{name}": words for name, words in self.about(trained).items()}
        measured |= {"autoencoder": self.decoder} if self.decoder else {}
        if digest := trained_on(self.space):
            measured[_SPACE] = digest
        return drawn | measured | compared | {"step": trained.step}


def measure(
    arm: Arm, out: epath.Path, seed: int, ways: Sequence[Way], ruler: Ruler, results: "Results"
) -> Iterator[tuple[dict[str, Any], bool]]:
    """Yields (report, whether it is new) of a trained run for every way; what was measured before
    is not measured again, and what is new is on disk.

    The images come from seeds of their own for every training seed, the same for all arms.
    """
    first, models = seed * APART, {}
    for way in ways:
        key = (way.checkpoint, way.ema)
        about = {"arm": arm.name, "seed": seed, "checkpoint": way.checkpoint, "ema": way.ema}
        trained = (
            models[key] if key in models else opened(arm, arm.folder(out, seed), *key, ruler.vae)
        )
        models = {key: trained}  # one at a time
        # as asked for now: what is finished keeps the sampler of its training
        sampler = generate.replaced(arm.configs[seed].sample, way.sampler)
        about["protocol"] = ruler.protocol(trained, sampler)
        if before := results.find(**about):
            yield before, False
            continue
        seeds = (np.arange(ruler.num, dtype=np.int64) + first) % 2**32
        draw, measured = ruler.draw(trained), (ruler.space, ruler.real)
        (report,) = measure_samplers(trained, [sampler], *measured, seeds.tolist(), draw)
        results.add(about | report)
        yield results.reports[-1], True


def opened(arm: Arm, folder: epath.Path, checkpoint: str, ema: str, vae: str = "") -> TrainedModel:
    """The model of a run with the weights that a measurement asks for."""
    step = {"newest": None, "best": "best"}.get(checkpoint, checkpoint)
    at = int(step) if step is not None and step.isdecimal() else step
    std = None if ema == PLAIN else float(ema)
    trained = open_workdir(folder, at, field="--out", ema_std=std, vae=vae)
    return dataclasses.replace(trained, samplers=arm.samplers)


class Results:
    """The measurements of a study, on disk as soon as they are made."""

    def __init__(self, out: epath.Path) -> None:
        """Reads those that are there.

        Raises:
          RecordError: the file is none of ours.
        """
        self._path = out / NAME
        self.head: dict[str, Any] = {}
        self.reports: list[dict[str, Any]] = []
        if self._path.exists():
            found = records.read(self._path, dict, "--out").get("reports")
            if not isinstance(found, list) or not all(isinstance(r, dict) for r in found):
                raise records.RecordError(f"--out: {str(self._path)!r} is no study; expected one")
            self.reports = [_numbers(report) for report in found]

    def find(self, **about: Any) -> dict[str, Any] | None:
        """The measurement that is about just this; those of before know no _SPACE."""
        for report in self.reports:
            known = report.get("protocol")
            if isinstance(known, dict) and _SPACE in about["protocol"]:
                known = {_SPACE: about["protocol"][_SPACE]} | known
            if all((report | {"protocol": known}).get(key) == about[key] for key in about):
                return report
        return None

    def add(self, report: dict[str, Any]) -> None:
        """Adds a measurement."""
        self.reports.append(report)
        self.write()

    def forget(self, arm: str, seed: int) -> None:
        """Drops the measurements of a run that was trained anew or further, on disk, too."""
        kept = [r for r in self.reports if (r["arm"], r["seed"]) != (arm, seed)]
        if len(kept) < len(self.reports):
            self.reports = kept
            self.write()

    def write(self, **more: Any) -> None:
        """Writes the file, whole or not at all."""
        records.write(self._path, self.head | more | {"reports": self.reports}, indent=1)


def _numbers(report: dict[str, Any]) -> dict[str, Any]:
    """The words nan, inf and -inf as the numbers they are."""
    odd, words = ("nan", "inf", "-inf"), ("arm", "checkpoint", "ema")
    return {k: float(v) if k not in words and v in odd else v for k, v in report.items()}
