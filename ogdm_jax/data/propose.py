"""A configuration that fits an image set and the devices at hand: a start, to be changed."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from ogdm_jax import records
from ogdm_jax.data.base import Source, Stored
from ogdm_jax.data.sources import open_source, stored


@dataclasses.dataclass(frozen=True)
class Devices:
    """What a network has to fit: the number of devices, whether they are accelerators, and the
    bytes of memory of each (None: not known).
    """

    count: int = 1
    accelerators: bool = False
    memory: int | None = None


def opened(
    name: str, data_dir: str | None, resolution: int | None, channels: int | None, devices: Devices
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
    if not isinstance(found, Stored):
        sizes = np.array([np.shape(found[0])[1:3]])
    elif found.latents:
        return open_source(name, data_dir, None, channels), "as stored"
    else:
        rows = np.unique(np.linspace(0, len(found.reader) - 1, 256).astype(int))  # are looked at
        sizes = np.array([found.reader.read(int(i))[0].shape[:2] for i in rows])
    most, (low, high) = 64 if devices.accelerators else 32, (int(sizes.min()), int(sizes.max()))
    if low == high and low % 4 == 0 and low <= most:
        return open_source(name, data_dir, None, channels), "as stored"
    side = min(most, max(8, int(np.quantile(sizes.min(1), 0.1)) // 4 * 4))
    why = f"sides are {low} to {high}: cropped to squares, resized"
    return open_source(name, data_dir, side, channels), why


def settings(
    source: Source, facts: Mapping[str, Any], why: str, devices: Devices
) -> dict[str, tuple[Any, str]]:
    """{"group.key": (value, why)} of a configuration for an opened set, whose facts `describe` has.

    The networks are those of this package's configurations: on a CPU the digits' and MNIST's, on
    accelerators EDM's (2206.00364), half as wide for fewer than 10,000 images. The batch is the
    largest power of two, up to 512, whose activations take half of the memory by estimate.
    """
    side = source.shape[0]
    halvings = 1 + (side > 16) + (side > 32)
    while side % 2**halvings:
        halvings -= 1
    sides = [side >> level for level in range(halvings + 1)]
    if devices.accelerators:
        width, blocks, most, dropout = 64 if len(source) < 10_000 else 128, 4, 16, 0.13
        # EDM sees 50,000 images 4,000 times; a CPU would take weeks
        rate, kimg = 1e-3 if side <= 32 else 2e-4, min(200_000, max(2_000, 4 * len(source)))
    else:
        width, blocks, most, dropout = 16 if side <= 16 else 24, 2 if side <= 16 else 1, 8, 0.0
        rate, kimg = 2e-3, 144
    mult = (1 if side > (32 if devices.accelerators else 16) else 2, *(2,) * halvings)
    attends = next((s for s in sides[1:] if s <= most), sides[-1])
    text = lambda part, most: f"{max(1, min(most, kimg // part))} kimg"
    found: dict[str, tuple[Any, str]] = {"data.source": (source.name, f"{len(source):,} images")}
    found["data.resolution"] = (0 if why == "as stored" else side, why)
    if source.num_classes > 1 and not source.label_size:
        named = ", ".join(source.class_names)[:40] or "numbered"
        found["data.conditional"] = (True, f"{source.num_classes} classes: {named}")
    augment, sigma = 0.0 if source.latents else 0.12, round(facts["sigma_data"], 2) or 0.5
    return found | {
        "data.batch": (_batch(source, mult, devices), "images a step, for the devices here"),
        "data.augment": (augment, "0 where a mirrored picture is another thing, and for latents"),
        "network.model_channels": (width, "EDM's is 128; 64 for few images, less on a CPU"),
        "network.channel_mult": (mult, f"levels of {', '.join(map(str, sides))} pixels"),
        "network.num_blocks": (blocks, "residual blocks a level"),
        "network.attn_resolutions": ((attends,), "the level that attends"),
        "network.dropout": (dropout, "more of it for smaller sets"),
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
    """The text of a configuration file: an overlay of `configs/base.py`, a reason on each line.

    Names of strangers' classes and folders stand in comments alone, on one line, so that none of
    them is run as code.
    """
    source, about = found["data.source"]
    typed = lambda value: records.dumps(value) if isinstance(value, str) else repr(value)
    told = lambda text: "# " + "".join(c if c.isprintable() else " " for c in text)
    lines = [
        f"    config.{key} = {typed(value)}  {told(why)}" for key, (value, why) in found.items()
    ]
    return (
        told(f"{about} of {source}: written by `ogdm new`, yours to change.")
        + f"\n#\n{told(f'ogdm train --config {out}')}\n\nfrom ogdm_jax.configs import base\n\n\n"
        "def get_config():\n    config = base.get_config()  # all settings: --dry-run\n"
        + "\n".join([*lines, "    return config\n"])
    )
