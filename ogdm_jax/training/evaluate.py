"""How far a model's samples are from its data, measured while it trains and after it."""

import dataclasses
import functools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils

from ogdm_jax import data, models, places, records
from ogdm_jax.config import Config, ConfigError, Sample, require
from ogdm_jax.data import Source, pictures
from ogdm_jax.metrics import networks
from ogdm_jax.metrics.distances import Moments, frechet_distance
from ogdm_jax.metrics.features import FeatureSpace, distance_report, feature_space
from ogdm_jax.pixels import to_uint8
from ogdm_jax.sampling import adaptive, generate
from ogdm_jax.sampling.churn import ChurnRule
from ogdm_jax.sampling.guidance import Guidance
from ogdm_jax.sampling.sampler import nfe
from ogdm_jax.training import checkpoint, decoding, logs, texts
from ogdm_jax.training import run as runs
from ogdm_jax.training.evaluations import SAMPLER
from ogdm_jax.training.workdir import TrainedModel, open_pixels, open_source
from ogdm_jax.typing import PyTree

Draw = Callable[..., Iterable[np.ndarray]]  # (settings, seeds, title, counts=None) -> batches
MOST_KEPT = 50_000  # samples whose features are in memory at a time
SHOWN = 64  # images of an evaluation's samples.png
FEWEST = 6  # samples of a distance: more than the neighbours that precision and recall look at
NETWORKS = ("lite0", "inception")  # feature spaces that are no labelled source
_PART = 4096  # images that are read at a time for their labels
_GATHERED = 1 << 28  # bytes that processes exchange at a time: all of them are on every device then


def space_of(config: Config, images: Source | None = None) -> FeatureSpace:
    """The feature space in which a configuration measures distances; without a name of one that of
    the images' labels (None: of config.data.source).
    """
    name, weights = config.evaluate.features, config.evaluate.weights or None
    if name in NETWORKS:
        return feature_space(name, weights)
    return feature_space(_labelled(config) if name else images or open_source(config))


def _labelled(config: Config, **how: Any) -> Source:
    """The set that config.evaluate.features names, from the folder and in the size of the data."""
    settings = config.data
    size = (settings.resolution or None, settings.channels or None)
    return data.open_source(config.evaluate.features, settings.data_dir or None, *size, **how)


def references(source: Source) -> np.ndarray:
    """uint8 images that samples are compared with: all of a source, of a large one 50,000 that are
    spread evenly over it.
    """
    return source.take(data.spread(len(source), decoding.MOST))["image"]


def reference_part(source: Source) -> dict[str, str]:
    """What a report says where samples are compared with a part of a source; {} where with all."""
    if len(source) <= decoding.MOST:
        return {}
    return {"reference": f"{decoding.MOST:,} of {len(source):,} images, spread evenly"}


def shared_conditions(
    source: Source, model: models.Model, names: Sequence[str] = ()
) -> dict[str, str]:
    """What a report says where samples have labels of a source, see `conditions`; else {}."""
    if model.text is None and not _same_labels(source, model, names):
        return {}
    return {"conditions": "as frequent as in the reference"}


def compared(source: Source, model: models.Model, names: Sequence[str] = ()) -> dict[str, str]:
    """Both: what a report says of how samples are compared with a source."""
    return reference_part(source) | shared_conditions(source, model, names)


def _same_labels(source: Source, model: models.Model, names: Sequence[str]) -> bool:
    """Whether the labels of a source are conditions of a model; names: of the model's classes."""
    alike = not (names and source.class_names) or tuple(names) == tuple(source.class_names)
    return 0 < model.label_dim == source.num_classes and alike


def conditions(
    source: Source,
    model: models.Model,
    seeds: Sequence[int] | np.ndarray,
    names: Sequence[str] = (),
) -> PyTree:
    """Conditions of samples that are compared with a source: seed i has the label of one of its
    images, so that classes are as frequent in both. Which image that is depends on the seed and on
    the size of the source alone, and as many consecutive seeds have each image once.

    Args:
      source: the images; of a model of texts, tokenised.
      model: of the samples.
      seeds: [n].
      names: of the model's classes, where known. Where a source has others, classes are uniform.
    """
    seeds = np.asarray(seeds)
    rows = np.random.default_rng(0).permutation(len(source))[seeds % len(source)]
    if model.text is not None:
        return texts.of_rows(source, rows)
    if not _same_labels(source, model, names):
        return generate.labels_for(seeds, model.label_dim, None)
    if source.labels is not None:
        return source.labels[rows]
    parts = [rows[start : start + _PART] for start in range(0, len(rows), _PART)]
    return np.concatenate([source.take(part)["label"] for part in parts])


