"""What the studies share: train by the package's own loop, once per folder, and measure samples at
several budgets.
"""

import json
import statistics
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ogdm_jax import config as configs
from ogdm_jax import data
from ogdm_jax.metrics import distances as metrics
from ogdm_jax.metrics.features import feature_space
from ogdm_jax.pixels import to_uint8
from ogdm_jax.sampling import generate
from ogdm_jax.sampling import sampler as sampling
from ogdm_jax.training import loop
from ogdm_jax.training.workdir import TrainedModel, open_workdir

CONFIGS = Path(__file__).parent.parent / "configs"
# Constant recipe of every continuation: a decaying rate from the first step, and a moving average
# that starts warm.
TUNING = ("optim.ramp=0 steps", "ema.rampup=0.0", "ema.halflife=2 kimg")


def trained(workdir: Path, config: str, *flags: str) -> TrainedModel:
    """The model of a folder, trained there first if its last checkpoint is missing."""
    settings = configs.load(CONFIGS / f"{config}.py", flags)
    steps = configs.duration(settings.train.duration, settings.data.batch)
    if not (workdir / "checkpoints" / str(steps)).is_dir():
        loop.train(settings, workdir, log=lambda line: None)
    return open_workdir(workdir)


def steps_of(solver: str, evaluations: int) -> int:
    """Sampler steps that cost at most so many network evaluations (Heun: an odd number, 2N - 1)."""
    return {"heun": (evaluations + 1) // 2, "spndm": evaluations - 1}.get(solver, evaluations)


class Measure:
    """Distances of generated images to a data set; compiles each sampler once."""

    def __init__(self, features: str, source: data.Source, num: int):
        self._features = feature_space(features)
        self._real = self._features(source.images)
        self._num = num
        self._samplers: dict[tuple, generate.Images] = {}

    def features_of(self, model: TrainedModel, solver: str, steps: int, seed: int) -> np.ndarray:
        """Features of images from seeds of their own: seed * 100,000, and so on."""
        settings = model.settings(solver=solver, steps=steps, num=self._num)
        key = (solver, steps, model.model.network)
        if key not in self._samplers:
            import jax

            self._samplers[key] = generate.sampler(model.model, settings, jax.devices()[:1])
        seeds = np.arange(self._num) + 100_000 * seed
        labels = generate.labels_for(seeds, model.model.label_dim, None)
        parts = generate.generate(
            self._samplers[key], model.params, model.buffers, seeds, labels, 256
        )
        return self._features(np.concatenate([to_uint8(part) for part in parts]))

    def __call__(self, model: TrainedModel, solver: str, steps: int, seed: int) -> dict[str, float]:
        """fd, precision, recall of `num` images against the whole set."""
        drawn = self.features_of(model, solver, steps, seed)
        precision, recall = metrics.precision_recall(self._real, drawn, 3)
        moments = [metrics.Moments().update(f).finalize() for f in (drawn, self._real)]
        return {
            "fd": float(metrics.frechet_distance(*moments[0], *moments[1])),
            "precision": float(precision),
            "recall": float(recall),
        }


def record(path: Path, **entry: Any) -> None:
    """Appends one JSON line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(json.dumps(entry) + "\n")


def read(path: Path) -> list[dict[str, Any]]:
    """All lines, [] without the file."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def cell(values: Iterable[float], digits: int = 2) -> str:
    """Mean and standard deviation over seeds."""
    values = list(values)
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{spread}"


def table(
    entries: list[Mapping[str, Any]],
    rows: tuple[str, ...],
    column: str,
    value: str,
    digits: int = 2,
) -> str:
    """Markdown: a row for each combination of `rows`, a column for each value of `column`, mean ±
    spread.
    """
    unique = lambda names: list(dict.fromkeys(tuple(e[n] for n in names) for e in entries))
    columns = [c[0] for c in unique((column,))]
    lines = [
        "| " + " | ".join([*rows, *map(str, columns)]) + " |",
        "|" + "---|" * (len(rows) + len(columns)),
    ]
    for row in unique(rows):
        cells = []
        for name in columns:
            values = [
                e[value] for e in entries if e[column] == name and tuple(e[r] for r in rows) == row
            ]
            cells.append(cell(values, digits) if values else "")
        lines.append("| " + " | ".join([*map(str, row), *cells]) + " |")
    return "\n".join(lines)


def evaluations(solver: str, steps: int) -> int:
    return sampling.nfe(solver, steps)
