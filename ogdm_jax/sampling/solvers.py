"""The loop bodies of the samplers: each solver is one or two phases, a phase is one step rule
scanned over a grid.

A body maps (x, memory, info) to (x_next, memory, x0_hat). What differs between solvers is what they
remember: nothing, earlier slopes (PNDM), the earlier denoised image (DPM-Solver++) or the churn
  rule's carry.
"""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ogdm_jax.diffusion import steps
from ogdm_jax.diffusion.denoiser import Denoiser
from ogdm_jax.sampling.churn import ChurnRule, Info, added_std, raise_noise
from ogdm_jax.typing import Array, PyTree

FEWEST_STEPS = {
    "spndm": 2,
    "fpndm": 4,
}  # of a grid: their first steps are one-step rules; 1 for the others
Body = Callable[[Array, PyTree, Info], tuple[Array, PyTree, Array]]
Kick = Callable[..., tuple[Array, Array]]


class Phase(NamedTuple):
    """Steps start..stop-1 of the grid by one body."""

    body: Body
    start: int
    stop: int


@dataclasses.dataclass(frozen=True)
class Problem:
    """Everything a body needs beside the state. noise(step) -> [B,...] in the state's dtype."""

    denoise: Denoiser
    label: PyTree
    noise: Callable[[Array], Array] | None
    kick: Kick
    churn: ChurnRule | None
    round_sigma: Callable[[Array], Array]
    eta: float | Array
    variance: Any

    @property
    def noisy(self) -> bool:
        return not (isinstance(self.eta, int | float) and self.eta == 0)

    def x0(self, x: Array, sigma: Array) -> Array:
        return self.denoise(x, sigma, self.label).astype(x.dtype)

    def slope(self, x: Array, sigma: Array) -> Array:
        return steps.slope(x, self.x0(x, sigma), sigma)


def plain_kick(
    evaluate: Callable[[Array], Array],
    transition: Callable[[Array, Array], tuple[Array, Array]],
    x: Array,
    noise: Array,
    info: Info,
) -> tuple[Array, Array]:
    """The unguided stochastic step: mean + std * noise. Returns (x_next, x0_hat)."""
    x0_hat = evaluate(x)
    mean, std = transition(x0_hat, x)
    return mean + steps.spread(std, x) * noise, x0_hat


def _kicked(p: Problem, transition: Callable[[Array, Array, Info], tuple[Array, Array]]) -> Body:
    def body(x, memory, info):
        x, x0_hat = p.kick(
            lambda x: p.x0(x, info.sigma),
            lambda x0, x: transition(x0, x, info),
            x,
            p.noise(info.step),
            info,
        )
        return x, memory, x0_hat

    return body


def _churned(
    p: Problem, x: Array, memory: PyTree, info: Info
) -> tuple[Array, Array, Array, PyTree]:
    """(x_hat, sigma_hat, x0_hat, memory) after the churn slot."""
    if p.churn is None:
        return x, info.sigma, p.x0(x, info.sigma), memory
    gamma, noise_scale = p.churn.amounts(memory, info)
    sigma_hat = p.round_sigma(info.sigma * (1 + gamma)).astype(info.sigma.dtype)
    if p.kick is plain_kick:
        x = raise_noise(x, info.sigma, sigma_hat, noise_scale, p.noise(info.step))
    else:
        x = _kicked_up(p, x, sigma_hat, noise_scale, info)
    x0_hat, memory = p.churn.evaluate(p.denoise, memory, x, sigma_hat, p.label, info)
    return x, sigma_hat, x0_hat.astype(x.dtype), memory


def _kicked_up(p: Problem, x: Array, sigma_hat: Array, noise_scale: Array, info: Info) -> Array:
    """Churn's noise under a kick: x -> x_hat is N(x, std^2 I), a transition as good as another. One
    more evaluation, at sigma, on those steps that add noise; images to which the rule adds none
    stay where they are, whoever is beside them."""
    added = added_std(info.sigma, sigma_hat, noise_scale)

    def up(x: Array) -> Array:
        evaluate, at = (
            partial(p.x0, sigma=info.sigma),
            info._replace(sigma_next=sigma_hat, churned=True),
        )
        kicked, _ = p.kick(evaluate, lambda x0, x: (x, added), x, p.noise(info.step), at)
        return jnp.where(steps.per_example(added, x) > 0, kicked, x)

    return jax.lax.cond(jnp.any(added > 0), up, lambda x: x, x)


