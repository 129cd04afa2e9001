"""Samples of the prior, which DG's discriminator learns to tell from real images.

Samples are drawn once and stored as uint8 with a record of their origin; those of a run that is
stopped meanwhile are kept. A discriminator corrects
one model under one sampler, so stored samples of another checkpoint, solver or number of steps are
refused. Real images are uint8, too: a discriminator could tell other samples by their floats.
"""

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath

from ogdm_jax import cluster, places, records
from ogdm_jax.config import Config, ConfigError, Sample, require
from ogdm_jax.config.groups import GRID_OPTIONS
from ogdm_jax.data import Source, from_arrays, npz, output
from ogdm_jax.data.arrays import DAMAGED
from ogdm_jax.discriminator.settings import of
from ogdm_jax.latents import Latents
from ogdm_jax.methods import cfg
from ogdm_jax.models import fingerprint, own_buffers
from ogdm_jax.sampling import generate
from ogdm_jax.sampling.guidance import Guidance
from ogdm_jax.training.evaluate import (
    conditions,
    describe_sampler,
    shared_conditions,
    words_of,
)
from ogdm_jax.training.workdir import TrainedModel

# Far from the seeds of sample.py and of evaluations: no sample that is judged was trained on.
FIRST_SEED = 2**31
# of config.sample
SAMPLER = (
    *("solver", "steps", "eta", "grid", "sigma_min", "sigma_max", "rho", "shift", "clip"),
    *("variance", "options", *GRID_OPTIONS),
)


def digest(prior: TrainedModel) -> str:
    """SHA-256 of a model's parameters and buffers, as 64 hexadecimal digits.

    What decodes its samples does not count: a discriminator sees latents.
    """
    weights = {"params": prior.params, "buffers": own_buffers(prior.buffers)}
    return fingerprint(weights).tobytes().hex()


def origin(config: Config, prior: TrainedModel, num: int) -> dict[str, Any]:
    """What identifies a set of samples: the prior's weights and every setting of the sampler."""
    return {
        "weights": digest(prior),
        "step": prior.step,
        **{name: getattr(config.sample, name) for name in SAMPLER},
        **describe_sampler(config.sample),
        "churn": of(config).churn,
        "cfg": of(config).cfg,
        "num": num,
        "first_seed": FIRST_SEED,
    }


def base_guidance(config: Config) -> tuple[Guidance, ...]:
    """Guidance that the samples are drawn with, and that stays on under DG."""
    return (cfg.guidance(of(config).cfg),) if of(config).cfg != 1 else ()


def draw_or_read(
    config: Config,
    prior: TrainedModel,
    source: Source,
    num: int,
    path: epath.Path,
    devices: Sequence[Any],
    log: Callable[[str], None] = print,
) -> Source:
    """The samples of a run: read from the file if it is there, else drawn and stored.

    Every process of a run has to call it; the lead process samples, the others wait.

    Args:
      config: of a discriminator: groups sample, dg and data.
      prior: the model to guide.
      source: the real images. Samples have their labels, as frequent as there: else a discriminator
        that sees no labels would learn what is frequent. Of latents samples are floats.
      num: how many samples.
      path: the .npz file.
      devices: of this process.
      log: gets one line where samples are drawn.

    Raises:
      ConfigError: the file is of another checkpoint, sampler or number, or is no such file.
      OutputError: samples that are not finite, or that cannot be written.
    """
    wanted = origin(config, prior, num)
    wanted |= shared_conditions(source, prior.model, prior.class_names)
    if jax.process_index() == 0 and not path.exists():
        places.writable(path, "config.dg.samples", file=True)
        knows = bool(prior.model.label_dim and prior.config.data.label_dropout)
        hidden = "1, for the prior never saw hidden labels (data.label_dropout)"
        require(of(config).cfg == 1 or knows, "dg.cfg", of(config).cfg, hidden)
        log(f"drawing {num} samples of step {prior.step} ({words_of(config.sample)})")
        _draw(config, prior, source, wanted, path, devices)
    cluster.meet()
    return read(path, wanted, source.latents)


