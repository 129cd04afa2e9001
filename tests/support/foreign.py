"""A package of somebody else with one sampling method, as pip would have installed it."""

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


def install(folder: Path, patch: pytest.MonkeyPatch) -> None:
    """Until the patch is undone; the caller clears discovery.modules then."""
    (folder / "brighter.py").write_text(METHOD)
    about = folder / "brighter-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: brighter\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text("[ogdm_jax.methods]\nbrighter = brighter\n")
    patch.syspath_prepend(str(folder))
    importlib.invalidate_caches()
    discovery.modules.cache_clear()