def _euler_body(p: Problem) -> Body:
    def body(x, memory, info):
        x, sigma, x0_hat, memory = _churned(p, x, memory, info)
        return steps.euler_update(x, x0_hat, sigma, info.sigma_next), memory, x0_hat

    return body


def _heun_body(p: Problem) -> Body:
    def body(x, memory, info):
        x, sigma, x0_hat, memory = _churned(p, x, memory, info)
        return steps.heun(p.denoise, x, sigma, info.sigma_next, p.label, x0_hat), memory, x0_hat

    return body


def _ddim_body(p: Problem) -> Body:
    if not p.noisy:
        return _euler_body(p)
    return _kicked(
        p, lambda x0, x, info: steps.ddim_moments(x, x0, info.sigma, info.sigma_next, p.eta)
    )


def _memory_of_churn(p: Problem, x: Array) -> PyTree:
    return () if p.churn is None else p.churn.init(x.shape[0])


def euler(p: Problem, x: Array, n: int) -> tuple[list[Phase], PyTree]:
    return [Phase(_euler_body(p), 0, n)], _memory_of_churn(p, x)


def heun(p: Problem, x: Array, n: int) -> tuple[list[Phase], PyTree]:
    """N - 1 corrected steps in one scan, the step to 0 outside it: 2 N - 1 evaluations and no
    wasted one.
    """
    if p.noisy:

        def down_and_up(x0, x, info):
            return steps.heun_moments(p.denoise, x, x0, info.sigma, info.sigma_next, p.label, p.eta)

        return [Phase(_kicked(p, down_and_up), 0, n - 1), Phase(_ddim_body(p), n - 1, n)], ()
    return [Phase(_heun_body(p), 0, n - 1), Phase(_euler_body(p), n - 1, n)], _memory_of_churn(p, x)


def ddim(p: Problem, x: Array, n: int) -> tuple[list[Phase], PyTree]:
    return [Phase(_ddim_body(p), 0, n)], ()


def _learned_body(p: Problem) -> Body:
    """DDPM steps whose variance the network says, from the same evaluation as x0_hat.

    A kick evaluates where and as often as it likes: then the transition evaluates the network once
    more, without gradient. Its std is like x, one number a pixel and channel.
    """
    both = p.denoise.variance

    def moments(x0, x, fraction, info):
        return steps.ancestral_moments(x, x0, info.sigma, info.sigma_next, fraction)

    def at_once(x, memory, info):
        x0_hat, fraction = (v.astype(x.dtype) for v in both(x, info.sigma, p.label))
        mean, std = moments(x0_hat, x, fraction, info)
        return mean + std * p.noise(info.step), memory, x0_hat

    def transition(x0, x, info):
        fraction = jax.lax.stop_gradient(both(x, info.sigma, p.label)[1].astype(x.dtype))
        return moments(x0, x, fraction, info)

    return at_once if p.kick is plain_kick else _kicked(p, transition)


def ancestral(p: Problem, x: Array, n: int) -> tuple[list[Phase], PyTree]:
    if isinstance(p.variance, str) and p.variance == "learned":
        return [Phase(_learned_body(p), 0, n)], ()

    def transition(x0, x, info):
        return steps.ancestral_moments(x, x0, info.sigma, info.sigma_next, p.variance)

    return [Phase(_kicked(p, transition), 0, n)], ()


def _multistep_body(p: Problem) -> Body:
    """Memory: the earlier slopes, newest first; their number plus one is the order."""

    def body(x, memory, info):
        x0_hat = p.x0(x, info.sigma)
        slopes = (steps.slope(x, x0_hat, info.sigma), *memory)
        return steps.pndm(x, slopes, info.sigma, info.sigma_next), slopes[:-1], x0_hat

    return body


