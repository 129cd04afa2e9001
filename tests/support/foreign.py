"""Packages of somebody else with one method, for sampling or for training, as pip would have
installed them.
"""

import importlib
from pathlib import Path

import pytest

from ogdm_jax.methods import discovery

METHOD = '''
"""Brighter: the images' mean is pulled to a level."""

import dataclasses
from typing import ClassVar

from ogdm_jax.config import setting
from ogdm_jax.methods import dsg
from ogdm_jax.sampling.schedule import Schedule


@dataclasses.dataclass(frozen=True)
class Settings(Schedule):
    GROUP: ClassVar[str] = "brighter"
    level: float = setting(0.5, "mean of the images", least=-1, most=1)


def build(settings, session):
    loss = lambda x0_hat: (x0_hat.mean((1, 2, 3)) - settings.level) ** 2
    return dataclasses.replace(dsg.guidance(loss, 0.5, settings.interval), name="brighter")
'''


TRAINING = '''
"""Quiet: a penalty on the mean brightness of x0_hat; it counts its steps (no paper: 0000.00000)."""

import dataclasses

import jax.numpy as jnp

from ogdm_jax.config import check, setting
from ogdm_jax.methods.contract import Carry, Slots


@dataclasses.dataclass(frozen=True)
class Settings:
    weight: float = setting(1.0, "of the penalty", least=0)

    def __post_init__(self):
        check(self, "quiet")


def training(settings, context):
    penalty = lambda example, x0_hat, denoiser, own: (
        settings.weight * jnp.square(x0_hat.mean((1, 2, 3))), {}
    )
    count = lambda carry, update: (carry + 1, {"quiet/steps": carry + 1.0})
    return Slots("quiet", penalty=penalty, carry=Carry(lambda key: jnp.zeros(()), count))
'''


def install(
    folder: Path, patch: pytest.MonkeyPatch, name: str = "brighter", method: str = METHOD
) -> None:
    """Until the patch is undone; the caller clears discovery.modules then."""
    (folder / f"{name}.py").write_text(method)
    about = folder / f"{name}-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text(f"[{discovery.GROUP}]\n{name} = {name}\n")
    patch.syspath_prepend(str(folder))
    importlib.invalidate_caches()
    discovery.modules.cache_clear()