def read(
    path: epath.Path, wanted: Mapping[str, Any] | None = None, latents: Latents | None = None
) -> Source:
    """Stored samples as a source of images.

    Args:
      path: the .npz file.
      wanted: the `origin` that they should have; None takes any.
      latents: what the real images are, where they are no pixels; here items are samples, which
        `pairs.paired` makes like those.

    Raises:
      ConfigError: the file is no such file, or its samples have another origin.
    """
    images, labels, found = _load(path)
    # files of before do not say which labels they have: a run that has begun goes on with them
    wanted = {k: v for k, v in (wanted or {}).items() if k != "conditions" or k in found}
    if differs := output.difference({name: found.get(name) for name in wanted}, wanted):
        raise ConfigError(
            f"config.dg.samples: {path} was drawn with {differs}; a discriminator fits one "
            "checkpoint and one sampler: expected the same, or another --workdir"
        )
    if latents is None:
        return from_arrays(str(path), images, labels)
    samples = {"views": 1, "moments": False, "scaled": True, "dtype": "float32"}
    latents = dataclasses.replace(latents, **samples)
    return from_arrays(str(path), images[:, None].astype(np.float32), labels, latents=latents)


def read_origin(path: epath.Path) -> dict[str, Any]:
    """The `origin` of stored samples. Raises ConfigError where the file holds none."""
    return _load(path)[2]


def _load(path: epath.Path) -> tuple[np.ndarray, np.ndarray, dict[str, Any]]:
    """(images, labels, origin) of a file."""
    # what older files, which do not say, were drawn with
    older = {"eta": 0.0, "grid": "edm", "clip": False, "variance": "auto", "options": {}}
    older |= {name: getattr(Sample, name) for name in ("shift", *GRID_OPTIONS)}
    try:
        with path.open("rb") as file, np.load(file) as archive:
            found = older | json.loads(str(archive["about"]))
            images, labels = archive["image"], archive["label"]
    except DAMAGED as error:
        raise ConfigError(
            f"config.dg.samples: {path} holds no samples of a discriminator's run "
            f"({type(error).__name__}); expected a file that such a run wrote, or none"
        ) from None
    fits = (
        images.dtype in (np.uint8, np.float32)
        and images.ndim == 4
        and labels.shape == (len(images),)
    )
    fits = fits and found.get("num", len(images)) == len(images)
    if not fits or not np.issubdtype(labels.dtype, np.integer):
        raise ConfigError(
            f"config.dg.samples: {path} holds images {images.shape} of {images.dtype} and labels "
            f"{labels.shape} of {labels.dtype}; expected {found.get('num', 'n')} images of "
            "bytes [n,h,w,c] and integers [n], or no file there"
        )
    return images, labels, found


def _draw(
    config: Config,
    prior: TrainedModel,
    source: Source,
    wanted: Mapping[str, Any],
    path: epath.Path,
    devices: Sequence[Any],
) -> None:
    """Writes the npz: uint8 images [num,h,w,c], int32 labels [num] (-1 without classes), origin."""
    seeds = FIRST_SEED + np.arange(wanted["num"])
    labels = conditions(source, prior.model, seeds, prior.class_names)
    field, remedy = "config.dg.samples", f"that {path}.parts is removed"
    floats = prior.model.latents is not None
    with output.Output(path, wanted, seeds, floats, field, remedy=remedy).opened() as out:
        batch = generate.batch_size(prior.model, len(seeds), len(devices))
        parts = prior.batches(
            config.sample,
            seeds,
            labels=labels,
            guidance=base_guidance(config),
            churn=of(config).sampler_churn(),
            devices=devices,
            done=out.done.copy(),
        )
        for start, images in zip(generate.pending(out.done, batch), parts, strict=True):
            out.add(start, images)
            if len(out.not_finite):
                break
        if len(out.not_finite):
            raise output.OutputError(out.missing())
        classes = np.full(len(seeds), -1, np.int32) if labels is None else labels
        columns = {"image": out.columns()["images"], "label": npz.column(classes)}
        columns["about"] = npz.column(records.dumps(wanted))
        out.finish(lambda path: npz.write(path, columns))
        out.clear(record=True)
