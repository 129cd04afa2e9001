"""Published figures of accelerators. They bound a step's time from below; nobody reaches them."""

import dataclasses
import importlib.util
import math
import os
from typing import Any

import jax

from ogdm_jax.config import ConfigError, require


@dataclasses.dataclass(frozen=True)
class Chip:
    """One device.

    Attributes:
      bfloat16: operations a second of its matrix units.
      hbm: bytes of memory.
      bandwidth: bytes a second between memory and units.
      link: bytes a second that it sends to its neighbours (half of the published sum of both
        directions).
      source: where the figures are published.
    """

    bfloat16: float
    hbm: float
    bandwidth: float
    link: float
    source: str


_TPU = "cloud.google.com/tpu/docs/{}, table of key specifications, read 2026-11"
_GPU = "NVIDIA's data sheet of the {}, dense bfloat16"
CHIPS = {
    "v5e": Chip(197e12, 16 * 2**30, 819e9, 200e9, _TPU.format("v5e")),
    "v5p": Chip(459e12, 95 * 2**30, 2765e9, 600e9, _TPU.format("v5p")),
    "v6e": Chip(918e12, 32 * 2**30, 1640e9, 400e9, _TPU.format("v6e")),
    "H100": Chip(989e12, 80e9, 3.35e12, 450e9, _GPU.format("H100 SXM")),
    "H200": Chip(989e12, 141e9, 4.8e12, 450e9, _GPU.format("H200 SXM")),
    "A100": Chip(312e12, 80e9, 2.039e12, 300e9, _GPU.format("A100 80GB SXM")),
}
TPUS = tuple(name for name in CHIPS if name.startswith("v"))
# as TPU_ACCELERATOR_TYPE spells them, in front of the number of chips, or of cores
_ACCELERATOR = {"v5e": "v5litepod", "v5p": "v5p", "v6e": "v6e"}
_CORES = {"v5p": 2}  # of a chip, where cores are counted
# as jax spells them in device_kind
_KINDS = {"TPU v5 lite": "v5e", "TPU v5": "v5p", "TPU v6 lite": "v6e"}


def topology(words: str) -> tuple[str, tuple[Any, ...]]:
    """(chip, devices) of words such as "v5e:4x4": devices to compile for that need not be here.

    Sets the environment variables without which libtpu would ask a TPU machine's metadata for them.

    Raises:
      ConfigError: no such chip or shape, or no libtpu (the extra "tpu").
    """
    chip, colon, shape = words.partition(":")
    sides = shape.split("x")
    known = chip in TPUS and colon and all(side.isdigit() and int(side) > 0 for side in sides)
    need = f"a chip ({', '.join(TPUS)}) and a shape, such as v5e:4x4, v5p:2x2x1"
    require(bool(known), "--plan-for", words, need)
    chips = math.prod(map(int, sides))
    variables = {
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": f"{_ACCELERATOR[chip]}-{chips * _CORES.get(chip, 1)}",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_WORKER_ID": "0",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # no chip is opened, so nothing is shared
    }
    for name, value in variables.items():
        os.environ.setdefault(name, value)
    from jax.experimental import topologies

    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=words)
    except Exception as error:  # jaxlib raises whatever libtpu says
        if importlib.util.find_spec("libtpu") is None:
            raise ConfigError(
                f"--plan-for: {words!r} needs libtpu, which is not installed; pip install "
                "'ogdm_jax[tpu]'"
            ) from None
        raise ConfigError(
            f"--plan-for: {words!r} is no topology that libtpu knows: {_line(error)}"
        ) from None
    return chip, tuple(found.devices)


def here() -> tuple[str, tuple[Any, ...]]:
    """(chip, devices) of this machine; the chip is "" where CHIPS has no figures (as for CPUs).

    Raises:
      ConfigError: JAX starts no device, as where a run holds those of this machine.
    """
    try:
        devices = tuple(jax.devices())
    except (RuntimeError, AssertionError) as error:
        why = " ".join(str(error).split()) or "the platform of JAX_PLATFORMS is not here"
        raise ConfigError(
            f"JAX starts no device of this machine: {why}; JAX_PLATFORMS=cpu in front of the "
            "command does it for a CPU"
        ) from None
    return chip_of(devices[0].device_kind), devices


def chip_of(kind: str) -> str:
    """The name in CHIPS of a jax device_kind; "" for a kind that is not there.

    Kinds are words such as "TPU v5 lite" or "NVIDIA H100 80GB HBM3".
    """
    return _KINDS.get(kind) or next((name for name in CHIPS if name in kind), "")


def memory(chip: str, devices: tuple[Any, ...]) -> int | None:
    """Bytes of one device's memory, None: unknown.

    A device that is here says it itself; of the others it is the published figure.
    """
    try:
        limit = (devices[0].memory_stats() or {}).get("bytes_limit")
    except Exception:  # a device that is only compiled for; jaxlib's error class has no public name
        limit = None
    known = CHIPS.get(chip)
    return limit or (int(known.hbm) if known else None)


def _line(error: Exception) -> str:
    return str(error).strip().splitlines()[0][:200]
