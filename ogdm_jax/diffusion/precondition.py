"""From a raw network to a denoiser: denoise(x, sigma) = c_skip x + c_out F(c_in x; c_noise).

2206.00364, table 1 and appendix C. sigma is the standard deviation of the noise around an unscaled
image (the variance-exploding coordinate) for all of them, so that losses and samplers need not know
which one they are given.

| | EDM | VP | VE | iDDPM | ADM |
|---|---|---|---|---|---|
| c_skip | sd^2 / (s^2 + sd^2) | 1 | 1 | 1 | 1 |
| c_out | s sd / sqrt(s^2 + sd^2) | -s | s | -s | -s |
| c_in | 1 / sqrt(s^2 + sd^2) | 1 / sqrt(s^2 + 1) | 1 | 1 / sqrt(s^2 + 1) | 1 / sqrt(s^2 + 1) |
| c_noise | ln(s) / 4 | 999 t(s) | ln(s / 2) | 999 - argmin_j abs(u_j - s) | t of a beta table |
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import jax.numpy as jnp
import numpy as np

from ogdm_jax.diffusion import process
from ogdm_jax.typing import Array, Denoise, NetworkFn

Coefficients = tuple[Array, Array, Array, Array]


@dataclasses.dataclass(frozen=True)
class Preconditioned:
    """A denoiser made of a network: denoise(x [B,H,W,C], sigma [B] or scalar, label, **extra) ->
    x0_hat [B,H,W,C].

    Attributes:
      network_fn: F(x, c_noise, label, **extra). Channels beyond those of x (a learned variance) are
        dropped.
      coefficients: sigma [B] -> (c_skip, c_out, c_in, c_noise), [B] each.
      sigma_min, sigma_max: levels the network is made for.
      round_sigma: sigma -> the level the network is evaluated at (the identity but for iDDPM, ADM);
        for samplers.
      clip: clamp x0_hat to [-1, 1].
      learned_variance: the network's further channels v say the variance of DDPM's steps; see
        with_variance.
      rest: sigma [B] -> 1 - c_skip, where that difference cancels (EDM); None: c_skip is 0 or 1.
    """

    network_fn: NetworkFn
    coefficients: Callable[[Array], Coefficients]
    sigma_min: float = 0.0
    sigma_max: float = float("inf")
    round_sigma: Callable[[Array], Array] = jnp.asarray
    clip: bool = False
    learned_variance: bool = False
    rest: Callable[[Array], Array] | None = None

    def __call__(self, x: Array, sigma: Array, label: Array | None = None, **extra) -> Array:
        """x0_hat. Extra keywords go to the network; with tap, the network's features are returned
        as they are.
        """
        return self._evaluate(x, sigma, label, **extra)[0]

    @property
    def with_variance(self) -> Callable[..., tuple[Array, Array]] | None:
        """(x, sigma, label, **extra) -> (x0_hat, fraction) in one evaluation, or None without a
        learned variance.

        fraction [B,H,W,C] = (v + 1) / 2: where the variance lies between the logarithms of the
        smaller and the larger one of `steps.posterior_std` (2102.09672 eq. 15); it may leave [0,
        1]. Decorators hand this attribute on as is.
        """
        return self._evaluate if self.learned_variance else None

    def with_noise(
        self, x: Array, sigma: Array, label: Array | None = None, **extra
    ) -> tuple[Array, Array]:
        """(x0_hat, eps_hat) in one evaluation, eps_hat = ((1 - c_skip) x - c_out F) / sigma.

        That is (x - x0_hat) / sigma without its cancellation, which costs 4e-5 at sigma 0.002. With
        clip it is that difference, of the clamped x0_hat.
        """
        x0_hat, _, output = self._parts(x, sigma, label, **extra)
        x, per_image = x.astype(x0_hat.dtype), lambda c: c[:, None, None, None]
        sigma = jnp.broadcast_to(jnp.asarray(sigma, x.dtype), (x.shape[0],))
        if self.clip:
            return x0_hat, (x - x0_hat) / per_image(sigma)
        c_skip, c_out, *_ = self.coefficients(sigma)
        rest = 1 - c_skip if self.rest is None else self.rest(sigma)
        return x0_hat, per_image(rest / sigma) * x - per_image(c_out / sigma) * output

    def _evaluate(
        self, x: Array, sigma: Array, label: Array | None = None, **extra
    ) -> tuple[Array, Array | None]:
        return self._parts(x, sigma, label, **extra)[:2]

    def _parts(
        self, x: Array, sigma: Array, label: Array | None = None, **extra
    ) -> tuple[Array, Array | None, Array]:
        """(x0_hat, variance's fraction or None, the network's output in the image's channels)."""
        if x.ndim != 4:
            raise ValueError(f"denoise: x has shape {x.shape}; expected [B, H, W, C]")
        x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        sigma = jnp.asarray(sigma, x.dtype)
        if sigma.shape not in ((), (1,), (x.shape[0],)):
            raise ValueError(
                f"denoise: sigma has shape {sigma.shape}; expected one number or [{x.shape[0]}]"
            )
        c_skip, c_out, c_in, c_noise = self.coefficients(jnp.broadcast_to(sigma, (x.shape[0],)))
        per_image = lambda c: c[:, None, None, None]
        output = self.network_fn(per_image(c_in) * x, c_noise, label, **extra)
        if extra.get("tap") is not None:
            return output, None, output
        output, further = (
            part.astype(x.dtype) for part in jnp.split(output, [x.shape[-1]], axis=-1)
        )
        x0_hat = per_image(c_skip) * x + per_image(c_out) * output
        x0_hat = jnp.clip(x0_hat, -1, 1) if self.clip else x0_hat
        if not self.learned_variance:
            return x0_hat, None, output
        if further.shape != x.shape:
            raise ValueError(
                f"denoise: the network has {further.shape[-1]} channels besides the {x.shape[-1]} "
                "of the image; "
                "expected as many for the learned variance"
            )
        return x0_hat, (further + 1) / 2, output


def hand_on(denoise: Denoise, decorated: Denoise) -> Denoise:
    """`decorated` with what samplers ask of the denoiser that it decorates: range of levels,
    rounding, variance.

    A guided denoiser keeps the variance of its base: only x0_hat is guided (with_variance is handed
    on as it is).
    """
    for name in ("sigma_min", "sigma_max", "round_sigma", "with_variance"):
        if hasattr(denoise, name):
            setattr(decorated, name, getattr(denoise, name))
    return decorated


def _edm(sigma: Array, sigma_data: float) -> Coefficients:
    total = jnp.square(sigma) + sigma_data**2
    root = jnp.sqrt(total)
    return sigma_data**2 / total, sigma * sigma_data / root, 1 / root, jnp.log(sigma) / 4


def _edm_rest(sigma: Array, sigma_data: float) -> Array:
    return jnp.square(sigma) / (jnp.square(sigma) + sigma_data**2)


def edm(network_fn: NetworkFn, sigma_data: float = 0.5) -> Preconditioned:
    """EDM: network input and target have variance 1 at every level for data of standard deviation
    sigma_data.

    Levels (0, inf); c_noise = ln(sigma)/4 is finite for sigma > 0 only. Raises ValueError for
    sigma_data <= 0.
    """
    if not sigma_data > 0:
        raise ValueError(
            f"precondition.edm: sigma_data {sigma_data} given; expected a positive number"
        )
    coefficients, rest = (functools.partial(f, sigma_data=sigma_data) for f in (_edm, _edm_rest))
    return Preconditioned(network_fn, coefficients, rest=rest)


VP, VP_STEPS = process.VP(), 1000


def _vp(sigma: Array) -> Coefficients:
    one = jnp.ones_like(sigma)
    return one, -sigma, 1 / jnp.sqrt(jnp.square(sigma) + 1), (VP_STEPS - 1) * VP.time(sigma)


def vp(network_fn: NetworkFn) -> Preconditioned:
    """Score SDE's variance-preserving networks (2011.13456): F = eps, levels sigma(1e-5) = 0.001 to
    sigma(1) = 152.
    """
    return Preconditioned(network_fn, _vp, float(VP.sigma(1e-5)), float(VP.sigma(1.0)))


def _ve(sigma: Array) -> Coefficients:
    one = jnp.ones_like(sigma)
    return one, sigma, one, jnp.log(0.5 * sigma)


def ve(network_fn: NetworkFn, sigma_min: float = 0.02, sigma_max: float = 100.0) -> Preconditioned:
    """Score SDE's variance-exploding networks (2011.13456): F = sigma * score, that is -eps; levels
    0.02 to 100.
    """
    return Preconditioned(network_fn, _ve, sigma_min, sigma_max)


def iddpm_index(sigma: Array, steps: int = 1000) -> Array:
    """argmin_j |u_j - sigma| as int32, the shape of sigma; the lower index of two equally near."""
    sigma = jnp.asarray(sigma)
    sigma = sigma.astype(jnp.promote_types(sigma.dtype, jnp.float32))
    u = jnp.asarray(process.iddpm_levels(steps), sigma.dtype).reshape((1,) * sigma.ndim + (-1,))
    return jnp.argmin(jnp.abs(sigma[..., None] - u), axis=-1).astype(jnp.int32)


def _iddpm_round(sigma: Array, steps: int) -> Array:
    sigma = jnp.asarray(sigma)
    index = iddpm_index(sigma, steps)
    return jnp.asarray(process.iddpm_levels(steps), jnp.promote_types(sigma.dtype, jnp.float32))[
        index
    ]


def _iddpm(sigma: Array, steps: int) -> Coefficients:
    c_noise = (steps - 1 - iddpm_index(sigma, steps)).astype(sigma.dtype)
    return jnp.ones_like(sigma), -sigma, 1 / jnp.sqrt(jnp.square(sigma) + 1), c_noise


def iddpm(network_fn: NetworkFn, steps: int = 1000) -> Preconditioned:
    """iDDPM and ADM networks on the cosine schedule (2102.09672, 2105.05233): F = eps at the
    nearest of `steps` levels.

    round_sigma gives that level; only the time step is rounded here, as in the authors' code, so
    samplers should round their grid first. The network may have more output channels than x (a
    learned variance); they are dropped.
    """
    u = process.iddpm_levels(steps)
    return Preconditioned(
        network_fn,
        functools.partial(_iddpm, steps=steps),
        float(u[steps - 1]),
        float(u[0]),
        functools.partial(_iddpm_round, steps=steps),
    )


def _adm_time(table: process.Discrete, sigma: Array, scale: float) -> Array:
    return jnp.asarray(table.timesteps * scale, sigma.dtype)[table.index(sigma)]


def _adm_round(table: process.Discrete, sigma: Array) -> Array:
    sigma = jnp.asarray(sigma)
    sigma = sigma.astype(jnp.promote_types(sigma.dtype, jnp.float32))
    return jnp.asarray(table.sigma, sigma.dtype)[table.index(sigma)]


def _adm(sigma: Array, table: process.Discrete, predict: str, scale: float) -> Coefficients:
    one, time = jnp.ones_like(sigma), _adm_time(table, sigma, scale)
    skip, out = (one, -sigma) if predict == "eps" else (jnp.zeros_like(sigma), one)
    return skip, out, 1 / jnp.sqrt(jnp.square(sigma) + 1), time


def adm(
    network_fn: NetworkFn,
    betas: str | Sequence[float] | np.ndarray | process.Discrete = "linear",
    steps: int = 1000,
    *,
    predict: str = "eps",
    learned_variance: bool = False,
    clip: bool = False,
    rescale_timesteps: bool = False,
) -> Preconditioned:
    """DDPM's discrete networks: OpenAI's ADM, OGDM_adm's and DSG's U-Nets (2006.11239, 2105.05233).

    F(x / sqrt(1 + sigma^2), t) = eps with t the step whose level sqrt(1 / alpha_bar - 1) is nearest
    on a logarithmic scale. Only the time step is rounded, as in `iddpm`; samplers round their grid
    by round_sigma. A grid of `grids.respaced` meets the levels exactly: then ancestral and ddim are
    guided-diffusion's p_sample and ddim_sample.

    Args:
      betas: "linear" or "cosine", the numbers, or a table, whose kept steps are the known levels.
        steps: T.
      predict: "eps", or "x0" for networks that predict the image.
      learned_variance: the network has 2 C output channels; the ancestral solver then takes its
        variance from them.
      clip: clamp x0_hat to [-1, 1], as guided-diffusion does when it samples (and not when it
        trains).
      rescale_timesteps: the network was told t 1000 / T.

    Raises:
      ValueError: unknown betas or another predict.
    """
    if predict not in ("eps", "x0"):
        raise ValueError(f"precondition.adm: predict {predict!r} given; expected 'eps' or 'x0'")
    table = betas if isinstance(betas, process.Discrete) else process.Discrete.make(betas, steps)
    scale = 1000 / steps if rescale_timesteps else 1.0
    return Preconditioned(
        network_fn,
        functools.partial(_adm, table=table, predict=predict, scale=scale),
        float(table.sigma[0]),
        float(table.sigma[-1]),
        functools.partial(_adm_round, table),
        clip,
        learned_variance,
    )
