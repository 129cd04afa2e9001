"""One-step rules from noise level sigma to a lower sigma_next, in the coordinate x = x0 + sigma *
eps.

Samplers scan these rules over a grid; OGDM's projection is one of them applied to a training batch,
so every rule takes one sigma per example ([B]), is differentiable, and stays finite, value and
gradient, at sigma_next = 0. VP and DDPM samplers are the same rules on x_vp / sqrt(alpha_bar) with
sigma = sqrt(1 / alpha_bar - 1): see process.py.

Rules named *_moments return the Gaussian transition (mean [B,H,W,C], std [B]) that guidance
(DPS, DSG) may change.
"""

from collections.abc import Callable, Sequence

import jax.numpy as jnp

from ogdm_jax.diffusion.denoiser import as_denoiser
from ogdm_jax.typing import Array, Denoise, PyTree

# Adams-Bashforth weights of equal steps, newest slope first. PNDM uses them on every grid (arXiv
# 2202.09778 eq. 12).
ADAMS_BASHFORTH = {
    1: (1.0,),
    2: (3 / 2, -1 / 2),
    3: (23 / 12, -16 / 12, 5 / 12),
    4: (55 / 24, -59 / 24, 37 / 24, -9 / 24),
}


def per_example(v: Array, x: Array) -> Array:
    """[B] -> [B,1,...,1] of x's rank and dtype, so that it multiplies x [B,...] without implicit
    broadcasting.
    """
    return jnp.asarray(v, x.dtype).reshape((-1,) + (1,) * (x.ndim - 1))


def spread(std: float | Array, x: Array) -> Array:
    """A transition's std, a number, [B] or like x, so that it multiplies x without implicit
    broadcasting.
    """
    std = jnp.asarray(std)
    return per_example(std, x) if std.ndim <= 1 else std.astype(x.dtype)


def safe_sqrt(v: Array) -> Array:
    """sqrt(max(v, 0)) whose gradient at v <= 0 is 0 and not infinite; nan stays."""
    nothing = v <= 0
    return jnp.where(nothing, 0.0, jnp.sqrt(jnp.where(nothing, 1.0, v)))


def _x0(denoise: Denoise, x: Array, sigma: Array, label: PyTree) -> Array:
    return denoise(x, sigma, label).astype(x.dtype)


def slope(x: Array, x0_hat: Array, sigma: Array) -> Array:
    """dx/dsigma of the probability-flow ODE (arXiv 2206.00364 eq. 3), the model's eps: (x - x0_hat)
    / sigma.
    """
    return (x - x0_hat) / per_example(sigma, x)


def euler_update(x: Array, x0_hat: Array, sigma: Array, sigma_next: Array) -> Array:
    """x0_hat + (sigma_next / sigma) (x - x0_hat); exactly x0_hat at sigma_next = 0. It is DDIM with
    eta = 0.
    """
    r = per_example(sigma_next, x) / per_example(sigma, x)
    return r * x + (1 - r) * x0_hat


def euler(
    denoise: Denoise,
    x: Array,
    sigma: Array,
    sigma_next: Array,
    label: PyTree = None,
    x0_hat: Array | None = None,
) -> Array:
    """One Euler step of dx/dsigma = (x - D(x; sigma)) / sigma (arXiv 2206.00364 algorithm 1 without
    its correction).

    Args:
      denoise: the denoiser D.
      x: [B,H,W,C] state at sigma.
      sigma, sigma_next: [B], sigma > 0, sigma_next >= 0.
      label: [B] or None, passed to denoise.
      x0_hat: [B,H,W,C], D(x; sigma) where the caller has it already: then denoise is not called.

    Returns:
      [B,H,W,C] state at sigma_next.
    """
    if x0_hat is None:
        x0_hat = _x0(denoise, x, sigma, label)
    return euler_update(x, x0_hat, sigma, sigma_next)


