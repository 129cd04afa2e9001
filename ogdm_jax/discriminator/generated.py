"""Samples of the prior, which DG's discriminator learns to tell from real images.

Samples are drawn once and stored as uint8 with a record of their origin. A discriminator corrects
one model under one sampler, so stored samples of another checkpoint, solver or number of steps are
refused. Real images are uint8, too: a discriminator could tell other samples by their floats.
"""

import json
import zipfile
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils

from ogdm_jax import places
from ogdm_jax.config import Config, ConfigError
from ogdm_jax.data import Source, from_arrays
from ogdm_jax.discriminator.settings import of
from ogdm_jax.methods import cfg
from ogdm_jax.models import fingerprint
from ogdm_jax.pixels import to_uint8
from ogdm_jax.sampling import generate
from ogdm_jax.sampling.guidance import Guidance
from ogdm_jax.sampling.sampler import nfe
from ogdm_jax.training.workdir import TrainedModel

# Far from the seeds of sample.py and of evaluations: no sample that is judged was trained on.
FIRST_SEED = 2**31
# of config.sample
SAMPLER = ("solver", "steps", "eta", "grid", "sigma_min", "sigma_max", "rho", "clip")


def digest(prior: TrainedModel) -> str:
    """SHA-256 of a model's parameters and buffers, as 64 hexadecimal digits."""
    return fingerprint({"params": prior.params, "buffers": prior.buffers}).tobytes().hex()


def origin(config: Config, prior: TrainedModel, num: int) -> dict[str, Any]:
    """What identifies a set of samples: the prior's weights and every setting of the sampler."""
    return {
        "weights": digest(prior),
        "step": prior.step,
        **{name: getattr(config.sample, name) for name in SAMPLER},
        "nfe": nfe(config.sample.solver, config.sample.steps),
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
      num: how many samples.
      path: the .npz file.
      devices: of this process.
      log: gets one line where samples are drawn.

    Raises:
      ConfigError: the file is of another checkpoint, sampler or number, or is no such file.
    """
    wanted = origin(config, prior, num)
    if jax.process_index() == 0 and not path.exists():
        log(
            f"drawing {num} samples of step {prior.step} ({wanted['solver']}, {wanted['nfe']} "
            "network evaluations)"
        )
        images, labels = _draw(config, prior, num, devices)
        # A run that is stopped here leaves no half-written file.
        with places.written(path) as new:
            np.savez_compressed(new, image=images, label=labels, about=json.dumps(wanted))
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("samples for the discriminator")
    return read(path, wanted)


def read(path: epath.Path, wanted: Mapping[str, Any] | None = None) -> Source:
    """Stored samples as a source of images.

    Args:
      path: the .npz file.
      wanted: the `origin` that they should have; None takes any.

    Raises:
      ConfigError: the file is no such file, or its samples have another origin.
    """
    images, labels, found = _load(path)
    for name, value in (wanted or {}).items():
        if found.get(name) != value:
            raise ConfigError(
                f"config.dg.samples: {path} was drawn with {name} {_short(found.get(name))}, now "
                f"it is {_short(value)}; "
                "a discriminator fits one checkpoint and one sampler: expected the same, or "
                "another --workdir"
            )
    return from_arrays(str(path), images, labels)


def read_origin(path: epath.Path) -> dict[str, Any]:
    """The `origin` of stored samples. Raises ConfigError where the file holds none."""
    return _load(path)[2]


def _load(path: epath.Path) -> tuple[np.ndarray, np.ndarray, dict[str, Any]]:
    """(images, labels, origin) of a file."""
    # what older files, which do not say, were drawn with
    older = {"eta": 0.0, "grid": "edm", "clip": False}
    try:
        with path.open("rb") as file, np.load(file) as archive:
            found = older | json.loads(str(archive["about"]))
            return archive["image"], archive["label"], found
    except (OSError, KeyError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise ConfigError(
            f"config.dg.samples: {path} holds no samples of a discriminator's run "
            f"({type(error).__name__}); "
            "expected a file that such a run wrote, or none"
        ) from None


def _short(value: Any) -> str:
    """A value for a message; of a digest the first digits."""
    return value[:12] if isinstance(value, str) and len(value) > 40 else repr(value)


def _draw(
    config: Config, prior: TrainedModel, num: int, devices: Sequence[Any]
) -> tuple[np.ndarray, np.ndarray]:
    """(uint8 images [num,h,w,c], int32 labels [num], -1 without classes)."""
    seeds = FIRST_SEED + np.arange(num)
    labels = generate.labels_for(seeds, prior.model.label_dim, None)
    parts = prior.batches(
        config.sample,
        seeds,
        labels=labels,
        guidance=base_guidance(config),
        churn=of(config).sampler_churn(),
        devices=devices,
    )
    pictures = np.concatenate([to_uint8(part) for part in parts])
    return pictures, np.full(num, -1, np.int32) if labels is None else labels
