"""A configuration's train step in full size, compiled without data, weights or its devices."""

import dataclasses
import re
import time
from typing import Any, cast

import jax
import numpy as np

from ogdm_jax import data, parallel
from ogdm_jax.config import Config, ConfigError, require
from ogdm_jax.discriminator.run import planned
from ogdm_jax.latents import Latents
from ogdm_jax.planning import flops
from ogdm_jax.planning.collectives import collectives
from ogdm_jax.training import autoencoder, texts
from ogdm_jax.training import run as runs
from ogdm_jax.typing import PyTree

# (image shape, classes, images) of the sources that the configurations name.
SHAPES = {
    "digits": ((8, 8, 1), 10, 1797),
    "mnist5k": ((32, 32, 1), 10, 5000),
    "tfds:cifar10": ((32, 32, 3), 10, 50_000),
    "tfds:mnist": ((28, 28, 1), 10, 60_000),
    "cifar10": ((32, 32, 3), 10, 50_000),
    "zip:imagenet-64x64.zip": ((64, 64, 3), 1000, 1_281_167),
    "npz:emoji32.npz": ((32, 32, 3), 10, 5634),
    "zip:ffhq-64x64.zip": ((64, 64, 3), 0, 70_000),
    "folder:data/celeba64": ((64, 64, 3), 0, 162_770),
    "folder:data/lsun_bedroom": ((256, 256, 3), 0, 3_033_042),
    "folder:data/imagenet256": ((256, 256, 3), 1000, 1_281_167),
    "latents:data/imagenet256_latents": ((32, 32, 4), 1000, 1_281_167),
    "latents:runs/digits_latents": ((4, 4, 2), 10, 1797),
    "latents:data/laion_aesthetics6_latents": ((64, 64, 4), 0, 12_000_000),
}
# How libtpu says what a program needs that does not fit: in all, and since 0.0.52 also beside its
# arguments, where those alone would fit.
_USED = re.compile(r"Used ([\d.]+)([KMGT]) of [\d.]+[KMGT] hbm", re.IGNORECASE)
_TEMPORARIES = re.compile(r"HLO temporaries \(([\d.]+)([KMGT])\) exceeds", re.IGNORECASE)


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What the compiler says of one program; bytes are those of one device.

    Attributes:
      parameters: of the denoiser, their number.
      arguments: bytes of the step's arguments.
      temporaries: bytes that it needs beside them.
      peak: bytes of memory in all.
      moved: bytes read and written; None: unknown.
      operations: {type: operations of convolutions and matrix products, over all devices}.
      sent: see planning.collectives.
      seconds: that the compiler took.
      fits: whether the program keeps the compiler's own limit of memory.
    """

    parameters: int
    arguments: int
    temporaries: int
    peak: int
    moved: float | None
    operations: dict[str, float]
    sent: dict[str, dict[str, int]]
    seconds: float
    fits: bool = True


def source_like(
    config: Config, image_shape: str = "", classes: int = -1, images: int = 0
) -> data.Source:
    """A source of the configuration's sizes without its images: zeros that take no memory.

    Args:
      config: names the source.
      image_shape: "H,W,C" or "" for the table's.
      classes: their number, -1 for the table's.
      images: their number, 0 for the table's, which counts a source whole (`npz:F?a=1` is a part).

    Raises:
      ConfigError: a source that is not in the table and no image_shape, or a malformed one.
    """
    name = config.data.source or "tfds:cifar10"  # a discriminator's is its prior's
    known = next(
        (SHAPES[k] for k in SHAPES if name == k or name.startswith((f"{k}/", f"{k}:", f"{k}?"))),
        None,
    )
    shape, labels, count = known or (None, 0, 50_000)
    if image_shape:
        sides = image_shape.split(",")
        three = len(sides) == 3 and all(side.strip().isdigit() and int(side) for side in sides)
        require(three, "--image-shape", image_shape, "H,W,C such as 32,32,3")
        shape = tuple(int(side) for side in sides)
    if shape is None:
        raise ConfigError(
            f"config.data.source: {name!r} has no known size; give --image-shape H,W,C, such as "
            "32,32,3"
        )
    side, channels = config.data.resolution, config.data.channels
    shape = (side or shape[0], side or shape[1], channels or shape[2])
    labels, count = labels if classes < 0 else classes, images or count
    latents = Latents(shape) if name.startswith("latents:") else None
    kept = data.Source(name, shape, latents=latents)
    zeros = np.broadcast_to(np.zeros((), kept.dtype), (count, *kept.item_shape))
    resident = zeros[:1].nbytes * count <= config.data.memory_limit * 2**30
    told: Any = (count,) if labels else None
    empty = np.zeros(texts.LENGTH, np.int32) if config.network.kind == "sd" else None
    told = told if empty is None else (count, texts.LENGTH)
    return data.Source(
        name=name,
        shape=shape,
        num_classes=labels,
        images=zeros if resident else None,
        labels=np.broadcast_to(np.zeros((), np.int32), told) if told else None,
        empty=empty,
        reader=None if resident else cast(Any, range(count)),  # asked for its length alone
        latents=latents,
    )


def build(config: Config, source: data.Source, plan: parallel.Plan) -> runs.AnyRun:
    """The run of a configuration. Weights that it would read (a teacher's) are zeros."""
    if config.task == "discriminator":
        return planned(config, source, plan)
    if config.task == "autoencoder":
        return autoencoder.build(config, source, plan)
    return runs.build(config, source, plan, stand_in=lambda shapes: jax.tree.map(_zeros, shapes))


def compile_step(run: runs.AnyRun) -> Compiled:
    """Traces, lowers and compiles the step; nothing runs.

    Returns:
      What the compiler says; where it refuses for want of memory, what it says it would need.
    """
    arguments = run.shapes()
    state = arguments[0]
    step = cast(jax.stages.Wrapped, run.compile(state))
    operations = flops.matmul_flops(flops.trace(step, *arguments))
    if run.plan.axis:  # the mapped program is that of one process's devices
        hosts = len(run.plan.devices) / len(run.plan.local_devices)
        operations = {dtype: n * hosts for dtype, n in operations.items()}
    parameters = sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(state.params))
    lowered = step.lower(*arguments)
    began = time.monotonic()
    try:
        compiled = lowered.compile()
    except Exception as error:  # jaxlib's own class has no public name
        held = argument_bytes(run.plan, arguments)
        peak = needed(str(error), held)
        if peak is None:
            raise
        spent, beside = time.monotonic() - began, max(peak - held, 0)
        return Compiled(parameters, held, beside, peak, None, operations, {}, spent, fits=False)
    seconds = time.monotonic() - began
    memory: Any = cast(Any, compiled.memory_analysis())  # no backend of ours has none
    cost = compiled.cost_analysis() or {}
    cost = cost[0] if isinstance(cost, list) else cost
    peak = memory.argument_size_in_bytes + memory.temp_size_in_bytes
    # Donated arguments become results.
    peak += memory.output_size_in_bytes - memory.alias_size_in_bytes
    return Compiled(
        parameters=parameters,
        arguments=memory.argument_size_in_bytes,
        temporaries=memory.temp_size_in_bytes,
        peak=peak,
        moved=cost.get("bytes accessed"),
        operations=operations,
        sent=collectives(compiled.as_text() or ""),
        seconds=seconds,
    )


def needed(message: str, arguments: int) -> int | None:
    """Bytes that a program needs by the compiler's refusal; None: it refused for another reason.

    Args:
      message: of the refusal.
      arguments: bytes of the program's arguments, which some of its sentences leave out.
    """
    if used := _USED.search(message):
        return _size(used[1], used[2])
    beside = _TEMPORARIES.search(message)
    return arguments + _size(beside[1], beside[2]) if beside else None


def argument_bytes(plan: parallel.Plan, arguments: tuple[PyTree, ...]) -> int:
    """Of the step's arguments on one device."""
    state, constants, batch, _ = arguments
    rows = len(plan.local_devices) if plan.axis else len(plan.devices)
    size = lambda tree: sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
    shares = size((constants["divided"], batch)) // rows
    held = plan.state_bytes(state) + plan.state_bytes(constants["weights"])
    return held + size(constants["whole"]) + shares


def _zeros(leaf: Any) -> np.ndarray:
    return np.broadcast_to(np.zeros((), leaf.dtype), leaf.shape)


def _size(number: str, unit: str) -> int:
    return int(float(number) * 1024 ** ("KMGT".index(unit.upper()) + 1))
