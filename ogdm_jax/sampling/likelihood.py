"""The likelihood of images under the probability-flow ODE, in bits a dimension.

Along the flow y(t) of `adaptive` from the lowest level to the highest, the density changes by the
divergence of its slope (arXiv 2011.13456 section 4.3 and appendix D.2):

    ln p(x) = ln N(x(T); 0, std^2 I) + d ln(scale(0) / scale(T)) + integral of div slope dt

with d the numbers of an image. The divergence is its trace, sum_i J_ii, or Hutchinson's unbiased
estimate mean_k v_k J v_k^T with random v_k of mean 0 and covariance I, which are drawn once for an
image and kept along its flow (arXiv 1810.01367).

Images of 256 levels are dequantised uniformly, x = 2 (k + u) / 256 - 1 with u in [0, 1), so that
-E log2 p(x) / d + 7 bounds the bits of a level from above: a level's cell is 2^-7 wide in [-1, 1].
(score_sde's other offset, 8, is that of images in [0, 1].) Variational and importance-weighted
dequantisation, which lower the bound, are not here.

The prior knows nothing of the data's mean and spread. At sigma_max 80 that moves an image by up to
3e-3 bits (mean 0.2), up for one and down for another; a larger sigma_max moves it less.
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ogdm_jax import randomness
from ogdm_jax.brief import brief
from ogdm_jax.diffusion import grids
from ogdm_jax.diffusion.denoiser import as_denoiser
from ogdm_jax.sampling import adaptive
from ogdm_jax.sampling.adaptive import Control
from ogdm_jax.sampling.guidance import Guidance, Parts, combine
from ogdm_jax.sampling.sampler import image_keys, widened
from ogdm_jax.typing import Array, Denoise, PyTree

PROBES = ("rademacher", "gaussian", "exact")
DEFAULT = Control()
CELL = 7.0  # bits: -log2 of a level's width, 2 / 256


class Likelihood(NamedTuple):
    """Of each image, [B] each.

    Attributes:
      nats: ln p(x), the density in [-1, 1].
      bits: -log2 p(x) / d + 7, the bits a dimension of a dequantised image of 256 levels.
      nfe: network evaluations; each also takes the gradient, once for each probe.
      prior: [B,H,W,C], where the flow ends, over the prior's standard deviation.
    """

    nats: Array
    bits: Array
    nfe: Array
    prior: Array
    __repr__ = brief


def dequantised(images: Array, keys: Array) -> Array:
    """2 (k + u) / 256 - 1 in float32, u ~ U[0, 1) from each image's own key.

    Args:
      images: uint8 [B,H,W,C].
      keys: one key, or one of each image [B], as `sample` takes them.

    Raises:
      ValueError: images that are not uint8.
    """
    if images.dtype != jnp.uint8:
        raise ValueError(f"images: {images.dtype} given; expected uint8, levels from 0 to 255")
    draw = lambda key, image: jax.random.uniform(key, image.shape)
    keys = image_keys(keys, images.shape[0])
    noise = jax.vmap(draw)(randomness.fold_in_each(keys, "dequantise"), images)
    return (images.astype(jnp.float32) + noise) / 128.0 - 1.0


def _probes(keys: Array, shape: tuple[int, ...], probes: int, kind: str) -> Array:
    """[B,K,*shape]: of each image's key; of "exact" all unit vectors, K = d."""
    if kind == "exact":
        d = int(np.prod(shape))
        units = jnp.eye(d).reshape(d, *shape)
        return jnp.broadcast_to(units[None], (keys.shape[0], *units.shape))
    law = jax.random.rademacher if kind == "rademacher" else jax.random.normal
    draw = lambda key: law(key, (probes, *shape), jnp.float32)
    return jax.vmap(draw)(randomness.fold_in_each(keys, "probes"))


