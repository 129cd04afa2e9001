"""A person's experiment tracker beside metrics.jsonl: wandb or trackio, which have the same calls.

    workdir/tracker.json    {"tracker", "project", "id"}: the run there, which a resumed run goes on

Neither is needed. Without a network, wandb keeps its files in workdir/wandb where WANDB_MODE is
offline; trackio always keeps its own on this machine (TRACKIO_DIR). A tracker that fails is left
alone from then on, with a word: all numbers are in metrics.jsonl.
"""

import importlib
import importlib.util
import logging
import uuid
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from etils import epath

from ogdm_jax import places, records
from ogdm_jax.config import Config, ConfigError, flatten

NAME = "tracker.json"
_LOG = logging.getLogger("ogdm_jax")


def check(config: Config) -> None:
    """Raises ConfigError where the tracker of config.log is not installed."""
    name = config.log.tracker
    if name and importlib.util.find_spec(name) is None:
        raise ConfigError(
            f"config.log.tracker: {name!r} given, which is not installed; expected it after pip "
            f"install {name}, or '' for none"
        )


class Tracker:
    """One run of a tracker, in the lead process."""

    def __init__(self, config: Config, workdir: epath.Path) -> None:
        """Begins the run, or goes on with that of tracker.json."""
        name, project = config.log.tracker, config.log.project
        self._name, self._module = name, None
        known = records.read(workdir / NAME, dict) if (workdir / NAME).exists() else {}
        if (known.get("tracker"), known.get("project")) != (name, project):
            known = {"tracker": name, "project": project, "id": uuid.uuid4().hex[:12]}
            records.write(workdir / NAME, known)
        words: dict[str, Any] = {"project": project, "resume": "allow", "config": flatten(config)}
        if name == "wandb":
            words |= {"id": known["id"], "name": workdir.name}
            words |= {"dir": str(workdir)} if places.is_local(workdir) else {}
        else:  # a run of trackio is known by its name
            words |= {"name": f"{workdir.name}-{known['id']}", "embed": False}
        self._safely(lambda module: module.init(**words), importlib.import_module(name))

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Sends the numbers of a step."""
        self._safely(lambda module: module.log(dict(values), step=step))

    def image(self, step: int, name: str, image: np.ndarray) -> None:
        """Sends a uint8 [h,w,c] picture."""
        picture = image[..., 0] if image.shape[-1] == 1 else image
        self._safely(lambda module: module.log({name: module.Image(picture)}, step=step))

    def close(self) -> None:
        """Ends the run."""
        self._safely(lambda module: module.finish())

    def _safely(self, call: Callable[[Any], Any], module: Any = None) -> None:
        """Calls the tracker, until it fails."""
        module = module or self._module
        if module is None:
            return
        try:
            call(module)
            self._module = module
        except Exception as error:  # whatever it is, it must not end the training
            self._module = None
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            _LOG.warning("%s failed and gets no more numbers (%s)", self._name, reason)
