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

| | flow | v |
|---|---|---|
| c_skip | 1 / (1 + s) | 1 / (s^2 + 1) |
| c_out | -s / (1 + s) | -s / sqrt(s^2 + 1) |
| c_in | 1 / (1 + s) | 1 / sqrt(s^2 + 1) |
| c_noise | s / (1 + s) | t of a beta table |

score_sde.py has two more.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax.numpy as jnp

from ogdm_jax.diffusion import process
from ogdm_jax.diffusion.denoiser import Denoiser, clipped, same_level
from ogdm_jax.typing import Array, NetworkFn, PyTree

Coefficients = tuple[Array, Array, Array, Array]
Taps = Callable[[Array, Array, PyTree, str], PyTree]  # (x times c_in, c_noise, label, at)


def _per_image(c: Array) -> Array:
    return c[:, None, None, None]


@dataclasses.dataclass(frozen=True)
class _Network:
    """A network and its coefficients: what the fields of its Denoiser compute.

    Attributes:
      network_fn: F(x, c_noise, label).
      coefficients: sigma [B] -> (c_skip, c_out, c_in, c_noise), [B] each.
      rest: sigma [B] -> 1 - c_skip, where that difference cancels (EDM); None: c_skip is 0 or 1.
      learned_variance: the network has as many further channels v.
      network_taps: features of the network, or None.
    """

    network_fn: NetworkFn
    coefficients: Callable[[Array], Coefficients]
    rest: Callable[[Array], Array] | None
    learned_variance: bool
    network_taps: Taps | None

    def evaluate(self, x: Array, sigma: Array, label: PyTree = None) -> Array:
        """x0_hat; channels of the network beyond those of x are dropped."""
        return self._parts(x, sigma, label)[0]

    def variance(self, x: Array, sigma: Array, label: PyTree = None) -> tuple[Array, Array]:
        """(x0_hat, (v + 1) / 2) with v the network's further channels."""
        x0_hat, _, further = self._parts(x, sigma, label)
        return x0_hat, (further + 1) / 2

    def noise(self, x: Array, sigma: Array, label: PyTree = None) -> tuple[Array, Array]:
        """(x0_hat, eps_hat), eps_hat = ((1 - c_skip) x - c_out F) / sigma: no cancellation."""
        x0_hat, output, _ = self._parts(x, sigma, label)
        x = x.astype(x0_hat.dtype)
        sigma = jnp.broadcast_to(jnp.asarray(sigma, x.dtype), (x.shape[0],))
        c_skip, c_out, *_ = self.coefficients(sigma)
        rest = 1 - c_skip if self.rest is None else self.rest(sigma)
        return x0_hat, _per_image(rest / sigma) * x - _per_image(c_out / sigma) * output

    def taps(self, x: Array, sigma: Array, label: PyTree, at: str) -> PyTree:
        """The network's own features, as they are."""
        assert self.network_taps is not None  # else the Denoiser has no taps
        x, _, c_in, c_noise = self._input(x, sigma)
        return self.network_taps(_per_image(c_in) * x, c_noise, label, at)

    def _parts(self, x: Array, sigma: Array, label: PyTree) -> tuple[Array, Array, Array]:
        """(x0_hat, the network's output in the image's channels, its further channels)."""
        x, (c_skip, c_out), c_in, c_noise = self._input(x, sigma)
        output = self.network_fn(_per_image(c_in) * x, c_noise, label)
        output, further = (
            part.astype(x.dtype) for part in jnp.split(output, [x.shape[-1]], axis=-1)
        )
        if self.learned_variance and further.shape != x.shape:
            raise ValueError(
                f"denoise: the network has {further.shape[-1]} channels besides the {x.shape[-1]} "
                "of the image; expected as many for the learned variance"
            )
        x0_hat = _per_image(c_skip) * x + _per_image(c_out) * output
        return x0_hat, output, further

    def _input(self, x: Array, sigma: Array) -> tuple[Array, tuple[Array, Array], Array, Array]:
        """(x in at least float32, (c_skip, c_out), c_in, c_noise)."""
        x = jnp.asarray(x)
        if x.ndim != 4:
            raise ValueError(f"denoise: x has shape {x.shape}; expected [B, H, W, C]")
        x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        sigma = jnp.asarray(sigma).astype(x.dtype)
        if sigma.shape not in ((), (1,), (x.shape[0],)):
            raise ValueError(
                f"denoise: sigma has shape {sigma.shape}; expected one number or [{x.shape[0]}]"
            )
        c_skip, c_out, c_in, c_noise = self.coefficients(jnp.broadcast_to(sigma, (x.shape[0],)))
        return x, (c_skip, c_out), c_in, c_noise


