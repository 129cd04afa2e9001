"""What follows training: a trained model from its folder, and how far its samples are from the data."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from ogdm_jax import data, generate
from ogdm_jax import model as models
from ogdm_jax.config import require
from ogdm_jax.data import Source
from ogdm_jax.diffusion.sampling import nfe
from ogdm_jax.evaluation import report
from ogdm_jax.evaluation.features import distance_report, feature_space
from ogdm_jax.training import checkpoint
from ogdm_jax.typing import PyTree


def open_source(config: ConfigDict) -> Source:
    """The data source of a configuration."""
    require(config.data.memory_limit >= 0, "data.memory_limit", config.data.memory_limit, "GiB, at least 0")
    return data.open_source(
        config.data.source, config.data.data_dir or None, memory_limit=int(config.data.memory_limit * 2**30)
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
        self, solver: str = "", steps: int | None = None, num: int | None = None, eta: float | None = None
    ) -> ConfigDict:
        """config.sample with some entries replaced. Raises ConfigError where they are out of range."""
        settings = ConfigDict(self.config.sample)
        settings.solver = solver or settings.solver
        settings.steps = settings.steps if steps is None else steps
        settings.num = settings.num if num is None else num
        settings.eta = settings.eta if eta is None else eta
        generate.check_settings(settings)
        return settings


def open_workdir(workdir: str | Path, step: int | None = None, weights: str = "ema") -> Trained:
    """Reads a training folder: configuration and weights, never the optimiser.

    Args:
      step: which checkpoint; None = the newest.   weights: "ema" or "params".

    Raises:
      CheckpointError: no such checkpoint, or a damaged one.
    """
    snapshot = checkpoint.find(workdir, step)
    model = models.build(snapshot.config, snapshot.image_shape, snapshot.num_classes)
    params, buffers = jax.eval_shape(model.init, jax.random.key(0))
    params, buffers = checkpoint.load_weights(snapshot, params, buffers, weights)
    return Trained(snapshot.config, model, params, buffers, snapshot.step)


def distance(config: ConfigDict, samples: np.ndarray) -> dict[str, Any]:
    """Frechet distance of uint8 samples to the training data, beside the real-against-real floor of the same size."""
    source = open_source(config)
    features = feature_space(config.evaluate.features or config.data.source)
    reference = np.arange(min(len(source), 50_000))
    return distance_report(features, samples, source.take(reference)["image"])


def evaluate(run, state, workdir: Path, say=print) -> dict[str, Any] | None:
    """Samples from the last moving average, draws the grid and prints the distance, where the configuration says so.

    Returns:
      The report, also written to workdir/evaluation.json; None where config.evaluate.features is "".
    """
    config = run.config
    if not config.evaluate.features:
        return None
    params, buffers = (run.plan.local_copy(tree) for tree in (state.ema, state.buffers))
    if jax.process_index() != 0:
        return None
    num = config.evaluate.num or len(run.source)
    images = generate.sampler(run.model, config.sample, run.plan.local_devices[:1])
    seeds = np.arange(num)
    labels = generate.labels_for(seeds, run.model.label_dim, None)
    batch = min(256, num)
    samples = np.concatenate(
        [report.to_uint8(part) for part in generate.generate(images, params, buffers, seeds, labels, batch)]
    )
    result = distance(config, samples) | {"solver": config.sample.solver, "steps": config.sample.steps}
    grid = workdir / "samples.png"
    report.save_png(grid, report.grid(samples[:64], columns=8, padding=1, scale=max(1, 32 // samples.shape[1])))
    (workdir / "evaluation.json").write_text(json.dumps(result, indent=1) + "\n")
    say(
        f"{result['features']} {result['fd']:.3f} (real against real {result['floor']:.3f}; n = {result['n']}, "
        f"{config.sample.solver}, {nfe(config.sample.solver, config.sample.steps)} network evaluations)\n"
        f"samples: {grid}"
    )
    return result
