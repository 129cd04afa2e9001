"""What the report of a training folder shows, collected as plain data; html.py renders it."""

import contextlib
import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ogdm_jax import config as configs
from ogdm_jax import models, places
from ogdm_jax.metrics.features import FeatureSpace
from ogdm_jax.report import inputs
from ogdm_jax.training.evaluate import describe_sampler, words_of
from ogdm_jax.training.steps import complete
from ogdm_jax.training.workdir import Path, TrainedModel
from ogdm_jax.typing import PyTree

SHOWN = 64  # images of the grid
TRACED = 3  # seeds of the trajectories
COMPARED, NEIGHBOURS = 8, 5  # samples, and the nearest images of each


@dataclasses.dataclass(frozen=True)
class Nearest:
    """Samples [k,h,w,c], the closest real images [k,m,h,w,c] and their distances [k,m]."""

    samples: np.ndarray
    real: np.ndarray
    distances: np.ndarray


@dataclasses.dataclass(frozen=True)
class Findings:
    """What a report shows; what is None or empty is left out of the page.

    Attributes:
      title: of the page.
      facts: (name, value, note) of the tiles.
      distances: reports of metrics.distance_report with solver, steps and nfe.
      metrics: the lines of metrics.jsonl.
      best: the step whose evaluation in training found the smallest distance.
      samples: uint8 [n,h,w,c].
      real: uint8 [n,h,w,c].
      sampler: how the samples were made, in words.
      nearest: the closest training images in the feature space.
      progress: (step, PNG bytes) of grids that training wrote.
      path: the way of some samples from noise to image.
      config: {"group.key": value}.
      notes: sentences about what could not be read.
      reference: what the real images are, where they are not those that were trained on.
    """

    title: str
    facts: Sequence[tuple[str, str, str]] = ()
    distances: Sequence[Mapping[str, Any]] = ()
    metrics: Sequence[Mapping[str, Any]] = ()
    best: int | None = None
    samples: np.ndarray | None = None
    real: np.ndarray | None = None
    sampler: str = ""
    nearest: Nearest | None = None
    progress: Sequence[tuple[int, bytes]] = ()
    path: Path | None = None
    config: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    notes: Sequence[str] = ()
    reference: str = ""


def collect(
    trained: TrainedModel,
    workdir: str,
    samples: np.ndarray,
    real: np.ndarray,
    space: FeatureSpace,
    features: np.ndarray,
    distances: Sequence[Mapping[str, Any]],
    labels: PyTree = None,
) -> Findings:
    """The findings of a training folder.

    Args:
      trained: its model.
      workdir: the folder.
      samples: uint8 images of the seeds from 0, at least COMPARED of them.
      real: uint8 images of the data.
      space: where distances are measured.
      features: of `real` [n, dim].
      distances: reports, see `Findings`.
      labels: conditions of the first TRACED samples.
    """
    settings, config = trained.settings(), trained.config
    logged, best = inputs.metrics(workdir), inputs.best(workdir, complete(workdir))
    progress = inputs.progress(workdir)
    methods = " + ".join(config.methods) or "plain"
    return Findings(
        title=inputs.printable(f"{_name(workdir)}: {methods} on {config.data.source}"),
        facts=facts(trained, settings),
        distances=distances,
        metrics=logged.values,
        best=best.values,
        samples=samples,
        real=real[np.random.default_rng(0).permutation(len(real))[:SHOWN]],
        sampler=f"{words_of(settings)}, {_cost(settings)} network evaluations",
        nearest=nearest(space, samples[:COMPARED], real, features),
        progress=progress.values,
        path=_path(trained, labels),
        config=configs.flatten(config),
        notes=[*logged.notes, *best.notes, *progress.notes],
    )


def _name(workdir: str) -> str:
    """The name of a folder, of "." too."""
    local = places.is_local(workdir)
    return pathlib.Path(workdir).resolve().name if local else places.place(workdir).name


def facts(trained: TrainedModel, settings: configs.Sample) -> list[tuple[str, str, str]]:
    """(name, value, note) of the checkpoint, the network and the sampler."""
    seen = trained.step * trained.config.data.batch
    height, width, channels = trained.model.image_shape
    classes = f"{trained.model.label_dim} classes" if trained.model.label_dim else "no labels"
    count = models.parameter_count(trained.params)
    return [
        ("checkpoint", f"step {trained.step:,}", f"{seen:,} images seen"),
        ("network", f"{count:,}", f"parameters; {height} x {width} x {channels}, {classes}"),
        ("sampler", words_of(settings), f"{_cost(settings)} evaluations an image"),
    ]


def _cost(settings: configs.Sample) -> str:
    return str(describe_sampler(settings).get("nfe", "as many as needed"))


def nearest(
    space: FeatureSpace, samples: np.ndarray, real: np.ndarray, features: np.ndarray
) -> Nearest:
    """The real images that are closest to each sample in a feature space.

    Args:
      space: where distances are measured.
      samples: uint8 [k,h,w,c].
      real: uint8 [n,h,w,c].
      features: of `real` [n, dim].
    """
    values = space(samples).astype(np.float64)
    far = np.stack([np.linalg.norm(features - row[None], axis=1) for row in values])
    rows = np.argsort(far, axis=1)[:, :NEIGHBOURS]
    return Nearest(samples, real[rows], np.take_along_axis(far, rows, axis=1))


def _path(trained: TrainedModel, labels: PyTree) -> Path | None:
    """The way of the first seeds' images; None where the sampler does not keep it."""
    with contextlib.suppress(configs.ConfigError):
        return trained.path(np.arange(TRACED), labels=labels)
