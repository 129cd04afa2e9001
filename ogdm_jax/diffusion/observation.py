"""The projection that OGDM's discriminator judges, and the losses of both players (2310.04041).

x_s = one sampler step of the denoiser from x_t to a lower level s
ell_G(z) = -z or softplus(-z),  ell_D(z_r, z_f) = relu(1 - z_r) + relu(1 + z_f) or its logistic
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from ogdm_jax.config import choose
from ogdm_jax.diffusion import steps
from ogdm_jax.typing import Array, Denoise

# images [B,h,w,c] -> logits [B], with condition and label bound
Discriminate = Callable[[Array], Array]
SOLVERS, LOSSES = ("euler", "heun", "ddim"), ("hinge", "logistic")


def project(
    denoise: Denoise,
    xt: Array,
    sigma: Array,
    sigma_next: Array,
    solver: str = "euler",
    label: Array | None = None,
    x0_hat: Array | None = None,
    floor: float = 0.002,
) -> Array:
    """One deterministic sampler step x_t -> x_s with the current denoiser: what the discriminator
    judges.

        d = (x_t - D(x_t; sigma_t)) / sigma_t,   Euler: x_s = x_t + (sigma_s - sigma_t) d
        (2206.00364, alg. 1)

    Heun's correction is left out where sigma_s <= floor, as in the authors' code (their sampler,
    and EDM's, leave it out only on the last step, to 0). DDIM is Euler in this coordinate.

    Args:
      xt: [B,h,w,c].   sigma, sigma_next: [B], 0 <= sigma_next <= sigma.   solver: "euler", "heun"
        or "ddim".
      x0_hat: [B,h,w,c] = denoise(xt, sigma, label) if it is known already.

    Returns:
      [B,h,w,c].

    Raises:
      ValueError: unknown solver.
    """
    choose("ogdm.solver", solver, SOLVERS)
    if solver == "heun":
        # float32's 0.002 is above the number 0.002: the slack keeps a level that was clipped to the
        # floor at the floor.
        return steps.heun(
            denoise, xt, sigma, sigma_next, label, x0_hat=x0_hat, floor=floor * (1 + 1e-6)
        )
    return getattr(steps, solver)(denoise, xt, sigma, sigma_next, label, x0_hat=x0_hat)


def generator_loss(logits: Array, kind: str = "hinge") -> Array:
    """ell_G of fake logits [B]: -z ("hinge", the authors' choice) or softplus(-z) = -log sigmoid(z)
    ("logistic").
    """
    choose("ogdm.loss", kind, LOSSES)
    return -logits if kind == "hinge" else jax.nn.softplus(-logits)


def discriminator_loss(real_logits: Array, fake_logits: Array, kind: str = "hinge") -> Array:
    """[B]: relu(1 - z_r) + relu(1 + z_f) ("hinge") or softplus(-z_r) + softplus(z_f)
    ("logistic").
    """
    choose("ogdm.loss", kind, LOSSES)
    if kind == "hinge":
        return jax.nn.relu(1 - real_logits) + jax.nn.relu(1 + fake_logits)
    return jax.nn.softplus(-real_logits) + jax.nn.softplus(fake_logits)


def r1_penalty(discriminate: Discriminate, images: Array) -> Array:
    """|grad_x sum_b D(x_b)|^2 per example [B] (1801.04406, eq. 9, without its gamma / 2).

    The gradient is of the batch's sum, so that it has the cross terms of minibatch statistics, as
    in the authors' code.
    """
    return logits_and_r1(discriminate, images)[1]


def logits_and_r1(discriminate: Discriminate, images: Array) -> tuple[Array, Array]:
    """(discriminate(images), r1_penalty(discriminate, images)) from one forward pass."""
    logits, pullback = jax.vjp(discriminate, images)
    (gradient,) = pullback(jnp.ones_like(logits))
    return logits, jnp.sum(jnp.square(gradient), axis=tuple(range(1, images.ndim)))