def ruler(
    config: Config, num: int, vae: str = "", source: Source | None = None
) -> Callable[..., dict[str, Any]]:
    """`distance` of --num samples to the data of a configuration, which are opened now, as is the
    feature space; vae and source: as those of `open_pixels`.

    Raises:
      ValueError: they cannot be, or too few samples.
    """
    check_number(num, "--num")
    pixels = open_pixels(config, vae, source)
    return functools.partial(distance, space_of(config, pixels), pixels)


def distance(space: FeatureSpace, source: Source, samples: Iterable[np.ndarray]) -> dict[str, Any]:
    """The distance report of uint8 samples, batch by batch, against a source.

    Of more than MOST_KEPT samples only "fd_all" sees the rest; "n_kept" says how many the other
    figures are of.
    """
    kept, everything, beyond = [], Moments(), 0
    for images in samples:
        values = space(images)
        everything.update(values)
        kept.append(values[: max(0, MOST_KEPT - everything.count + len(values))])
        beyond = everything.count - MOST_KEPT
    reference = space(references(source))
    report = distance_report(space, np.concatenate(kept), reference) | reference_part(source)
    if beyond > 0:
        whole = Moments().update(reference).finalize()
        fd_all = frechet_distance(*everything.finalize(), *whole)
        report |= {"n_samples": everything.count, "n_kept": MOST_KEPT, "fd_all": fd_all}
    return report


def check_number(num: int, field: str) -> None:
    """Raises ConfigError for a number of samples (0: as many as there are images) of which no
    distance can be measured; field: the setting or option that it is of.
    """
    require(num == 0 or num >= FEWEST, field, num, f"at least {FEWEST} images of a distance")


def check_evaluation(config: Config) -> tuple[int, int, int] | None:
    """The shape of the images that the feature space takes; None where it takes any.

    Raises:
      ConfigError: the feature space cannot be (no such source, one without classes, no weights), or
        too few samples.
    """
    settings = config.evaluate
    if not settings.features:
        return None
    check_number(settings.num, "evaluate.num")
    if settings.features == "lite0":
        try:
            networks.lite0_file()
        except ValueError as error:
            raise ConfigError(f"config.evaluate.features: {error}") from None
    if settings.features == "inception":
        found = places.local(settings.weights, "config.evaluate.weights").is_file()
        file = "the weights file of Inception, which evaluate.features names"
        require(found, "evaluate.weights", settings.weights, file)
    if settings.features in NETWORKS:
        return None
    try:
        source = _labelled(config, memory_limit=0)
    except data.SourceError as error:
        raise ConfigError(f"config.evaluate.features: {error}, or lite0, or inception") from None
    labelled = source.num_classes > 1 and not source.label_size and source.latents is None
    spaces = "a source of images with two or more classes, lite0 or inception"
    require(labelled, "evaluate.features", settings.features, spaces)
    return source.shape


def check_images(run: runs.AnyRun, shape: tuple[int, int, int] | None) -> None:
    """Raises ConfigError where the images of a run cannot be measured: too few of them, or of
    another shape than the one that `check_evaluation` gave.
    """
    name = run.config.evaluate.features
    if not name:
        return
    few = f"'' with the {len(run.source)} images of data.source, or at least {2 * FEWEST} of them"
    require(len(run.source) >= 2 * FEWEST, "evaluate.features", name, few)
    own = run.source.shape
    if run.source.latents is not None and run.decoder is not None:
        own = run.decoder.network.picture_shape(own)
    words = f"images of {own} (height, width, channels), as this run makes, and not of {shape}"
    require(shape in (None, own), "evaluate.features", name, words)