def _parts(guidance: Guidance | Sequence[Guidance], probes: int, probe: str) -> Parts:
    """The parts of guidance, and ValueError for what `log_likelihood` refuses."""
    parts = combine(guidance)
    noisy = [owner for owner in (parts.transition, parts.churn) if owner is not None]
    refused = [
        *((owner, "draws noise") for owner in noisy),
        *((owner, "shifts the mean of random steps") for owner in parts.shifts),
        *((owner, "remembers the step before") for owner in parts.remembering),
    ]
    if refused:
        owner, why = refused[0]
        raise ValueError(
            f"{owner.name}: it {why}; expected guidance that only changes the denoiser, for the "
            "likelihood is of a deterministic flow"
        )
    if probe not in PROBES:
        raise ValueError(f"probe={probe!r}; expected one of {', '.join(PROBES)}")
    if probes < 1:
        raise ValueError(f"probes={probes}; expected at least 1")
    whole = [dataclasses.replace(g, denoiser=g.exact or g.denoiser) for g in parts.transforms]
    return parts._replace(transforms=tuple(whole))


def log_likelihood(
    denoise: Denoise,
    x0: Array,
    keys: Array,
    label: PyTree = None,
    guidance: Guidance | Sequence[Guidance] = (),
    *,
    sigma_min: float = 0.002,
    sigma_max: float = 80.0,
    probes: int = 1,
    probe: str = "rademacher",
    control: Control = DEFAULT,
) -> Likelihood:
    """The likelihood of images; pure, wrap it in jax.jit. An image's depends on its own key alone.

    Args:
      denoise: a `Denoiser`, or a plain function (x [B,...], sigma [B], label) -> x0_hat.
      x0: floats [B,H,W,C], dequantised (see `dequantised`), computed with in float32 at least;
        taken as lying at sigma_min, as in score_sde.
      keys: of the probes: one key, or one of each image [B], as `sample` takes them.
      label: the images' condition.
      guidance: methods that change the denoiser (cfg, dg); others are refused. The divergence is
        that of the whole correction: a discriminator is differentiated twice.
      sigma_min, sigma_max: ends of the flow, clipped to the denoiser's levels.
      probes: K, how many v_k for an image.
      probe: "rademacher", "gaussian", or "exact": the trace itself, d gradients an evaluation.
      control: tolerance, of the state and of the integral over d, and variable. The prior's std is
        sigma_max, and sqrt(1 + sigma_max^2) in the variable vp, whose own is N(0, I).

    Raises:
      ValueError: guidance with a transition or churn; a setting out of range; a discrete network;
        x0 of integers.
    """
    parts = _parts(guidance, probes, probe)
    denoise = parts.transform(as_denoiser(denoise))
    adaptive.check_control(control, denoise)
    low, high = grids.clip_range(denoise, sigma_min, sigma_max)
    if not 0 < low < high:
        raise ValueError(f"sigma_min={low}, sigma_max={high}; expected 0 < sigma_min < sigma_max")
    x0, keys = widened(x0, "x0"), image_keys(keys, x0.shape[0])
    variable, shape = adaptive.VARIABLES[control.variable], x0.shape[1:]
    d = int(np.prod(shape))
    times = variable.time(jnp.asarray([low, high], x0.dtype))
    ends = variable.scale(times)
    std = np.sqrt(1 + high**2) if control.variable == "vp" else high

    def norm(error: PyTree) -> Array:
        state, integral = error
        return jnp.maximum(jnp.sqrt(jnp.mean(state**2)), jnp.abs(integral))

    def one(x0: Array, label: PyTree, probes: Array) -> adaptive.Solved:
        own = adaptive.one_image(denoise, variable, label)

        def slope(t: Array, state: PyTree) -> PyTree:
            dy, pull = jax.vjp(lambda y: own(t, y), state[0])
            rows = jax.vmap(lambda v: jnp.vdot(pull(v)[0], v))(probes)
            trace = rows.sum() if probe == "exact" else rows.mean()
            return dy, trace / d

        start = (x0 * ends[0], jnp.zeros((), x0.dtype))
        return adaptive.solve(slope, start, times, control, norm)

    drawn = _probes(keys, shape, probes, probe).astype(x0.dtype)
    (y, integral), nfe = jax.vmap(one)(x0, label, drawn)
    z = y / ends[1] / std
    log_prior = jnp.mean(-0.5 * z**2, tuple(range(1, z.ndim))) - 0.5 * np.log(2 * np.pi)
    per_number = log_prior - np.log(std) + jnp.log(ends[0] / ends[1]) + integral
    return Likelihood(d * per_number, CELL - per_number / np.log(2), nfe, z)