def make(
    network_fn: NetworkFn,
    coefficients: Callable[[Array], Coefficients],
    sigma_min: float = 0.0,
    sigma_max: float = float("inf"),
    *,
    round_sigma: Callable[[Array], Array] = same_level,
    rest: Callable[[Array], Array] | None = None,
    learned_variance: bool = False,
    clip: bool = False,
    taps: Taps | None = None,
) -> Denoiser:
    """The denoiser c_skip x + c_out F(c_in x; c_noise) of a network: every function here is this.

    Args:
      network_fn: F(x, c_noise, label) -> [B,H,W,C], or with further channels, which are dropped.
      coefficients: sigma [B] -> (c_skip, c_out, c_in, c_noise), [B] each.
      sigma_min, sigma_max, round_sigma: see `Denoiser`.
      rest: sigma [B] -> 1 - c_skip, where that difference cancels; None: c_skip is 0 or 1.
      learned_variance: the network's further C channels v say the variance of DDPM's steps.
      clip: clamp x0_hat to [-1, 1].
      taps: (x times c_in, c_noise, label, at) -> features of the network, or None.

    Returns:
      A Denoiser whose sigma may be one number or [B]. It raises ValueError for x that is no
      [B,H,W,C] and sigma of another shape.
    """
    network = _Network(network_fn, coefficients, rest, learned_variance, taps)
    made = Denoiser(
        network.evaluate,
        sigma_min,
        sigma_max,
        round_sigma,
        variance=network.variance if learned_variance else None,
        noise=network.noise,
        taps=network.taps if taps else None,
        parts=lambda sigma: coefficients(sigma)[:2],
    )
    return clipped(made) if clip else made


def _edm(sigma: Array, sigma_data: float) -> Coefficients:
    total = jnp.square(sigma) + sigma_data**2
    root = jnp.sqrt(total)
    return sigma_data**2 / total, sigma * sigma_data / root, 1 / root, jnp.log(sigma) / 4


def _edm_rest(sigma: Array, sigma_data: float) -> Array:
    return jnp.square(sigma) / (jnp.square(sigma) + sigma_data**2)


def edm(network_fn: NetworkFn, sigma_data: float = 0.5, *, taps: Taps | None = None) -> Denoiser:
    """EDM: network input and target have variance 1 at every level for data of standard deviation
    sigma_data.

    Levels (0, inf); c_noise = ln(sigma)/4 is finite for sigma > 0 only. Raises ValueError for
    sigma_data <= 0.
    """
    if not sigma_data > 0:
        raise ValueError(
            f"precondition.edm: sigma_data {sigma_data} given; expected a positive number"
        )
    coefficients = functools.partial(_edm, sigma_data=sigma_data)
    rest = functools.partial(_edm_rest, sigma_data=sigma_data)
    return make(network_fn, coefficients, rest=rest, taps=taps)


VP, VP_STEPS = process.VP(), 1000


def _vp(sigma: Array) -> Coefficients:
    one = jnp.ones_like(sigma)
    return one, -sigma, 1 / jnp.sqrt(jnp.square(sigma) + 1), (VP_STEPS - 1) * VP.time(sigma)


def vp(network_fn: NetworkFn, *, taps: Taps | None = None) -> Denoiser:
    """Score SDE's variance-preserving networks (2011.13456): F = eps, levels sigma(1e-5) = 0.001 to
    sigma(1) = 152.
    """
    return make(network_fn, _vp, float(VP.sigma(1e-5)), float(VP.sigma(1.0)), taps=taps)


def _ve(sigma: Array) -> Coefficients:
    one = jnp.ones_like(sigma)
    return one, sigma, one, jnp.log(0.5 * sigma)