def heun(
    denoise: Denoise,
    x: Array,
    sigma: Array,
    sigma_next: Array,
    label: PyTree = None,
    x0_hat: Array | None = None,
    floor: float = 0.0,
) -> Array:
    """One Heun step: Euler, then the mean of both slopes (arXiv 2206.00364 algorithm 1 lines 4-8).

    Examples with sigma_next <= floor keep the Euler result; their correction is evaluated at sigma
    instead, so that neither its value nor its gradient can be infinite. OGDM's released projection
    uses floor = 0.002 and masks by a product, which gives nan at sigma_next = 0; the sampler of EDM
    drops the correction at 0 only.

    Args:
      denoise: the denoiser D. Its `corrector`, where it has one, makes the second evaluation (with
        dropout keys of its own in training; with another weight under guidance).
      x, sigma, sigma_next, label, x0_hat: as in `euler`.
      floor: sigma_next up to which no correction is made.

    Returns:
      [B,H,W,C] state at sigma_next.
    """
    if x0_hat is None:
        x0_hat = _x0(denoise, x, sigma, label)
    predicted = euler_update(x, x0_hat, sigma, sigma_next)
    correct = sigma_next > floor
    sigma_safe = jnp.where(correct, sigma_next, sigma)
    corrector = as_denoiser(denoise).corrector or denoise
    second = _x0(corrector, predicted, sigma_safe, label)
    corrected = heun_update(x, x0_hat, predicted, second, sigma, sigma_next, sigma_safe)
    return jnp.where(correct.reshape((-1,) + (1,) * (x.ndim - 1)), corrected, predicted)


def heun_update(
    x: Array,
    x0_hat: Array,
    predicted: Array,
    second: Array,
    sigma: Array,
    sigma_next: Array,
    sigma_second: Array,
) -> Array:
    """Heun's x + (sigma_next - sigma) (d + d') / 2, d' = (predicted - second) / sigma_second."""
    slopes = slope(x, x0_hat, sigma), slope(predicted, second, sigma_second)
    return heun_mean(x, *slopes, sigma, sigma_next)


def heun_mean(x: Array, d: Array, d_next: Array, sigma: Array, sigma_next: Array) -> Array:
    """A Heun step, x + (sigma_next - sigma) (d + d_next) / 2, of the slopes at its two ends."""
    h = per_example(sigma_next, x) - per_example(sigma, x)
    return x + h * 0.5 * (d + d_next)


def split_sigma(sigma: Array, sigma_next: Array, eta: float | Array = 1.0) -> tuple[Array, Array]:
    """(sigma_down, std) with sigma_down^2 + std^2 = sigma_next^2 and std = eta sigma' sqrt(1 -
    sigma'^2 / sigma^2).

    DDIM's eta (arXiv 2010.02502 eq. 16) in this coordinate; eta = 1 gives the DDPM posterior:
    sigma_down = sigma'^2 / sigma. eta in [0, 1], so std <= sigma_next. Shapes [B] in and out.
    """
    # products of sums below: differences of squares would cancel in float32
    ratio = sigma_next / sigma
    std = eta * sigma_next * safe_sqrt((1 - ratio) * (1 + ratio))
    return sigma_next * safe_sqrt((1 - eta) * (1 + eta) + (eta * ratio) ** 2), std


def ddim_moments(
    x: Array, x0_hat: Array, sigma: Array, sigma_next: Array, eta: float | Array = 0.0
) -> tuple[Array, Array]:
    """(mean, std [B]) of DDIM's transition (arXiv 2010.02502 eq. 12): Euler to sigma_down, then
    noise std.
    """
    down, std = split_sigma(sigma, sigma_next, eta)
    return euler_update(x, x0_hat, sigma, down), std


def ddim(
    denoise: Denoise,
    x: Array,
    sigma: Array,
    sigma_next: Array,
    label: PyTree = None,
    x0_hat: Array | None = None,
    eta: float = 0.0,
    noise: Array | None = None,
) -> Array:
    """One DDIM step (arXiv 2010.02502 eq. 12); eta = 0 is `euler`, eta = 1 the DDPM posterior.

    Args:
      denoise, x, sigma, sigma_next, label, x0_hat: as in `euler`.
      eta: share of the posterior's noise, in [0, 1].
      noise: [B,H,W,C] ~ N(0, I), needed where eta > 0.

    Raises:
      ValueError: eta > 0 without noise.
    """
    if noise is None and (isinstance(eta, Array) or eta != 0):
        raise ValueError(
            f"ddim: eta={eta} draws noise, but noise is None; expected noise shaped like x, or "
            "eta=0"
        )
    if x0_hat is None:
        x0_hat = _x0(denoise, x, sigma, label)
    mean, std = ddim_moments(x, x0_hat, sigma, sigma_next, eta)
    return mean if noise is None else mean + per_example(std, x) * noise


