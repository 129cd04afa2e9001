"""What DG's discriminator learns from: real images against samples of one checkpoint by one
sampler, half and half.

Samples are drawn once and stored as uint8 with a record of where they come from: a discriminator of
other samples corrects another model, so a file of another checkpoint, solver or number of steps is
refused, not reused. Both sides go through the same 8 bits; otherwise the discriminator would learn
to tell floats from bytes.
"""

import dataclasses
import json
import zipfile
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils

from ogdm_jax import data, places
from ogdm_jax.config import Config, ConfigError
from ogdm_jax.data import Rows, Source, from_arrays
from ogdm_jax.discriminator.settings import of
from ogdm_jax.methods import cfg
from ogdm_jax.methods.sp import fingerprint
from ogdm_jax.pixels import to_uint8
from ogdm_jax.sampling import churn as churning
from ogdm_jax.sampling import generate
from ogdm_jax.sampling.guidance import Guidance
from ogdm_jax.sampling.sampler import nfe
from ogdm_jax.training.workdir import TrainedModel

FIRST_SEED = (
    2**31
)  # far from the seeds of sample.py and of evaluations: a sample to be judged was never trained on
SAMPLER = ("solver", "steps", "eta", "grid", "sigma_min", "sigma_max", "rho")  # of config.sample


def digest(prior: TrainedModel) -> str:
    """SHA-256 of a model's weights and frozen tensors, as 64 hexadecimal digits."""
    return fingerprint({"params": prior.params, "buffers": prior.buffers}).tobytes().hex()


def origin(config: Config, prior: TrainedModel, num: int) -> dict[str, Any]:
    """What identifies a set of samples: the weights that made it and every setting of the
    sampler.
    """
    return {
        "weights": digest(prior),
        "step": prior.step,
        **{k: getattr(config.sample, k) for k in SAMPLER},
        "nfe": nfe(config.sample.solver, config.sample.steps),
        "churn": of(config).churn,
        "cfg": of(config).cfg,
        "num": num,
        "first_seed": FIRST_SEED,
    }


def base_guidance(config: Config) -> tuple[Guidance, ...]:
    """Guidance that the samples are drawn with, and that stays on under DG."""
    return (cfg.guidance(of(config).cfg),) if of(config).cfg != 1 else ()


def obtain(
    config: Config,
    prior: TrainedModel,
    num: int,
    path: epath.Path,
    devices: Sequence[Any],
    say=print,
) -> Source:
    """The samples of a run, from the file where it has them, else drawn and stored. All processes
    call it together.

    Args:
      config: of a discriminator: groups sample, dg and data.   num: how many.   path: the .npz
        file.
      devices: of this process; the lead process samples.

    Raises:
      ConfigError: the file is of another checkpoint, sampler or number, or is no such file.
    """
    wanted = origin(config, prior, num)
    if jax.process_index() == 0 and not path.exists():
        say(
            f"drawing {num} samples of step {prior.step} ({wanted['solver']}, {wanted['nfe']} "
            "network evaluations)"
        )
        images, labels = _draw(config, prior, num, devices)
        with places.written(
            path
        ) as new:  # in one go: a run that is stopped here leaves no half file
            np.savez_compressed(new, image=images, label=labels, about=json.dumps(wanted))
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("samples for the discriminator")
    return read(path, wanted)


def about(path: epath.Path) -> dict[str, Any]:
    """Where stored samples come from, see `origin`. Raises ConfigError where the file holds
    none.
    """
    return _load(path)[2]


def _load(path: epath.Path) -> tuple[np.ndarray, np.ndarray, dict[str, Any]]:
    try:
        with path.open("rb") as file, np.load(file) as archive:
            about = {"eta": 0.0, "grid": "edm"} | json.loads(
                str(archive["about"])
            )  # older files have neither
            return archive["image"], archive["label"], about
    except (OSError, KeyError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise ConfigError(
            f"config.dg.samples: {path} holds no samples of a discriminator's run "
            f"({type(error).__name__}); "
            "expected a file that such a run wrote, or none"
        ) from None


def read(path: epath.Path, wanted: dict[str, Any] | None = None) -> Source:
    """A stored set of samples. Raises ConfigError where it is none, or not the wanted one."""
    images, labels, found = _load(path)
    for key, value in (wanted or {}).items():
        if found.get(key) != value:
            raise ConfigError(
                f"config.dg.samples: {path} was drawn with {key} {_short(found.get(key))}, now it "
                f"is {_short(value)}; "
                "a discriminator fits one checkpoint and one sampler: expected the same, or "
                "another --workdir"
            )
    return from_arrays(str(path), images, labels)


def _short(value: Any) -> str:
    return value[:12] if isinstance(value, str) and len(value) > 40 else repr(value)


def _draw(
    config: Config, prior: TrainedModel, num: int, devices: Sequence[Any]
) -> tuple[np.ndarray, np.ndarray]:
    """(uint8 images [num,h,w,c], int32 labels [num], -1 without classes)."""
    guidance = base_guidance(config)
    churn = churning.parse(of(config).churn, "config.dg.churn")
    images = generate.sampler(prior.model, config.sample, devices, churn, guidance)
    seeds = FIRST_SEED + np.arange(num)
    labels = generate.labels_for(seeds, prior.model.label_dim, None)
    batch = len(devices) * min(256, -(-num // len(devices)))
    parts = generate.generate(images, prior.params, prior.buffers, seeds, labels, batch, guidance)
    pictures = np.concatenate([to_uint8(part) for part in parts])
    return pictures, np.full(num, -1, np.int32) if labels is None else labels


def split(source: Source, share: float) -> tuple[Source, Source]:
    """(kept, held out): a fixed random division, the same whatever the run's seed."""
    rows = np.random.default_rng(0).permutation(len(source))
    count = round(share * len(source))
    return _subset(source, np.sort(rows[count:])), _subset(source, np.sort(rows[:count]))


def _subset(source: Source, rows: np.ndarray) -> Source:
    labels = None if source.labels is None else source.labels[rows]
    if source.images is not None:
        return dataclasses.replace(source, images=source.images[rows], labels=labels)
    return dataclasses.replace(source, labels=labels, reader=Rows(source.reader, rows))


class Pairs:
    """Endless batches, real and generated images in turn: {"image", "label", "real" int32,
    "index"}, as data.Batches.

    Both streams run through permutations of their own; a resumed run goes on exactly where it
    stopped.
    """

    def __init__(
        self,
        real: Source,
        fake: Source,
        batch: int,
        seed: int,
        process_index: int,
        process_count: int,
        workers: int = 0,
    ):
        make = lambda source, seed: data.batches(
            source,
            batch // 2,
            seed,
            process_index=process_index,
            process_count=process_count,
            workers=workers,
        )
        self._real, self._fake = make(real, seed), make(fake, seed + 2**32)

    def __iter__(self) -> "Pairs":
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        return paired(next(self._real), next(self._fake))

    def get_state(self) -> dict[str, int]:
        return self._real.get_state()

    def set_state(self, state: dict[str, int]) -> None:
        self._real.set_state(state)
        self._fake.set_state(state)


def paired(real: dict[str, np.ndarray], fake: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Two batches of n as one of 2 n, alternating, so that every device and round gets half of
    either.
    """
    out = {}
    for key in ("image", "label"):
        out[key] = np.stack([real[key], fake[key]], axis=1).reshape(-1, *real[key].shape[1:])
    index = real["index"]
    out["index"] = np.stack([2 * index, 2 * index + 1], axis=1).reshape(-1)
    out["real"] = np.tile(np.array([1, 0], np.int32), len(index))
    return out
