"""A trained model from its folder, and how far its samples are from the data: during training and
after it.
"""

import dataclasses
import functools
import json
import os
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from ogdm_jax import config as configs
from ogdm_jax import data, models, places
from ogdm_jax.config import require
from ogdm_jax.data import Source, pictures
from ogdm_jax.methods import contract as slots
from ogdm_jax.metrics.features import FeatureSpace, distance_report, feature_space
from ogdm_jax.pixels import to_uint8
from ogdm_jax.sampling import generate
from ogdm_jax.sampling.sampler import nfe
from ogdm_jax.training import checkpoint, logs
from ogdm_jax.training import run as runs
from ogdm_jax.training import state as states
from ogdm_jax.typing import PyTree

SHOWN = 64  # images of an evaluation's samples.png


def open_source(config: ConfigDict) -> Source:
    """The data source of a configuration. Raises ConfigError or SourceError for what cannot be."""
    settings = config.data
    resolution, channels = (
        settings.get("resolution", 0),
        settings.get("channels", 0),
    )  # older runs do not say
    require(
        settings.memory_limit >= 0, "data.memory_limit", settings.memory_limit, "GiB, at least 0"
    )
    workers = "a number of processes, 0 for threads, or -1 for half of the cores"
    require(settings.get("workers", -1) >= -1, "data.workers", settings.get("workers", -1), workers)
    require(
        resolution >= 0,
        "data.resolution",
        resolution,
        "a number of pixels, or 0 for images as stored",
    )
    require(channels in (0, 1, 3), "data.channels", channels, "1, 3, or 0 for images as stored")
    limit = int(settings.memory_limit * 2**30)
    return data.open_source(
        settings.source, settings.data_dir or None, resolution or None, channels or None, limit
    )


@dataclasses.dataclass(frozen=True)
class Trained:
    """A trained model: all that sampling needs."""

    config: ConfigDict
    model: models.Model
    params: PyTree
    buffers: PyTree
    step: int

    def settings(
        self,
        solver: str = "",
        steps: int | None = None,
        num: int | None = None,
        eta: float | None = None,
        grid: str = "",
    ) -> ConfigDict:
        """config.sample with some entries replaced. Raises ConfigError where they are out of
        range.
        """
        settings = ConfigDict(
            self.config.sample
        ).unlock()  # older folders have neither eta nor grid
        settings.solver = solver or settings.solver
        settings.steps = settings.steps if steps is None else steps
        settings.num = settings.num if num is None else num
        settings.eta = settings.get("eta", 0.0) if eta is None else eta
        settings.grid = grid or settings.get("grid", "edm")
        generate.check_settings(settings, self.model)
        return settings.lock()


def open_workdir(
    workdir: str | os.PathLike,
    step: int | str | None = None,
    weights: str = "ema",
    field: str = "--workdir",
) -> Trained:
    """Reads a training folder: configuration and weights, never the optimiser.

    Args:
      step: which checkpoint; None = the newest, "best" = that of the smallest distance.   weights:
        "ema" or "params".
      field: the setting that named the folder, for messages.

    Raises:
      CheckpointError: no such checkpoint, or a damaged one.
    """
    snapshot = checkpoint.find(workdir, step, field)
    if "precondition" not in snapshot.config:
        raise checkpoint.CheckpointError(
            f"{field}: {str(workdir)!r} holds a discriminator; expected the folder of a denoiser"
        )
    model = models.build(snapshot.config, snapshot.image_shape, snapshot.num_classes)
    params, buffers = jax.eval_shape(model.init, jax.random.key(0))
    params, buffers = checkpoint.load_weights(snapshot, params, buffers, weights)
    return Trained(snapshot.config, model, params, buffers, snapshot.step)


def space_of(config: ConfigDict) -> FeatureSpace:
    """The feature space in which a configuration measures distances."""
    return feature_space(
        config.evaluate.features or config.data.source, config.evaluate.get("weights") or None
    )


def references(source: Source) -> np.ndarray:
    """uint8 images that samples are compared with: all of the source, at most 50,000 of them."""
    return source.take(np.arange(min(len(source), 50_000)))["image"]


def distance(config: ConfigDict, samples: np.ndarray) -> dict[str, Any]:
    """Frechet distance of uint8 samples to the training data, beside the real-against-real floor of
    the same size.
    """
    return distance_report(space_of(config), samples, references(open_source(config)))


def check_evaluation(config: ConfigDict) -> None:
    """Raises ConfigError for a schedule without a feature space, or one whose weights are not
    there.
    """
    settings = config.evaluate
    every = configs.duration(settings.every, config.data.batch, "config.evaluate.every")
    require(
        not every or settings.features,
        "evaluate.every",
        settings.every,
        "'0 steps' while evaluate.features is ''",
    )
    require(settings.keep_best >= 0, "evaluate.keep_best", settings.keep_best, "at least 0")
    require(settings.num >= 0, "evaluate.num", settings.num, "at least 0")
    if settings.features == "inception":
        found = places.local(settings.weights, "config.evaluate.weights").is_file()
        require(found, "evaluate.weights", settings.weights, "the weights file of Inception")