def spndm(p: Problem, x: Array, n: int) -> tuple[list[Phase], PyTree]:
    """First step Heun, then Adams-Bashforth 2: n + 1 evaluations (arXiv 2202.09778; OGDM's sampler
    of EDM models).
    """
    if n < (least := FEWEST_STEPS["spndm"]):
        raise ValueError(
            f"solver 'spndm' with {n} step; expected at least {least}: the first is a Heun step"
        )

    def start(x, memory, info):
        x0_hat = p.x0(x, info.sigma)
        x_next = steps.heun(p.denoise, x, info.sigma, info.sigma_next, p.label, x0_hat)
        return x_next, (steps.slope(x, x0_hat, info.sigma),), x0_hat

    return [Phase(start, 0, 1), Phase(_multistep_body(p), 1, n)], (jnp.zeros_like(x),)


def fpndm(p: Problem, x: Array, n: int) -> tuple[list[Phase], PyTree]:
    """Three Runge-Kutta steps, then Adams-Bashforth 4: n + 9 evaluations (arXiv 2202.09778)."""
    if n < (least := FEWEST_STEPS["fpndm"]):
        raise ValueError(
            f"solver 'fpndm' with {n} steps; expected at least {least}: the first three are "
            "Runge-Kutta"
        )

    def start(x, memory, info):
        sigma, middle, end = info.sigma, (info.sigma + info.sigma_next) / 2, info.sigma_next
        slopes_at = tuple(lambda y, s=s: p.slope(y, s) for s in (sigma, middle, end))
        x_next, d = steps.pseudo_runge_kutta(slopes_at, x, sigma, middle, end)
        return x_next, (d, *memory[:-1]), x - steps.per_example(sigma, x) * d

    return [Phase(start, 0, 3), Phase(_multistep_body(p), 3, n)], (jnp.zeros_like(x),) * 3


def dpmpp_2m(p: Problem, x: Array, n: int) -> tuple[list[Phase], PyTree]:
    """DPM-Solver++(2M); sigma_before = sigma makes the first step first order (arXiv
    2211.01095).
    """

    def body(x, memory, info):
        before, sigma_before = memory
        x0_hat = p.x0(x, info.sigma)
        sigma_before = jnp.where(info.step == 0, info.sigma, sigma_before)
        x = steps.dpmpp_2m(x, x0_hat, before, info.sigma, info.sigma_next, sigma_before)
        return x, (x0_hat, info.sigma), x0_hat

    return [Phase(body, 0, n)], (jnp.zeros_like(x), jnp.zeros((x.shape[0],), x.dtype))


def run(
    phases: Sequence[Phase],
    memory: PyTree,
    x: Array,
    sigmas: Array,
    key_of: Callable[[Array], Array | None],
    trajectory: bool,
) -> tuple[Array, tuple[Array, Array] | None]:
    """Scans the phases over the grid; returns x and, if asked, the states after and the x0_hats of
    every step.
    """
    n, batch = sigmas.shape[0] - 1, x.shape[0]
    kept = []
    for phase in phases:

        def scanned(carry, xs, body=phase.body):
            step, sigma, sigma_next = xs
            info = Info(
                step, n, jnp.full((batch,), sigma), jnp.full((batch,), sigma_next), key_of(step)
            )
            x, memory, x0_hat = body(*carry, info)
            return (x, memory), (x, x0_hat) if trajectory else None

        part = slice(phase.start, phase.stop)
        xs = (jnp.arange(n, dtype=jnp.int32)[part], sigmas[:-1][part], sigmas[1:][part])
        if phase.stop - phase.start == 1:  # no loop around a single step
            (x, memory), out = scanned((x, memory), jax.tree.map(lambda a: a[0], xs))
            out = jax.tree.map(lambda a: a[None], out)
        elif phase.stop > phase.start:
            (x, memory), out = jax.lax.scan(scanned, (x, memory), xs)
        else:
            continue
        kept.append(out)
    return x, jax.tree.map(lambda *parts: jnp.concatenate(parts), *kept) if trajectory else None