def ve(
    network_fn: NetworkFn,
    sigma_min: float = 0.02,
    sigma_max: float = 100.0,
    *,
    taps: Taps | None = None,
) -> Denoiser:
    """Score SDE's variance-exploding networks (2011.13456): F = sigma * score, that is -eps; levels
    0.02 to 100.
    """
    return make(network_fn, _ve, sigma_min, sigma_max, taps=taps)


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


def iddpm(network_fn: NetworkFn, steps: int = 1000, *, taps: Taps | None = None) -> Denoiser:
    """The networks of iDDPM and ADM on the cosine schedule (2102.09672, 2105.05233): F = eps at the
    nearest of `steps` levels.

    round_sigma gives that level; only the time step is rounded here, as in the authors' code, so
    samplers should round their grid first. The network may have more output channels than x (a
    learned variance); they are dropped.
    """
    u = process.iddpm_levels(steps)
    return make(
        network_fn,
        functools.partial(_iddpm, steps=steps),
        float(u[steps - 1]),
        float(u[0]),
        round_sigma=functools.partial(_iddpm_round, steps=steps),
        taps=taps,
    )


def _adm_round(table: process.Discrete, sigma: Array) -> Array:
    sigma = jnp.asarray(sigma)
    sigma = sigma.astype(jnp.promote_types(sigma.dtype, jnp.float32))
    return jnp.asarray(table.sigma, sigma.dtype)[table.index(sigma)]


def _adm(
    sigma: Array, table: process.Discrete, predict: str, scale: float, interpolate: bool
) -> Coefficients:
    one, steps = jnp.ones_like(sigma), jnp.asarray(table.timesteps * scale, sigma.dtype)
    time = scale * table.time(sigma) if interpolate else steps[table.index(sigma)]
    signal = 1 / jnp.sqrt(jnp.square(sigma) + 1)
    skip, out = {
        "eps": (one, -sigma),
        "x0": (jnp.zeros_like(sigma), one),
        "v": (jnp.square(signal), -sigma * signal),
    }[predict]
    return skip, out, signal, time


def time_scale(steps: int, rescale: bool) -> float:
    """What a network calls one step of a discrete process: 1, or 1000 / T."""
    return 1000 / steps if rescale else 1.0


def adm(
    network_fn: NetworkFn,
    betas: process.Schedule | process.Discrete = "linear",
    steps: int = 1000,
    *,
    predict: str = "eps",
    learned_variance: bool = False,
    clip: bool = False,
    rescale_timesteps: bool = False,
    interpolate: bool = False,
    taps: Taps | None = None,
) -> Denoiser:
    """DDPM's discrete networks: OpenAI's ADM, OGDM_adm's and DSG's U-Nets (2006.11239, 2105.05233).

    F(x / sqrt(1 + sigma^2), t) = eps with t the step whose level sqrt(1 / alpha_bar - 1) is nearest
    on a logarithmic scale. Only the time step is rounded, as in `iddpm`; samplers round their grid
    by round_sigma. A grid of `grids.respaced` meets the levels exactly: then ancestral and ddim are
    guided-diffusion's p_sample and ddim_sample. With `interpolate` nothing is rounded: t lies
    between two steps (`process.Discrete.time`), for grids of any levels.

    Args:
      betas: "linear", "cosine" or "scaled_linear", the numbers, or a table, whose kept steps are
        the known levels.
      steps: T.
      predict: "eps", "x0" for networks that predict the image, or "v" (see `v_prediction`).
      learned_variance: the network has 2 C output channels; the ancestral solver then takes its
        variance from them.
      clip: clamp x0_hat to [-1, 1], as guided-diffusion does when it samples (and not when it
        trains).
      rescale_timesteps: the network was told t 1000 / T.
      interpolate: t of a level between two steps lies between theirs, which networks of sines of t
        take, as all published ones are.

    Raises:
      ValueError: unknown betas or another predict.
    """
    if predict not in ("eps", "x0", "v"):
        raise ValueError(f"precondition.adm: predict {predict!r} given; expected 'eps', 'x0', 'v'")
    table = process.as_table(betas, steps)
    scale = time_scale(steps, rescale_timesteps)
    return make(
        network_fn,
        functools.partial(_adm, table=table, predict=predict, scale=scale, interpolate=interpolate),
        float(table.sigma[0]),
        float(table.sigma[-1]),
        round_sigma=same_level if interpolate else functools.partial(_adm_round, table),
        rest=functools.partial(_edm_rest, sigma_data=1.0) if predict == "v" else None,
        clip=clip,
        learned_variance=learned_variance,
        taps=taps,
    )


