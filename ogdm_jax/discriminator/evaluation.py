"""How well a discriminator guides: the distance of its prior's guided samples to the data."""

import dataclasses
from typing import Any

import numpy as np
from etils import epath

from ogdm_jax.discriminator import generated
from ogdm_jax.discriminator.guidance import guidance_of
from ogdm_jax.discriminator.run import DiscriminatorRun
from ogdm_jax.discriminator.settings import of
from ogdm_jax.sampling.guidance import Guidance
from ogdm_jax.training.evaluate import Evaluator, write_report
from ogdm_jax.training.state import TrainState
from ogdm_jax.typing import PyTree


class GuidedEvaluation:
    """Measures samples guided with config.dg.weight and each of config.dg.weights."""

    def __init__(self, run: DiscriminatorRun, workdir: epath.Path) -> None:
        """Nothing is compiled or read yet."""
        self._run, self._workdir = run, workdir
        settings = of(run.config)
        churn = None if settings.boost else settings.sampler_churn()
        self._evaluator = Evaluator(run, run.prior.model, churn)
        self._unguided: float | None = None

    def __call__(self, state: TrainState) -> dict[str, Any]:
        """The report of the best weight, which is written with its images.

        Every process of the run has to call it.

        Returns:
          The report, with "weight", and as "unguided" the distance without guidance.
        """
        params, step = self._run.plan.local_copy(state.ema), int(state.step)
        if self._unguided is None:
            self._unguided = self._measure(params, step, 0.0)[0]["fd"]
        settings = of(self._run.config)
        own = settings.weight_with(self._run.config.sample.solver)
        weights = dict.fromkeys((own, *settings.weights))
        tried = [self._measure(params, step, weight) for weight in weights]
        report, images = min(tried, key=lambda found: found[0]["fd"])
        report |= {"unguided": self._unguided}
        write_report(self._workdir, report, images)
        return report

    def _measure(
        self, params: PyTree, step: int, weight: float
    ) -> tuple[dict[str, Any], np.ndarray]:
        prior = self._run.prior
        guidance = self._guidance(params, weight)
        report, images = self._evaluator.measure(step, prior.params, prior.buffers, guidance)
        return report | {"weight": weight}, images

    def _guidance(self, params: PyTree, weight: float) -> tuple[Guidance, ...]:
        """The weight is an array of the compiled sampler: another one compiles nothing."""
        run = self._run
        method = guidance_of(of(run.config), run.model, params, run.extractor)
        constants = method.constants | {"weight": np.float32(weight)}
        if weight == 0:
            constants |= {"corrector_weight": np.float32(0)}
        guided = dataclasses.replace(method, constants=constants)
        return *generated.base_guidance(run.config), guided