def posterior_std(
    sigma: Array, sigma_next: Array, variance: str | float | Array = "small"
) -> Array:
    """Standard deviation of DDPM's reverse transition, in this coordinate; 0 where sigma_next = 0.

    Args:
      sigma, sigma_next: [B].
      variance: "small", the posterior's beta_tilde = sigma'^2 (1 - sigma'^2 / sigma^2); "large",
        beta = (1 + sigma'^2) (sigma^2 - sigma'^2) / (1 + sigma^2); "diffusion", sigma^2 - sigma'^2,
        of the reverse SDE (arXiv 2011.13456 appendix E); or a number or array in [0, 1], the
        learned fraction between log "small" (0) and log "large" (1) of arXiv 2102.09672 eq. 15.

    Returns:
      [B], or the broadcast shape where variance is an array.

    Raises:
      ValueError: an unknown name.
    """
    gap = (sigma - sigma_next) * (sigma + sigma_next)
    small = (sigma_next / sigma) ** 2 * gap
    large = (1 + sigma_next**2) * gap / (1 + sigma**2)
    if isinstance(variance, str):
        named = {"small": small, "large": large, "diffusion": gap}
        if variance not in named:
            raise ValueError(
                f"variance={variance!r}; expected {', '.join(named)} or a fraction in [0, 1]"
            )
        return jnp.where(sigma_next > 0, safe_sqrt(named[variance]), 0.0)
    fraction = jnp.asarray(variance, small.dtype)
    small, large = (v.reshape(v.shape + (1,) * max(fraction.ndim - 1, 0)) for v in (small, large))
    positive = small > 0  # then large is positive too
    low, high = (jnp.log(jnp.where(positive, v, 1.0)) for v in (small, large))
    return jnp.where(positive, jnp.exp(0.5 * (fraction * high + (1 - fraction) * low)), 0.0)


def ancestral_moments(
    x: Array,
    x0_hat: Array,
    sigma: Array,
    sigma_next: Array,
    variance: str | float | Array = "small",
) -> tuple[Array, Array]:
    """(mean, std) of DDPM's reverse transition (arXiv 2006.11239 eq. 7), whatever the choice of its
    variance.

    mean = x0_hat + (sigma'^2 / sigma^2) (x - x0_hat), the posterior's; std as `posterior_std`.
    """
    mean = euler_update(x, x0_hat, sigma, sigma_next**2 / sigma)
    return mean, posterior_std(sigma, sigma_next, variance)


def shifted_mean(
    mean: Array, std: Array, gradient: Array, sigma: Array, sigma_next: Array
) -> Array:
    """DDPM's mean under a classifier (arXiv 2105.05233 algorithm 1): mean + Sigma g at x_t.

    As released both are of x_vp = x / sqrt(1 + sigma^2); with g = grad_x here and std that of
    sigma_next the shift is std^2 sqrt((1 + sigma^2) / (1 + sigma'^2)) g. The last step, to 0, has
    no variance here and no shift; the released code moves it by at most beta_0 = 1e-4 times g_vp.

    Args:
      mean, gradient: [B,H,W,C].
      std: [B] or like mean.
      sigma, sigma_next: [B].
    """
    scale = jnp.sqrt((1 + sigma**2) / (1 + sigma_next**2))
    return mean + spread(std, mean) ** 2 * per_example(scale, mean) * gradient


def ancestral(
    denoise: Denoise,
    x: Array,
    sigma: Array,
    sigma_next: Array,
    label: PyTree = None,
    x0_hat: Array | None = None,
    noise: Array | None = None,
    variance: str | float | Array = "small",
) -> Array:
    """One ancestral (DDPM) step: `ancestral_moments` plus std * noise; noise=None returns the
    mean.
    """
    if x0_hat is None:
        x0_hat = _x0(denoise, x, sigma, label)
    mean, std = ancestral_moments(x, x0_hat, sigma, sigma_next, variance)
    if noise is None:
        return mean
    return mean + spread(std, x) * noise


def heun_moments(
    denoise: Denoise,
    x: Array,
    x0_hat: Array,
    sigma: Array,
    sigma_next: Array,
    label: PyTree = None,
    eta: float | Array = 1.0,
) -> tuple[Array, Array]:
    """(mean, std [B]) of "Heun down, noise up": a Heun step to sigma_down, then noise back up to
    sigma_next.

    With an exact denoiser the ODE carries the density at sigma to the one at sigma_down, and N(0,
    std^2) carries that
    to sigma_next: a second-order transition for guided sampling. One more evaluation; Euler where
      sigma_down = 0.
    """
    down, std = split_sigma(sigma, sigma_next, eta)
    return heun(denoise, x, sigma, down, label, x0_hat), std