class Evaluator:
    """Samples from the moving average and measures how far they are from the data.

    What stays the same is made once: the compiled sampler, the feature space, the features of the
    data. All processes sample their share of the seeds; the lead process measures, and all get its
    report. An image depends on its seed alone, so one run's evaluations see the same noise at every
    step.
    """

    def __init__(self, run: runs.Run, workdir: epath.Path):
        self.run, self._workdir, self._sampler = run, workdir, None

    def __call__(self, state: states.TrainState) -> dict[str, Any]:
        """The distance report with the step and the sampler. Every process of the run has to call
        it.

        Writes workdir/samples.png and, as evaluation.json, the report.
        """
        return self._write(*self._measure(state))

    def _measure(self, state: states.TrainState) -> tuple[dict[str, Any], np.ndarray]:
        """(report, the first images) in every process of the run, which all have to call it;
        nothing is written.
        """
        images = self._samples(state)
        shown = images[:SHOWN].copy()  # not a view that keeps all of them
        report = self._report(images, int(state.step)) if jax.process_index() == 0 else {}
        if jax.process_count() == 1:
            return report, shown
        text = np.zeros(1 << 14, np.uint8)
        said = np.frombuffer(json.dumps(report).encode(), np.uint8)
        text[: len(said)] = said
        text = np.asarray(multihost_utils.broadcast_one_to_all(text))
        return json.loads(text.tobytes().rstrip(b"\0")), shown

    def _write(self, report: dict[str, Any], images: np.ndarray) -> dict[str, Any]:
        """The report, which the lead process writes beside its images."""
        if jax.process_index() == 0:
            pictures.save_png(self._workdir / "samples.png", pictures.sheet(images, columns=8))
            with places.written(self._workdir / "evaluation.json") as new:
                new.write_text(json.dumps(report, indent=1) + "\n")
        return report

    def _samples(self, state: states.TrainState) -> np.ndarray:
        """uint8 images of seeds 0 to num - 1."""
        run, index, count = self.run, jax.process_index(), jax.process_count()
        num = run.config.evaluate.num or len(run.source)
        mine = np.resize(np.arange(num)[index::count], -(-num // count))  # as many in every process
        devices = run.plan.local_devices
        mesh = Mesh(np.asarray(devices), ("images",))
        place, divided = (
            NamedSharding(mesh, PartitionSpec()),
            NamedSharding(mesh, PartitionSpec("images")),
        )
        trees = [jax.tree.map(np.asarray, tree) for tree in self._weights(state)]
        params, buffers = jax.device_put(trees, place)
        guidance = [
            dataclasses.replace(g, frozen=jax.device_put(g.frozen, place))
            for g in self._guidance(state)
        ]
        if self._sampler is None:
            self._sampler = generate.sampler(
                self._model, run.config.sample, devices, self._churn, guidance
            )

        def sampler(params, buffers, seeds, labels, frozen, given):
            """Rows placed by hand: between processes jit places no host arrays on several
            devices.
            """
            seeds, labels, given = jax.device_put((seeds, labels, given), divided)
            return self._sampler(params, buffers, seeds, labels, frozen, given)

        labels = generate.labels_for(mine, self._model.label_dim, None)
        batch = len(devices) * min(256, -(-len(mine) // len(devices)))
        parts = generate.generate(sampler, params, buffers, mine, labels, batch, guidance)
        images = np.concatenate([to_uint8(part) for part in parts])
        if count == 1:
            return images
        everything = np.asarray(
            multihost_utils.process_allgather(images)
        )  # [processes, share, ...]
        return everything.swapaxes(0, 1).reshape(-1, *images.shape[1:])[:num]

    def _report(self, images: np.ndarray, step: int) -> dict[str, Any]:
        settings = self.run.config.sample
        report = {"step": step} | distance_report(self._space, images, self._reference)
        evaluations = nfe(settings.solver, settings.steps)
        return report | {"solver": settings.solver, "steps": settings.steps, "nfe": evaluations}

    # What another kind of run samples with: DG's discriminator guides its prior
    # (training/discriminator.py).

    @property
    def _model(self) -> models.Model:
        return self.run.model

    @property
    def _churn(self) -> Any:
        return None

    def _weights(self, state: states.TrainState) -> tuple[PyTree, PyTree]:
        return self.run.plan.local_copy(state.ema), self.run.plan.local_copy(state.buffers)

    def _guidance(self, state: states.TrainState) -> tuple[slots.Guidance, ...]:
        return ()

    @functools.cached_property
    def _space(self) -> FeatureSpace:
        return space_of(self.run.config)

    @functools.cached_property
    def _reference(self) -> np.ndarray:
        return self._space(references(self.run.source))


def evaluations(
    evaluator: Evaluator,
    workdir: epath.Path,
    saved: checkpoint.Checkpoints,
    writer: logs.Writer,
    say: Callable[[str], None],
) -> Callable[[states.TrainState], None]:
    """What the loop calls to evaluate: measures, logs, and notes in `saved` which checkpoint is the
    best.
    """
    run = evaluator.run

    def evaluate(state: states.TrainState) -> None:
        if not run.config.evaluate.features:
            return
        report = evaluator(state)
        best = saved.record(report)
        logged = {report["features"]: report["fd"]} | {
            k: report[k] for k in ("floor", "n", "kid", "precision", "recall")
        }
        writer.write(report["step"], {f"evaluate/{name}": value for name, value in logged.items()})
        say(
            f"{report['features']} {report['fd']:.3f} (real against real {report['floor']:.3f}; n "
            f"= {report['n']}, "
            f"{report['solver']}, {report['nfe']} network "
            f"evaluations){'' if best else ', not the best'}"
            + (
                f"; weight {report['weight']:g}, unguided {report['unguided']:.3f}"
                if "unguided" in report
                else ""
            )
            + f"\nsamples: {workdir / 'samples.png'}"
        )

    return evaluate
