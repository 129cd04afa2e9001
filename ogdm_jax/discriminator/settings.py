"""The group config.dg: what a discriminator is trained on and how it will guide. Optimiser, moving
average and schedule are the groups optim, ema and train.
"""

import dataclasses
import os

from etils import epath

from ogdm_jax import places
from ogdm_jax.config import Config, Group, require, setting
from ogdm_jax.methods import dg
from ogdm_jax.sampling import churn
from ogdm_jax.sampling.churn import Churn


@dataclasses.dataclass(frozen=True)
class Settings(Group):
    """Settings of DG's training (2211.17091); the defaults are the authors' where they say."""

    GROUP = "dg"
    prior: str = setting("", "training folder of the model that is to be guided")
    prior_step: str = setting("", "its checkpoint: a number or best; '' = the newest")
    prior_weights: str = setting(
        "ema", "ema or params of that checkpoint", choices=("ema", "params")
    )
    samples: str = setting(
        "",
        "file of its samples; '' = WORKDIR/samples.npz. Drawn if missing, refused if of another "
        "origin",
    )
    num: int = setting(0, "samples; 0 = as many as there are real images", least=0, most=10**7)
    churn: str = setting(
        "", "S_churn,S_min,S_max,S_noise of the sampler; the rest of it is config.sample"
    )
    cfg: float = setting(1.0, "classifier-free guidance of the sampler")
    held_out: float = setting(
        0.1,
        "share of both sides that is not trained on",
        least=0,
        below=1,
        expected="a share from 0 to below 1",
    )
    extractor: str = setting(
        "",
        "checkpoint file of an encoder that is not trained (an ADM classifier); '' = train the "
        "whole network",
    )
    clock: str = setting("vp", "cosine for OpenAI's 64-pixel classifier", choices=dg.CLOCKS)
    classes: int = setting(
        0,
        "rows of a conditional head's table; 0 = the source's classes, 1000 in the authors' files",
        least=0,
        most=2**20,
    )
    t_min: float = setting(1e-5, "smallest time of training", above=0, below=1)
    importance: bool = setting(True, "log-uniform noise levels; False: uniform time")
    weight: float | None = setting(
        None, "guidance weight at Heun's first evaluation; None: 2 with heun, 1 with the others"
    )
    corrector_weight: float = setting(0.0, "guidance weight at Heun's second evaluation")
    weights: tuple[float, ...] = setting(
        (), "further weights that evaluations try; the best one is noted"
    )
    time_min: float = setting(0.01, "lowest time at which it guides", least=0, most=1)
    time_max: float = setting(1.0, "highest time at which it guides", least=0, most=1)
    boost: bool = setting(False, "churn examples by their ratio")

    def _check_together(self) -> None:
        before = f"less than dg.time_max, {self.time_max}"
        self._require(self.time_min < self.time_max, "time_min", before)

    def weight_with(self, solver: str) -> float:
        """`weight`, or its default under a solver."""
        return (
            dg.default_weight(solver, self.corrector_weight) if self.weight is None else self.weight
        )

    def sampler_churn(self) -> Churn | None:
        """The churn of the prior's sampler. Raises ConfigError where the text is none."""
        return churn.parse(self.churn, "config.dg.churn")

    def samples_path(self, workdir: str | os.PathLike) -> epath.Path:
        """The file of the prior's samples: `samples`, or the training folder's own."""
        if self.samples:
            return places.place(self.samples, "config.dg.samples")
        return places.place(workdir) / "samples.npz"


def of(config: Config) -> Settings:
    """The group of a discriminator's configuration. Raises ConfigError for a value out of range."""
    return config.settings("dg", Settings)


def check_run(config: Config) -> Settings:
    """The settings of a run that is about to begin.

    Raises:
      ConfigError: a value out of range or no such word, no prior, or a batch that cannot be half
        real.
    """
    settings, batch = of(config), config.data.batch
    prior = "the training folder of the model to guide"
    require(bool(settings.prior), "dg.prior", settings.prior, prior)
    step, samples = settings.prior_step, settings.samples
    require(step in ("", "best") or step.isdecimal(), "dg.prior_step", step, "a number or best")
    require(samples[-4:] in ("", ".npz"), "dg.samples", samples, "FILE.npz")
    settings.sampler_churn()  # raises
    require(batch % 2 == 0, "data.batch", batch, "an even number: half real, half generated")
    return settings
