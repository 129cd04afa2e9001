"""What a command tells a sampling method: `build(settings, session) -> Guidance`."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from ogdm_jax.config import Config, Sample
from ogdm_jax.inverse.measured import Measured
from ogdm_jax.inverse.tasks import TASKS
from ogdm_jax.models import Model
from ogdm_jax.sampling.churn import Churn
from ogdm_jax.sampling.guidance import Guidance


@dataclasses.dataclass(frozen=True)
class Session:
    """One run of sampling, before anything is compiled.

    Attributes:
      model: what is sampled.
      config: the configuration that it was trained with.
      sampling: solver, steps, eta and grid of the run.
      settings: the Settings of every method of the run, by name.
      churn: of the run, where no method brings it.
      labels: [n] classes of the images, tokens of their texts (a dict), or None.
      measured: the measurements, where the run has a task.
      open_discriminator: DG's settings -> its guidance, read from a training folder.
      open_model: (folder, step or None, the option that named it) -> a trained model, with model,
        params and buffers.
    """

    model: Model
    config: Config
    sampling: Sample
    settings: Mapping[str, Any]
    churn: Churn | None = None
    labels: Any = None
    measured: Measured | None = None
    open_discriminator: Callable[[Any], Guidance] | None = None
    open_model: Callable[[str, int | None, str], Any] | None = None

    def need_measurement(self, method: str) -> Measured:
        """The measurements. Raises ValueError where the run has no task."""
        if self.measured is None:
            raise ValueError(f"--task: not given for {method}; expected one of {', '.join(TASKS)}")
        return self.measured

    def need_gaussian(self, method: str) -> Measured:
        """The measurements, for a method with a transition of its own that knows Gaussian noise of
        one size only.

        Raises:
          ValueError: no task, Poisson noise, unknown singular values, or churn.
        """
        measured = self.need_measurement(method)
        if measured.poisson:
            raise ValueError(
                f"--task.poisson: {measured.poisson:g} given for {method}, which knows Gaussian "
                "noise of one size only; expected --task.noise, or --guidance dsg"
            )
        if self.churn is not None:
            raise ValueError(
                f"--churn: given for {method}, which brings a transition of its own; expected "
                "--solver ddim with --eta 1, or --solver ancestral"
            )
        if measured.operator.spectrum is None:
            why, expected = "", "inpaint, super_resolution, deblur or denoise, or --guidance dsg"
            if not self.model.pixels:
                why = ", which a decoder of latents does not have"
                expected = "a model of pixels, or --guidance dsg or dps"
            raise ValueError(
                f"--guidance {method} with --task {measured.task}: needs known singular values"
                f"{why}; expected {expected}"
            )
        return measured