class Evaluator:
    """Draws samples of a model and measures how far they are from the data of a run.

    What stays the same is made once: the compiled sampler, the feature space, the features of the
    data. All processes sample their share of the seeds; the lead process measures, and all get its
    report. An image depends on its seed alone, so all evaluations of a run see the same noise.
    """

    def __init__(
        self, run: runs.AnyRun, model: models.Model, churn: ChurnRule | None = None
    ) -> None:
        """Nothing is compiled or read yet.

        Args:
          run: has the data, the plan, and the groups sample and evaluate.
          model: what is sampled; in a discriminator's run that is the prior's.
          churn: of the sampler, where no guidance brings it.
        """
        self._run, self._model, self._churn = run, model, churn
        self._sampler: generate.Images | None = None
        self._counts: list[np.ndarray] = []

    def measure(
        self, step: int, params: PyTree, buffers: PyTree, guidance: Sequence[Guidance] = ()
    ) -> tuple[dict[str, Any], np.ndarray]:
        """The distance of samples to the data. Every process of the run has to call it.

        Args:
          step: of the run, for the report.
          params: of the model, in this process.
          buffers: of the model, in this process.
          guidance: methods; from call to call only their constants may change.

        Returns:
          The distance report with step and sampler, and the first images, uint8 [n,h,w,c]: both in
          every process.
        """
        images = self.samples(params, buffers, guidance)
        shown = images[:SHOWN].copy()  # not a view that keeps all of them
        report = {}
        if jax.process_index() == 0:
            report = {"step": step} | distance_report(self._space, images, self._reference)
            report |= compared(self._run.source, self._model)
            report |= describe_sampler(self._run.config.sample, self._counts)
            report[SAMPLER] = _others(self._run.config.sample)
        if jax.process_count() == 1:
            return report, shown
        text = np.zeros(1 << 14, np.uint8)
        encoded = np.frombuffer(json.dumps(report).encode(), np.uint8)
        text[: len(encoded)] = encoded
        text = np.asarray(multihost_utils.broadcast_one_to_all(text))
        return json.loads(text.tobytes().rstrip(b"\0")), shown

    def samples(
        self, params: PyTree, buffers: PyTree, guidance: Sequence[Guidance] = ()
    ) -> np.ndarray:
        """uint8 images of the seeds from 0, in every process of the run; see `measure`."""
        index, count = jax.process_index(), jax.process_count()
        num = self._run.config.evaluate.num or min(len(self._run.source), decoding.MOST)
        mine = np.resize(np.arange(num)[index::count], -(-num // count))  # as many in every process
        drawn = self._draw(mine, params, buffers, guidance)
        images = np.concatenate([to_uint8(part) for part in drawn])
        if count == 1:
            return images
        rows = max(_GATHERED // (count * images[0].nbytes), 1)
        parts = (images[at : at + rows] for at in range(0, len(images), rows))
        parts = [np.asarray(multihost_utils.process_allgather(part)) for part in parts]
        everything = np.concatenate(parts, axis=1)  # [processes, share, ...]
        return everything.swapaxes(0, 1).reshape(-1, *images.shape[1:])[:num]

    @functools.cached_property
    def _space(self) -> FeatureSpace:
        return space_of(self._run.config)

    @functools.cached_property
    def _reference(self) -> np.ndarray:
        """The data's features [n, dim]."""
        return self._space(references(decoding.pixels(self._run.source, lambda: self._run.decoder)))

    def _draw(
        self, seeds: np.ndarray, params: PyTree, buffers: PyTree, guidance: Sequence[Guidance]
    ) -> Iterator[np.ndarray]:
        """Yields this process's images of the seeds, from its own devices."""
        devices = self._run.plan.local_devices
        model, buffers = decoding.attach(self._model, buffers, self._run.decoder)
        whole, divided = generate.shardings(devices)
        params, buffers = jax.device_put(jax.tree.map(np.asarray, (params, buffers)), whole)
        guidance = [
            dataclasses.replace(method, constants=jax.device_put(method.constants, whole))
            for method in guidance
        ]
        if self._sampler is None:
            settings = self._run.config.sample
            self._sampler = generate.sampler(model, settings, devices, self._churn, guidance)
        # Rows are placed here: between processes jit puts no host array on several devices.
        compiled, placed = self._sampler, lambda tree: jax.device_put(tree, divided)
        sampler = lambda params, buffers, seeds, labels, constants, rows: compiled(
            params, buffers, placed(seeds), placed(labels), constants, placed(rows)
        )
        labels = conditions(self._run.source, self._model, seeds)
        batch = generate.batch_size(model, len(seeds), len(devices))
        weights, self._counts = (params, buffers), []
        counts = self._counts
        return generate.generate(sampler, *weights, seeds, labels, batch, guidance, counts=counts)


def write_report(workdir: epath.Path, report: Mapping[str, Any], images: np.ndarray) -> None:
    """The lead process writes workdir/samples.png and, as workdir/evaluation.json, the report."""
    if jax.process_index() == 0:
        pictures.save_png(workdir / "samples.png", pictures.sheet(images, columns=8))
        records.write(workdir / "evaluation.json", report, indent=1)


def describe_sampler(settings: Sample, counts: Sequence[np.ndarray] = ()) -> dict[str, Any]:
    """{"solver", "steps", "nfe"} of config.sample, as they stand beside a distance.

    Args:
      settings: of the sampler.
      counts: of dopri5, the network evaluations of each image that this process drew, see
        `generate.generate`. Then "nfe" is their mean, to the nearest whole number, "nfe_range" the
        fewest and most of an image, and "rtol" and "atol" are in the place of "steps".
    """
    if settings.solver != adaptive.NAME:
        evaluations = nfe(settings.solver, settings.steps, **settings.options)
        return {"solver": settings.solver, "steps": settings.steps, "nfe": evaluations}
    how: dict[str, Any] = {"solver": settings.solver, "rtol": settings.rtol, "atol": settings.atol}
    return how | (evaluations_of(np.concatenate(counts)) if counts else {})


def _others(settings: Sample) -> dict[str, Any]:
    """The sampler's settings beside solver and steps that are not as by default."""
    said = ("num", "every", "solver", "steps")
    found = {name: value for name, value in vars(settings).items() if name not in said}
    return {name: value for name, value in found.items() if value != getattr(Sample, name)}


def evaluations_of(counts: np.ndarray) -> dict[str, Any]:
    """{"nfe", "nfe_range"} of the network evaluations of each image, see `describe_sampler`."""
    return {"nfe": round(float(counts.mean())), "nfe_range": [int(counts.min()), int(counts.max())]}


def words_of(settings: Sample, counts: Sequence[np.ndarray] = ()) -> str:
    """The sampler for people, such as "heun, 18 steps"."""
    how = describe_sampler(settings, counts)
    if "steps" in how:
        return f"{settings.solver}, {settings.steps} steps"
    if "nfe" not in how:
        return f"{settings.solver}, tolerance {settings.rtol:g}"
    low, high = how["nfe_range"]
    return f"{settings.solver}, {how['nfe']} network evaluations an image ({low} to {high})"


def note(report: Mapping[str, Any], saved: checkpoint.Checkpoints, writer: logs.Writer) -> str:
    """Writes a report to the log's files, and notes in `saved` which checkpoint is the best.

    Returns:
      The report in one line.
    """
    best = saved.record(report)
    logged = {report["features"]: report["fd"]} | {
        name: report[name] for name in ("floor", "n", "kid", "precision", "recall")
    }
    writer.write(report["step"], {f"evaluate/{name}": value for name, value in logged.items()})
    sentence = (
        f"{report['features']} {report['fd']:.3f} (real against real {report['floor']:.3f}; "
        f"n = {report['n']}, {report['solver']}, {report['nfe']} network evaluations)"
    )
    if "reference" in report:
        sentence += f"; against {report['reference']}"
    if not best:
        sentence += ", not the best"
    if "unguided" in report:
        sentence += f"; weight {report['weight']:g}, unguided {report['unguided']:.3f}"
    return sentence


def measure_samplers(
    trained: TrainedModel,
    choices: Iterable[Sample],
    space: FeatureSpace,
    reference: np.ndarray,
    seeds: Sequence[int],
    draw: Draw,
) -> list[dict[str, Any]]:
    """The distance report of a model at each of several settings of the sampler.

    Args:
      trained: the model.
      choices: settings, see `TrainedModel.settings`.
      space: where distances are measured.
      reference: features [n, dim] of the real images.
      seeds: of the images of a distance.
      draw: (settings, seeds, title, counts) -> batches of uint8 images; see `generate.generate`.
    """
    reports = []
    for settings in choices:
        counts: list[np.ndarray] = []
        title = words_of(settings)
        values = [space(part) for part in draw(settings, seeds, title, counts)]
        report = distance_report(space, np.concatenate(values), reference)
        reports.append({"step": trained.step} | describe_sampler(settings, counts) | report)
    return reports
