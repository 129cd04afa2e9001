"""The predictor-corrector sampler of score_sde (arXiv 2011.13456 section 4.2, algorithms 2 to 5):
Langevin steps at a level, then a step of the reverse diffusion to the next.

Both processes in this package's coordinate x = x_vp / a, a = 1 / sqrt(1 + sigma^2), with D =
x0_hat, d = (x - D) / sigma, z ~ N(0, I) and r^2 = (1 + sigma'^2) / (1 + sigma^2), VP's 1 - beta:

    VE   x' = x + (1 - sigma'^2 / sigma^2) (D - x) + sqrt(sigma^2 - sigma'^2) z
    VP   x' = r (2 - r) x + r (1 - sigma'^2 / sigma^2) (D - x) + r sqrt(sigma^2 - sigma'^2) z
    Langevin   x <- x - 2 q^2 sigma d + 2 q sigma z,    q = snr sqrt(alpha) ||z|| / ||d||

VE's step is `steps.ancestral_moments` with variance "diffusion", VP's std its "large". The released
Langevin step e = 2 alpha (snr ||z|| / ||score||)^2 with score = -d / sigma is x + e score +
sqrt(2 e) z; in x_vp the score is 1 / a times ours, so e is a^2 times ours and the step the same,
but for alpha: 1 for VE, r^2 for VP.

Differences from the released code: norms are of each image and not their mean over the batch, so
that an image does not depend on its batch (a batch of one is equal); levels are those of the grid
and not a table that time points into; the last step has no noise (there: denoise=True).
"""

import jax
import jax.numpy as jnp

from ogdm_jax.diffusion import steps
from ogdm_jax.diffusion.steps import per_example
from ogdm_jax.sampling.churn import Info
from ogdm_jax.sampling.solvers import Phase, Problem, Step, random_body
from ogdm_jax.typing import Array, PyTree


def pc(p: Problem, x: Array, n: int) -> tuple[list[Phase], PyTree]:
    """N times `corrector_steps` Langevin steps and a predictor step.

    The predictor's step is a transition that guidance may own; the Langevin steps follow the score
    of the guided denoiser (classifier-free guidance, DG), but a method that owns transitions does
    not move them: it is published with one guided step at each level. Noise of the Langevin steps
    has the numbers from N on.
    """
    snr, count, sde = (p.options[name] for name in ("snr", "corrector_steps", "sde"))

    def moments(x0: Array, x: Array, info: Info) -> tuple[Array, Array]:
        return reverse_diffusion_moments(x, x0, info.sigma, info.sigma_next, sde)

    def corrected(x: Array, info: Info) -> tuple[Array, Array]:
        """(x after the Langevin steps, the first x0_hat)."""
        alpha = _alpha(info.sigma, info.sigma_next) if sde == "vp" else 1.0

        def again(i: Array, state: tuple[Array, Array]) -> tuple[Array, Array]:
            x, first = state
            x0_hat, noise = p.x0(x, info.sigma), p.noise(n + count * info.step + i)
            moved = langevin_step(x, x0_hat, info.sigma, noise, snr, alpha)
            return moved, jnp.where(i == 0, x0_hat, first)

        return jax.lax.fori_loop(0, count, again, (x, x))

    def body(x: Array, carry: PyTree, info: Info) -> Step:
        if not count:
            return random_body(p, moments, x, carry, info)
        x, first = corrected(x, info)
        return *random_body(p, moments, x, carry, info)[:2], first

    return [Phase(body, 0, n)], ()


def _alpha(sigma: Array, sigma_next: Array) -> Array:
    """1 - beta of the VP step between two levels, [B]."""
    return (1 + sigma_next**2) / (1 + sigma**2)


def reverse_diffusion_moments(
    x: Array, x0_hat: Array, sigma: Array, sigma_next: Array, sde: str
) -> tuple[Array, Array]:
    """(mean like x, std [B]) of the reverse diffusion's step, see above; std 0 at sigma_next = 0.

    Args:
      x, x0_hat: [B,H,W,C] state and denoised image at sigma.
      sigma, sigma_next: [B].
      sde: "ve" or "vp".
    """
    if sde == "ve":
        return steps.ancestral_moments(x, x0_hat, sigma, sigma_next, "diffusion")
    r = jnp.sqrt(_alpha(sigma, sigma_next))
    share = r * (1 - (sigma_next / sigma) ** 2)
    mean = per_example(r * (2 - r), x) * x + per_example(share, x) * (x0_hat - x)
    return mean, steps.posterior_std(sigma, sigma_next, "large")


def langevin_step(
    x: Array, x0_hat: Array, sigma: Array, noise: Array, snr: float, alpha: float | Array = 1.0
) -> Array:
    """One Langevin step at a level, of the size that keeps the signal-to-noise ratio (arXiv
    2011.13456 algorithms 4 and 5).

    Args:
      x, x0_hat: [B,H,W,C] state and denoised image at sigma.
      sigma: [B].
      noise: like x, ~ N(0, I).
      snr: the ratio.
      alpha: a number or [B], see above.

    Returns:
      Like x; x itself where the score is 0, which says no size. Norms are float32 at least.
    """
    d = steps.slope(x, x0_hat, sigma)
    noise_norm, slope_norm = _norm(noise), _norm(d)
    known = slope_norm != 0  # of nan too, which stays
    ratio = jnp.where(known, noise_norm / jnp.where(known, slope_norm, 1.0), 0.0)
    q = snr * jnp.sqrt(jnp.asarray(alpha)) * ratio
    return x - per_example(2 * q**2 * sigma, x) * d + per_example(2 * q * sigma, x) * noise


def _norm(v: Array) -> Array:
    """[B] Euclidean norm of each image."""
    wide = v.astype(jnp.promote_types(v.dtype, jnp.float32)).reshape(v.shape[0], -1)
    return steps.safe_sqrt(jnp.sum(wide**2, axis=1))
