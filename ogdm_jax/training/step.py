"""The train step: step(state, constants, batch, key) -> (state, metrics), pure, the same under
pmap, mesh and one device.

Order of updates (that of 2310.04041's code): the denoiser on its loss, then every method's carry,
which meets the updated denoiser, then the moving average. Of devices the step knows what the plan
says of them: `axis`, `ravel`, `gather` and `scatter`.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import optax

from ogdm_jax.config import Config, duration
from ogdm_jax.methods.contract import Gradient, Methods, OwnLoss, Update
from ogdm_jax.parallel import Plan
from ogdm_jax.training import optim, power
from ogdm_jax.training.example import Batch
from ogdm_jax.training.gradients import BatchLoss, Sums, accumulate, average, means, sums
from ogdm_jax.training.objective import Objective
from ogdm_jax.training.state import TrainState
from ogdm_jax.typing import Array, PyTree

Step = Callable[[TrainState, Mapping[str, Any], Batch, Array], tuple[TrainState, dict[str, Array]]]
Gradients = Callable[[BatchLoss, PyTree, Batch], tuple[PyTree, dict[str, Array]]]


def make_step(
    config: Config,
    objective: Objective,
    methods: Methods,
    tx: optax.GradientTransformation,
    rate: optax.Schedule,
    plan: Plan,
) -> Step:
    """Builds the step of a configuration.

    Args:
      config: for batch size, accumulation rounds, clipping and moving averages.
      objective: what is minimised; its see() is needed where a carry trains a network.
      methods: whose carries are updated.
      tx: the optimiser.
      rate: its learning rate by step, for the log.
      plan: which devices there are.
    """
    batch_size = config.data.batch
    halflife = duration(config.ema.halflife, batch_size, "config.ema.halflife") * batch_size
    # The average starts at good weights where they come from a folder (EDM --transfer).
    trained = config.init.workdir and config.init.weights != "text"
    rampup = 0.0 if trained else config.ema.rampup
    exponents = [power.exponent(std) for std in config.ema.stds]
    gradients = _gradients(plan, config.optim.accumulate)

    def step(
        state: TrainState, constants: Mapping[str, Any], batch: Batch, key: Array
    ) -> tuple[TrainState, dict[str, Array]]:
        key, seen = jax.random.fold_in(key, state.step), state.step
        # By method, wherever their arrays lie.
        own = constants["whole"] | constants["divided"] | plan.gather(constants["weights"])
        before = state
        loss = lambda params, part: objective.loss(params, before, own, part, key)
        grads, metrics = gradients(loss, state.params, batch)
        clipped = optim.clip(grads, config.optim.clip)
        updates, opt_state = tx.update(clipped, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        state = replace(state, params=params, opt_state=opt_state)

        carry = dict(state.carry)
        for method in methods.all:
            if method.carry is None:
                continue
            gradient = _gradient(gradients, objective, plan, state, batch)
            update = Update(seen, key, metrics, own.get(method.name), gradient)
            carry[method.name], more = method.carry.update(carry[method.name], update)
            bad = metrics["grad_nonfinite"] + more.get("grad_nonfinite", 0)
            metrics = metrics | dict(more) | {"grad_nonfinite": bad}

        beta = optim.ema_beta(seen, batch_size, halflife, rampup)
        ema = optim.ema_update(state.ema, state.params, beta)
        averages = tuple(
            power.update(average, state.params, exponent, seen + 1)
            for average, exponent in zip(state.averages, exponents, strict=True)
        )
        state = replace(state, step=seen + 1, ema=ema, carry=carry, averages=averages)
        norm = optim.norm(grads)
        return state, metrics | {"grad_norm": norm, "learning_rate": rate(seen), "ema_beta": beta}

    return step


def _gradients(plan: Plan, rounds: int) -> Gradients:
    """(loss, params, batch) -> (mean gradient over rounds and devices, means of metrics)."""

    def gradients(loss: BatchLoss, params: PyTree, batch: Batch) -> tuple[PyTree, dict[str, Array]]:
        grads, totals = accumulate(loss, plan.gather(params), rounds, batch)
        grads, bad = optim.sanitise(average(plan.scatter(grads), plan.axis, plan.ravel))
        return grads, means(totals, plan.axis) | {"grad_nonfinite": bad}

    return gradients


def _gradient(
    gradients: Gradients, objective: Objective, plan: Plan, state: TrainState, batch: Batch
) -> Gradient:
    """What a carry is given to train a network of its own on this step's batch."""

    def gradient(
        loss: OwnLoss, params: PyTree, key: Array, noise_key: Array
    ) -> tuple[PyTree, dict[str, Array]]:
        def of_part(params: PyTree, part: Batch) -> tuple[Array, Sums]:
            if objective.see is None:
                raise TypeError("this objective shows its batch to no other network")
            updated = jax.lax.stop_gradient(plan.gather(state.params))
            example, denoiser = objective.see(updated, state.buffers, part, key, noise_key)
            value, metrics = loss(params, example, denoiser)
            return jnp.mean(value), sums(metrics)

        return gradients(of_part, params, batch)

    return gradient
