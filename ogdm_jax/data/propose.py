"""A configuration that fits an image set and the devices at hand: a start, to be changed."""

import dataclasses
import math
from typing import Any

import numpy as np

from ogdm_jax import records
from ogdm_jax.data.base import Source, Stored
from ogdm_jax.data.describe import describe
from ogdm_jax.data.sources import open_source, stored

_LOOKED = 256  # pictures whose sizes are read
_MOST = {True: 64, False: 32}  # pixels a side that are proposed: with an accelerator, without one


@dataclasses.dataclass(frozen=True)
class Devices:
    """What a network has to fit: the number of devices, whether they are accelerators, and the
    bytes of memory of each (None: not known).
    """

    count: int = 1
    accelerators: bool = False
    memory: int | None = None


def opened(
    name: str,
    data_dir: str | None,
    resolution: int | None,
    channels: int | None,
    devices: Devices,
) -> tuple[Source, str]:
    """A set at a side that training can take, and why it is this one.

    Without a resolution: as stored where all images are squares of a size that a small network can
    take; else the largest multiple of 4 that nine tenths of the pictures have, up to 32 pixels on a
    CPU and 64 on accelerators.

    Raises:
      SourceError: as `open_source`.
    """
    if resolution is not None:
        return open_source(name, data_dir, resolution, channels), "as asked for"
    found = stored(name, data_dir)
    if isinstance(found, Stored) and found.latents is not None:
        return open_source(name, data_dir, None, channels), "as stored"
    if isinstance(found, Stored):
        rows = np.unique(np.linspace(0, len(found.reader) - 1, _LOOKED).astype(int))
        sizes = np.array([found.reader.read(int(i))[0].shape[:2] for i in rows])
    else:
        sizes = np.array([np.shape(found[0])[1:3]])
    most, (low, high) = _MOST[devices.accelerators], (int(sizes.min()), int(sizes.max()))
    if low == high and low % 4 == 0 and low <= most:
        return open_source(name, data_dir, None, channels), "as stored"
    usual = int(np.quantile(sizes.min(1), 0.1))
    side = min(most, max(8, usual // 4 * 4))
    why = f"sides are {low} to {high}: cropped to squares, resized"
    return open_source(name, data_dir, side, channels), why


def settings(source: Source, why: str, devices: Devices) -> dict[str, tuple[Any, str]]:
    """{"group.key": (value, why)} of a configuration for an opened set, and its facts.

    The networks are those of this package's configurations: on a CPU the digits' and MNIST's, on
    accelerators EDM's (2206.00364), half as wide for fewer than 10,000 images. The batch is the
    largest power of two, up to 512, whose activations take half of the memory by estimate.
    """
    facts, side = describe(source), source.shape[0]
    halvings = 1 if side <= 16 else 2 if side <= 32 else 3
    while side % 2**halvings:
        halvings -= 1
    sides = [side >> level for level in range(halvings + 1)]
    narrow = side > (32 if devices.accelerators else 16)
    mult = (1 if narrow else 2, *(2,) * halvings)
    blocks, width, why_width = 4, 128, "as EDM's networks"
    if not devices.accelerators:
        width, blocks = (16, 2) if side <= 16 else (24, 1)
        why_width = "small enough for two CPU cores"
    elif len(source) < 10_000:
        width, why_width = 64, "half of EDM's width, for a small set"
    most = 16 if devices.accelerators else sides[-1]
    attends = next((s for s in sides if s <= most), sides[-1])
    # EDM sees 50,000 images 4,000 times; a CPU would take weeks
    kimg = min(200_000, max(2_000, 4 * len(source))) if devices.accelerators else 144
    text = lambda part, most: f"{max(1, min(most, kimg // part))} kimg"
    found: dict[str, tuple[Any, str]] = {"data.source": (source.name, f"{len(source):,} images")}
    found["data.resolution"] = (0 if why == "as stored" else side, why)
    if source.num_classes > 1 and not source.label_size:
        named = ", ".join(source.class_names)[:40] or "numbered"
        found["data.conditional"] = (True, f"{source.num_classes} classes: {named}")
    sigma = round(facts["sigma_data"], 2) or 0.5
    rate = 2e-3 if not devices.accelerators else 1e-3 if side <= 32 else 2e-4
    return found | {
        "data.batch": (
            _batch(source, mult, devices),
            "images a step, for the devices here",
        ),
        "data.augment": (
            0.12 if source.latents is None else 0.0,
            "0 where a mirrored picture is another thing, and for latents",
        ),
        "network.model_channels": (width, why_width),
        "network.channel_mult": (mult, f"levels of {', '.join(map(str, sides))} pixels"),
        "network.num_blocks": (blocks, "residual blocks a level"),
        "network.attn_resolutions": ((attends,), "the level that attends"),
        "network.dropout": (0.13 if devices.accelerators else 0.0, "more of it for smaller sets"),
        "precondition.sigma_data": (sigma, f"measured on {facts['measured']:,} of the images"),
        "optim.learning_rate": (rate, "as the configuration of that size has it"),
        "optim.ramp": (text(45, 10_000), "warm-up"),
        "optim.decay": ("train.duration", "then the rate falls to 0 over the whole run"),
        "ema.halflife": (text(30, 500), "of the averaged weights, which are sampled"),
        "train.duration": (f"{kimg} kimg", "length: double it while the loss still falls"),
        "train.save_every": (text(10, 2_500), "from checkpoint to checkpoint"),
        "log.every": (text(45, 50), "from line to line"),
        "sample.every": (text(10, 5_000), "from picture to picture"),
    }


def _batch(source: Source, mult: tuple[int, ...], devices: Devices) -> int:
    """Images a step: at most half of the memory, and no more than there are images."""
    side, most = source.shape[0], 512 // devices.count
    if not devices.accelerators:
        most = 64 if side <= 16 else 32
    elif devices.memory:
        # about 5 float32 arrays live for each of the 9 blocks of a level of EDM's networks
        floats = sum((side >> level) ** 2 * 128 * m for level, m in enumerate(mult))
        most = min(most, int(devices.memory / 2 / (floats * 9 * 5 * 4)))
    few = max(1, min(most, len(source) // devices.count))
    return devices.count * 2 ** int(math.log2(few))


def as_file(found: dict[str, tuple[Any, str]], out: str) -> str:
    """The text of a configuration file: an overlay of `configs/base.py`, a reason on each line."""
    source, about = found["data.source"]
    lines = [f"    config.{key} = {_python(value)}  # {why}" for key, (value, why) in found.items()]
    return (
        f'"""{about} of {source}: written by `ogdm new`, yours to change.\n\n'
        f'python train.py --config {out}\n"""\n\n'
        "from ogdm_jax.configs import base\n\n\n"
        "def get_config():\n"
        "    config = base.get_config()  # every setting; --dry-run prints them all\n"
        + "\n".join(lines)
        + "\n    return config\n"
    )


def _python(value: Any) -> str:
    return records.dumps(value) if isinstance(value, str) else repr(value)