def pndm(x: Array, slopes: Sequence[Array], sigma: Array, sigma_next: Array) -> Array:
    """One linear multistep step x + (sigma_next - sigma) sum_j w_j d_{i-j} with constant
    Adams-Bashforth weights.

    PNDM's rule (arXiv 2202.09778 eq. 12) in this coordinate, where its transfer function is the
    Euler step.

    Args:
      x: [B,H,W,C] state at sigma.
      slopes: 1 to 4 slopes d [B,H,W,C], newest first; their number is the order.
      sigma, sigma_next: [B].

    Raises:
      ValueError: no slope, or more than 4.
    """
    if len(slopes) not in ADAMS_BASHFORTH:
        raise ValueError(f"pndm: {len(slopes)} slopes; expected 1 to 4, newest first")
    d = sum(w * s for w, s in zip(ADAMS_BASHFORTH[len(slopes)], slopes))
    return x + (per_example(sigma_next, x) - per_example(sigma, x)) * d


def dpmpp_2m(
    x: Array, x0_hat: Array, x0_before: Array, sigma: Array, sigma_next: Array, sigma_before: Array
) -> Array:
    """One DPM-Solver++(2M) step (arXiv 2211.01095 algorithm 2) with lambda = -log sigma.

    x' = (sigma' / sigma) x + (1 - sigma' / sigma) (x0_hat + (x0_hat - x0_before) h / (2 h_before)),
    h = log(sigma / sigma'), h_before = log(sigma_before / sigma).

    First order (Euler) where sigma_next = 0 or sigma_before = sigma, which also serves as the first
    step.

    Args:
      x, x0_hat: state and denoised image at sigma; x0_before: the denoised image at sigma_before.
      sigma, sigma_next, sigma_before: [B], sigma_before >= sigma > sigma_next >= 0.
    """
    moments = dpmpp_2m_moments(x, x0_hat, x0_before, sigma, sigma_next, sigma_before, 0.0)
    return moments[0]


def dpmpp_2m_moments(
    x: Array,
    x0_hat: Array,
    x0_before: Array,
    sigma: Array,
    sigma_next: Array,
    sigma_before: Array,
    eta: float | Array = 1.0,
) -> tuple[Array, Array]:
    """(mean, std [B]) of DPM-Solver++(2M)'s step of the reverse SDE (arXiv 2211.01095 algorithm 4
    for eta 1; any eta as in k-diffusion's midpoint form).

    mean = q x + (1 - q) (x0_hat + (x0_hat - x0_before) h / (2 h_before)),
    q = (sigma' / sigma)^(1 + eta),    std = sigma' sqrt(1 - (sigma' / sigma)^(2 eta)).

    To first order (see `dpmpp_2m`) it is `ddim_moments` with eta 0 at eta 0, and with 1 at 1; eta
    = 0 is `dpmpp_2m`.

    Args:
      x, x0_hat, x0_before, sigma, sigma_next, sigma_before: as in `dpmpp_2m`.
      eta: in [0, 1].
    """
    second_order = (sigma_next > 0) & (sigma_before > sigma)
    h = jnp.log(sigma / jnp.where(second_order, sigma_next, sigma))
    h_before = jnp.log(jnp.where(second_order, sigma_before, 2 * sigma) / sigma)
    weight = per_example(jnp.where(second_order, h / (2 * h_before), 0.0), x)
    positive = sigma_next > 0
    log_ratio = jnp.log(jnp.where(positive, sigma_next, sigma) / sigma)
    down = sigma_next * jnp.exp(eta * log_ratio)
    std = jnp.where(positive, sigma_next * safe_sqrt(-jnp.expm1(2 * eta * log_ratio)), 0.0)
    return euler_update(x, x0_hat + weight * (x0_hat - x0_before), sigma, down), std


def pseudo_runge_kutta(
    slopes_at: tuple[Callable[[Array], Array], Callable[[Array], Array], Callable[[Array], Array]],
    x: Array,
    sigma: Array,
    sigma_middle: Array,
    sigma_next: Array,
) -> tuple[Array, Array]:
    """One classical Runge-Kutta step of order 4, F-PNDM's starter (arXiv 2202.09778 eq. 13).

    Args:
      slopes_at: three functions x -> slope, at sigma, at sigma_middle (called twice) and at
        sigma_next.
      x: [B,H,W,C] state at sigma.
      sigma, sigma_middle, sigma_next: [B], all > 0.

    Returns:
      (x at sigma_next, the first slope). Four evaluations.
    """
    start, middle, end = slopes_at
    half, full = (per_example(s, x) - per_example(sigma, x) for s in (sigma_middle, sigma_next))
    d1 = start(x)
    d2 = middle(x + half * d1)
    d3 = middle(x + half * d2)
    d4 = end(x + full * d3)
    return x + full * (d1 + 2 * d2 + 2 * d3 + d4) / 6, d1
