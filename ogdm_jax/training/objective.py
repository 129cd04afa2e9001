"""What a step minimises: for a denoiser, target, distance and penalties (methods/contract.py)."""

import dataclasses
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp

from ogdm_jax.config import Config
from ogdm_jax.diffusion.bound import variance_bound
from ogdm_jax.diffusion.denoiser import Denoiser
from ogdm_jax.diffusion.noise import NoiseDistribution, bins
from ogdm_jax.diffusion.process import Discrete, eps_from_x0
from ogdm_jax.methods.contract import (
    DenoiserOf,
    Example,
    Methods,
    Metrics,
    Own,
    noise_bins,
    squared_error,
)
from ogdm_jax.models import Model
from ogdm_jax.training.example import Batch, denoiser_of, draw_example
from ogdm_jax.training.gradients import Sums, sums
from ogdm_jax.training.state import TrainState
from ogdm_jax.typing import Array, PyTree

# (params, state, {method: its constants}, batch, step's key) -> (mean loss, sums of metrics):
# params are differentiated; the state tells what else the loss needs (buffers, carries).
Loss = Callable[[PyTree, TrainState, Mapping[str, PyTree], Batch, Array], tuple[Array, Sums]]
# (params, buffers, batch, key, noise_key) -> (example, its denoiser): what a method's own network
# is trained on.
See = Callable[[PyTree, PyTree, Batch, Array, Array], tuple[Example, DenoiserOf]]


@dataclasses.dataclass(frozen=True)
class Objective:
    """A loss, and for methods with networks of their own what these see of a batch."""

    loss: Loss
    see: See | None = None


def denoising(
    config: Config,
    model: Model,
    noise: NoiseDistribution,
    methods: Methods,
    gather: Callable[[PyTree], PyTree],
) -> Objective:
    """The objective of a denoiser.

    gather: of a plan that divides the state: a carry is gathered where a penalty uses it, and the
      text encoder where captions are encoded. That is done here, once a step for all networks that
      are asked, as tokens are 308 bytes a caption and contexts 158 kB (77 x 1024, bfloat16): to
      keep, read and send these would cost far more than the encoder's share of a step, about 2 % of
      the operations of Stable Diffusion 2.1's U-Net.

    Its metrics have, as "level/LOW-HIGH", the weighted squared error to the clean image in bins of
    sigma: the same figure whatever the target and the distance of a method are.
    """
    edges = bins(noise)

    def see(
        params: PyTree, buffers: PyTree, batch: Batch, key: Array, noise_key: Array
    ) -> tuple[Example, DenoiserOf]:
        example = draw_example(config, model, noise, batch, key, noise_key)
        if model.text is not None:
            label = model.condition(gather(buffers), example.label)
            example = dataclasses.replace(example, label=label)
        return example, denoiser_of(model, params, buffers, example)

    def loss(
        params: PyTree, state: TrainState, constants: Mapping[str, PyTree], batch: Batch, key: Array
    ) -> tuple[Array, Sums]:
        # Each method's own lookup: it sees its constants and carry, never another's.
        own = lambda name: Own(constants.get(name), gather(state.carry.get(name)))
        example, denoiser = see(params, state.buffers, batch, key, key)
        x0_hat, eps_hat, bound = _denoised(model.table, denoiser("denoise"), example)
        example = dataclasses.replace(example, eps_hat=jax.lax.stop_gradient(eps_hat))
        total, metrics = denoising_loss(methods, noise, example, x0_hat, denoiser, own)
        metrics |= {"loss/denoise": total}
        error = squared_error(example, x0_hat, example.x0, noise.weight)
        metrics |= noise_bins({"level": error}, example.sigma, edges)
        if bound is not None:
            total, metrics = total + bound, metrics | {"loss/variance": bound}
        for method in methods.all:
            if method.penalty is None:
                continue
            added, more = method.penalty(example, x0_hat, denoiser, own(method.name))
            total = total + added
            metrics |= more | {f"loss/{method.name}": added}
        return jnp.mean(total), sums(metrics | {"loss": total})

    return Objective(loss, see)


def _denoised(
    table: Discrete | None, denoise: Denoiser, example: Example
) -> tuple[Array, Array, Array | None]:
    """(x0_hat, eps_hat, loss of the learned variance [b] or None) from one evaluation.

    L_hybrid of arXiv 2102.09672 in the units of `squared_error`, a sum over pixels: the bound's
    term times T / 1000, as guided-diffusion weighs it.
    """
    at = (example.xt, example.sigma, example.label)
    if denoise.variance is None or table is None:
        return *denoise.with_noise(*at), None
    x0_hat, fraction = denoise.variance(*at)
    bound = variance_bound(table, example.x0, x0_hat, example.sigma, fraction)
    pixels = example.x0.size // example.x0.shape[0]
    weight = pixels * len(table.alpha_bar) / 1000
    return x0_hat, eps_from_x0(example.xt, x0_hat, example.sigma), weight * bound


def denoising_loss(
    methods: Methods,
    noise: NoiseDistribution,
    example: Example,
    x0_hat: Array,
    denoiser: DenoiserOf,
    own: Callable[[str], Own],
) -> tuple[Array, Metrics]:
    """Target and distance [b], by their owners or by default: the clean image and the weighted
    squared error.
    """
    target, metrics = example.x0, {}
    if methods.target is not None and methods.target.target is not None:
        target, metrics = methods.target.target(example, own(methods.target.name))
    if methods.distance is not None and methods.distance.distance is not None:
        mine = own(methods.distance.name)
        loss, more = methods.distance.distance(example, x0_hat, target, denoiser, mine)
        return loss, metrics | more
    return squared_error(example, x0_hat, target, noise.weight), metrics