def v_prediction(
    network_fn: NetworkFn,
    betas: process.Schedule | process.Discrete = "linear",
    steps: int = 1000,
    *,
    zero_terminal: bool = False,
    clip: bool = False,
    rescale_timesteps: bool = False,
    interpolate: bool = False,
    taps: Taps | None = None,
) -> Denoiser:
    """Discrete networks of the velocity F(z, t) = v = a eps - b x0 at z = a x0 + b eps, with
    a^2 + b^2 = 1 (2202.00512): x0_hat = a z - b F, eps_hat = b z + a F.

    It is -F of `edm` with sigma_data 1, told the step of a table in place of ln(sigma) / 4.

    Args:
      network_fn, betas, steps, clip, rescale_timesteps, interpolate, taps: as in `adm`.
      zero_terminal: the betas are moved so that the last step is pure noise
        (`process.Discrete.make`; 2305.08891). Its level is process.PURE_NOISE: there z is the
        latents and x0_hat is -F, both to float32's rounding, so that a grid of `grids.ddim` with
        "trailing" spacing starts where such models were trained. A table brings its own end.

    Raises:
      ValueError: unknown betas, or zero_terminal with a table.
    """
    if zero_terminal:
        if isinstance(betas, process.Discrete):
            raise ValueError(
                "precondition.v_prediction: zero_terminal given with a table; expected betas, or "
                "the table of process.Discrete.make(..., zero_terminal=True) alone"
            )
        betas = process.Discrete.make(betas, steps, zero_terminal=True)
    settings = {"clip": clip, "rescale_timesteps": rescale_timesteps, "taps": taps}
    return adm(network_fn, betas, steps, predict="v", interpolate=interpolate, **settings)


FLOW = process.Flow()


def _flow(sigma: Array, time_scale: float) -> Coefficients:
    signal, t = 1 / (1 + sigma), FLOW.time(sigma)
    return signal, -t, signal, time_scale * t


def flow(
    network_fn: NetworkFn,
    t_min: float = 0.0,
    t_max: float = 1.0,
    *,
    time_scale: float = 1.0,
    taps: Taps | None = None,
) -> Denoiser:
    """Rectified flow's and flow matching's networks of the velocity F(z, t) = v = eps - x0 on the
    straight path z = (1 - t) x0 + t eps (2209.03003, 2210.02747, 2403.03206): x0_hat = z - t F,
    eps_hat = z + (1 - t) F.

    x = z / (1 - t) and sigma = t / (1 - t). One Euler step of dz/dt = F from t to t' gives
    (1 - t') x0_hat + t' eps_hat, which is in x the Euler step from sigma to sigma' of this package:
    solver "euler" on `grids.flow` is the sampler that such models are published with, as the path
    is straight in both. Papers that let t run from noise to data call 1 - t what is t here, and
    their velocity is -F.

    Args:
      t_min, t_max: range of times that the network knows; 1 is the level process.PURE_NOISE, where
        z is the latents.
      time_scale: what the network is told at t = 1: 1, or 1000 (Stable Diffusion 3).

    Raises:
      ValueError: not 0 <= t_min < t_max <= 1.
    """
    if not 0 <= t_min < t_max <= 1:
        raise ValueError(
            f"precondition.flow: times {t_min} to {t_max} given; expected 0 <= t_min < t_max <= 1"
        )
    high = FLOW.sigma(t_max) if t_max < 1 else process.PURE_NOISE
    return make(
        network_fn,
        functools.partial(_flow, time_scale=time_scale),
        FLOW.sigma(t_min),
        min(high, process.PURE_NOISE),
        rest=FLOW.time,
        taps=taps,
    )
