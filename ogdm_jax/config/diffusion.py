"""The groups of settings that say what is diffused: preconditioning and the noise of training."""

import dataclasses

from ogdm_jax.config.fields import Group, decided, setting

_DISCRETE = ("precondition.kind=adm|v", "noise.distribution=ddpm|v")
_NORMAL = "distribution=edm|logit_normal"


@dataclasses.dataclass(frozen=True)
class Precondition(Group):
    """How the network becomes a denoiser."""

    kind: str = setting(
        "edm",
        "edm, vp, ve, iddpm, adm (eps of a discrete process), v (its velocity), flow (the "
        "velocity of the straight path), subvp, or smld (ve of 1,000 steps)",
        choices=("edm", "vp", "ve", "iddpm", "adm", "v", "flow", "subvp", "smld"),
    )
    sigma_data: float = setting(
        0.5,
        "standard deviation of the data in [-1, 1]; `data describe` measures it",
        least=1e-4,
        most=1e4,
        expected="a positive number from 1e-4 to 1e4",
    )
    sigma_max: float = setting(
        100.0,
        "ve, smld and noise.distribution ve: the highest level; the lowest is 0.02",
        above=0.02,
        most=1e6,
        only=("kind=ve|smld", "noise.distribution=ve"),
    )
    schedule: str = setting(
        "linear",
        "adm, v and noise.distribution ddpm, v: betas; scaled_linear is Stable Diffusion's",
        choices=("linear", "cosine", "scaled_linear"),
        only=_DISCRETE,
    )
    diffusion_steps: int = setting(
        1000, "and their number", least=2, most=10**5, expected="2 to 100,000", only=_DISCRETE
    )
    learned_variance: bool = setting(
        False,
        "adm: the network has channels for it, trained by the bound of L_hybrid",
        only="kind=adm",
    )
    rescale_timesteps: bool = setting(
        False, "adm, v: the network is told t * 1000 / diffusion_steps", only="kind=adm|v"
    )
    interpolate: bool = setting(
        False,
        "adm, v: of a level between two steps the network is told a time between theirs; else it "
        "is told, and grids are rounded to, the nearest step's",
        only="kind=adm|v",
    )
    zero_terminal: bool = setting(
        False, "v: betas moved so that the last step is pure noise", only="kind=v"
    )
    time_scale: float = setting(
        1000.0, "flow: what the network is told at t = 1", above=0, most=1e6, only="kind=flow"
    )

    def _check_together(self) -> None:
        least = {"linear": 20, "scaled_linear": 12}.get(self.schedule, 1)
        name = self.schedule
        more = f"more than {least} with the {name} schedule, whose betas are above 1 otherwise"
        self._require(self.diffusion_steps > least, "diffusion_steps", more)


@dataclasses.dataclass(frozen=True)
class Noise(Group):
    """The distribution of the noise levels of training."""

    distribution: str = decided(
        "edm",
        "edm (log-normal), vp, ve, ddpm (uniform over the discrete process), v (the same with v's "
        "weight), logit_normal or flow (uniform times) with the velocity's weight, or subvp",
        choices=("edm", "vp", "ve", "ddpm", "v", "logit_normal", "flow", "subvp"),
        was="law",
    )
    mean: float = decided(
        -1.2,
        "edm, logit_normal: of ln sigma = logit t (there 0 as published)",
        least=-30,
        most=30,
        only=_NORMAL,
    )
    std: float = decided(
        1.2,
        "edm, logit_normal: of ln sigma = logit t (there 1 as published)",
        above=0,
        most=30,
        expected="a positive number of at most 30",
        only=_NORMAL,
    )
    min_snr: float = decided(
        0.0,
        "ddpm: weight min(1 / sigma^2, this) of x0_hat's error (5 as published); 0 = 1 / sigma^2",
        least=0,
        only="distribution=ddpm",
    )
    clip: bool = decided(
        False,
        "clip sigma to [sample.sigma_min, sample.sigma_max] (OGDM's code; 2 draws in 100,000)",
        only=_NORMAL,
    )
    stratified: bool = decided(False, "spread the quantiles of a batch evenly")
