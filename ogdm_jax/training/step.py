"""The train step: step(state, frozen, batch, key) -> (state, metrics), pure, the same under pmap,
mesh and one device.

Order of updates (OGDM's official code, 2310.04041): the denoiser on its loss, then every companion
on its own loss with the updated denoiser, then the moving average. Of devices the step knows
`axis`, `gather` and `scatter`.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree

from ogdm_jax import randomness
from ogdm_jax.config import Config, duration
from ogdm_jax.data import augment as augmentation
from ogdm_jax.diffusion.bound import variance_bound
from ogdm_jax.diffusion.denoiser import Denoiser
from ogdm_jax.diffusion.noise import NoiseDistribution
from ogdm_jax.diffusion.process import Discrete, eps_from_x0
from ogdm_jax.methods import contract as slots
from ogdm_jax.models import Model
from ogdm_jax.pixels import to_float
from ogdm_jax.training import optim
from ogdm_jax.training.state import CompanionState, TrainState, companion_optimiser
from ogdm_jax.typing import Array, PyTree

Batch = dict[str, Any]
Step = Callable[[TrainState, PyTree, Batch, Array], tuple[TrainState, dict[str, Array]]]


def draw_example(
    config: Config,
    model: Model,
    law: NoiseDistribution,
    batch: Batch,
    key: Array,
    noise_key: Array,
) -> slots.Example:
    """Augmentation, label dropout, noise level and noise of a (micro-)batch, each image from keys
    of its own.
    """
    index = batch["index"]
    keys = lambda purpose: randomness.example_keys(key, purpose, index)
    image = to_float(batch["image"])
    if config.data.xflip:
        image = augmentation.xflip(keys("xflip"), image)
    x0, augment = image, None
    if config.data.augment > 0:
        x0, augment = augmentation.AugmentPipe(p=config.data.augment).augment(
            keys("augment"), image
        )
    label = batch["label"] if model.label_dim else None
    if label is not None and config.data.label_dropout > 0:
        hidden = randomness.uniform(keys("label_dropout")) < config.data.label_dropout
        if label.ndim == 1:
            label = jnp.where(hidden, -1, label)
        else:  # a vector of numbers: no class is all zeros, as in EDM
            label = jnp.where(hidden[:, None], 0, label)
    sigma = (
        law.sample(keys("sigma"), index=index, batch=config.data.batch, key=key)
        if law.stratified
        else law.sample(keys("sigma"))
    )
    eps = randomness.normal(randomness.example_keys(noise_key, "noise", index), x0.shape[1:])
    return slots.Example(
        x0=x0,
        image=image,
        label=label,
        augment=augment,
        sigma=sigma,
        eps=eps,
        xt=x0 + sigma[:, None, None, None] * eps,
        index=index,
        key=key,
        noise_key=noise_key,
        references={k: v for k, v in batch.items() if k.startswith("reference")} or None,
    )


def denoiser_of(
    model: Model, params: PyTree, buffers: PyTree, example: slots.Example
) -> Callable[..., Denoiser]:
    """(purpose, augment=True) -> the denoiser of this example, its dropout keys by the purpose's
    name.
    """

    def make(purpose: str, augment: bool = True) -> Denoiser:
        return model.denoiser(
            params,
            buffers,
            augment=example.augment if augment else None,
            dropout_keys=example.keys(f"dropout/{purpose}"),
        )

    return make


def make_step(
    config: Config,
    model: Model,
    law: NoiseDistribution,
    filled: slots.Filled,
    tx: optax.GradientTransformation,
    rate: optax.Schedule,
    axis: str | None,
    ravel: bool = False,
    loss: Callable[..., tuple[Array, dict]] | None = None,
    gather: Callable[[PyTree], PyTree] = lambda params: params,
    scatter: Callable[[PyTree], PyTree] = lambda grads: grads,
) -> Step:
    """Builds the step of a configuration.

    Args:
      axis: name of the mapped device axis, or None (one device, or a mesh whose arrays are global).
      ravel: average gradients as one vector: between processes that is many times cheaper than leaf
        by leaf.
      loss: (params, state, frozen, batch, key) -> (mean loss, `sums` of metrics), in place of the
        denoiser's: the step of another kind of network (DG's discriminator); then model and law are
        not used.
      gather, scatter: of a plan that divides parameters: they are gathered where a network uses
        them, and gradients scattered before anything is done with them.
    """
    rounds, batch_size = config.optim.accumulate, config.data.batch
    halflife = duration(config.ema.halflife, batch_size, "config.ema.halflife") * batch_size
    rampup = (
        0.0 if config.init.workdir else config.ema.rampup
    )  # the average starts at good weights (EDM --transfer)

    def denoiser_loss(params, state: TrainState, frozen, batch: Batch, key: Array):
        example = draw_example(config, model, law, batch, key, key)
        denoiser = denoiser_of(model, params, state.buffers, example)
        x0_hat, eps_hat, bound = _denoised(model.table, denoiser("denoise"), example)
        example = example.replace(eps_hat=jax.lax.stop_gradient(eps_hat))
        loss, metrics = _denoising_loss(
            filled, law, example, x0_hat, denoiser, frozen, state.memory
        )
        metrics |= {"loss/denoise": loss}
        if bound is not None:
            loss, metrics = loss + bound, metrics | {"loss/variance": bound}
        for method in filled.penalties:
            companion = gather(state.companions[method.name].params) if method.companion else None
            # Its own lookup: a penalty sees its frozen tree and memory, never another method's.
            added, more = method.penalty(
                example,
                x0_hat,
                denoiser,
                companion,
                frozen.get(method.name),
                state.memory.get(method.name),
            )
            loss = loss + added
            metrics |= more | {f"loss/{method.name}": added}
        return jnp.mean(loss), sums(metrics | {"loss": loss})

    def companion_loss(
        params, method: slots.Slots, state: TrainState, frozen, batch: Batch, key: Array
    ):
        fresh = randomness.fold_in_name(key, f"{method.name}/companion")
        example = draw_example(
            config, model, law, batch, key if method.companion.resample == "noise" else fresh, fresh
        )
        updated = jax.lax.stop_gradient(gather(state.params))
        denoiser = denoiser_of(model, updated, state.buffers, example)
        loss, metrics = method.companion.loss(
            params, example, denoiser, frozen.get(method.name), state.step
        )
        return jnp.mean(loss), sums(metrics | {f"loss/{method.name}_companion": loss})

    def step(
        state: TrainState, frozen: PyTree, batch: Batch, key: Array
    ) -> tuple[TrainState, dict[str, Array]]:
        step_key = jax.random.fold_in(key, state.step)
        frozen = (
            frozen["whole"] | frozen["divided"]
        )  # by method; which devices hold what is settled by now
        grads, sums = _accumulate(
            loss or denoiser_loss, gather(state.params), rounds, batch, state, frozen, step_key
        )
        grads, bad = optim.sanitise(_average(scatter(grads), axis, ravel))
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        norm = optax.tree.norm(grads)
        beta = optim.ema_beta(state.step, batch_size, halflife, rampup)
        seen = state.step
        state = state.replace(
            params=optax.apply_updates(state.params, updates), opt_state=opt_state
        )

        for method in filled.companions:
            before = state.companions[method.name]
            own = lambda p, s, f, b, k, m=method: companion_loss(p, m, s, f, b, k)
            grads, more = _accumulate(
                own, gather(before.params), rounds, batch, state, frozen, step_key
            )
            grads, worse = optim.sanitise(_average(scatter(grads), axis, ravel))
            updates, opt_state = companion_optimiser(method.companion).update(
                grads, before.opt_state, before.params
            )
            after = CompanionState(optax.apply_updates(before.params, updates), opt_state)
            state = state.replace(companions=state.companions | {method.name: after})
            sums |= more
            bad = bad + worse

        metrics = _means(sums, axis)
        memory = dict(state.memory)
        for method in filled.methods:
            if method.remember is not None:
                memory[method.name] = method.remember(memory[method.name], metrics)
        state = state.replace(
            step=seen + 1, ema=optim.ema_update(state.ema, state.params, beta), memory=memory
        )
        return state, metrics | {
            "grad_norm": norm,
            "grad_nonfinite": bad,
            "learning_rate": rate(seen),
            "ema_beta": beta,
        }

    return step


def _denoised(
    table: Discrete | None, denoise: Denoiser, example: slots.Example
) -> tuple[Array, Array, Array | None]:
    """(x0_hat, eps_hat, loss of the learned variance [b] or None) from one evaluation.

    L_hybrid of arXiv 2102.09672 in the units of `slots.squared_error`, a sum over pixels: the
    bound's term times T / 1000, as guided-diffusion weighs it.
    """
    at = (example.xt, example.sigma, example.label)
    if denoise.variance is None or table is None:
        return *denoise.with_noise(*at), None
    x0_hat, fraction = denoise.variance(*at)
    bound = variance_bound(table, example.x0, x0_hat, example.sigma, fraction)
    pixels = example.x0.size // example.x0.shape[0]
    weight = pixels * len(table.alpha_bar) / 1000
    return x0_hat, eps_from_x0(example.xt, x0_hat, example.sigma), weight * bound


def _denoising_loss(
    filled, law, example, x0_hat, denoiser, frozen, memory
) -> tuple[Array, slots.Metrics]:
    """Target and distance, by their owners or by default: the clean image and the weighted squared
    error.
    """
    target, metrics = example.x0, {}
    if filled.target:
        target, metrics = filled.target.target(example, frozen.get(filled.target.name))
    if filled.distance:
        name = filled.distance.name
        loss, more = filled.distance.distance(
            example, x0_hat, target, denoiser, frozen.get(name), memory.get(name)
        )
        return loss, metrics | more
    return slots.squared_error(example, x0_hat, target, law.weight), metrics


def _accumulate(loss, params, rounds: int, batch: Batch, state, frozen, key) -> tuple[PyTree, dict]:
    """Mean gradient and summed metrics over `rounds` equal parts of the batch: exactly the big
    batch's.
    """
    grad = jax.grad(loss, has_aux=True)
    if rounds == 1:
        return grad(params, state, frozen, batch, key)
    references = {
        k: v for k, v in batch.items() if k.startswith("reference")
    }  # shared by all rounds, never cut
    parts = jax.tree.map(
        lambda a: a.reshape(rounds, a.shape[0] // rounds, *a.shape[1:]),
        {k: v for k, v in batch.items() if k not in references},
    )

    def body(carry, part):
        return jax.tree.map(
            jnp.add, carry, grad(params, state, frozen, part | references, key)
        ), None

    part = jax.tree.map(lambda a: a[0], parts) | references
    shapes = jax.eval_shape(grad, params, state, frozen, part, key)
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    (grads, sums), _ = jax.lax.scan(body, zeros, parts)
    return jax.tree.map(lambda g: g / rounds, grads), sums


def _average(grads: PyTree, axis: str | None, ravel: bool) -> PyTree:
    if axis is None:
        return grads
    if not ravel:
        return jax.lax.pmean(grads, axis)
    vector, unravel = ravel_pytree(grads)
    return unravel(jax.lax.pmean(vector, axis))


def sums(metrics: slots.Metrics) -> dict[str, tuple[Array, Array]]:
    """Per-example values, or (values, weights), as (sum of weighted values, sum of weights)."""
    out = {}
    for name, value in metrics.items():
        values, weights = value if isinstance(value, tuple) else (value, jnp.ones_like(value))
        values, weights = jax.lax.stop_gradient((values, weights.astype(values.dtype)))
        # A weight of 0 must hide whatever the value is, nan included.
        out[name] = (jnp.sum(jnp.where(weights != 0, values * weights, 0)), jnp.sum(weights))
    return out


def _means(sums: dict[str, tuple[Array, Array]], axis: str | None) -> dict[str, Array]:
    if axis is not None:
        sums = jax.lax.psum(sums, axis)
    return {name: total / weight for name, (total, weight) in sums.items()}
