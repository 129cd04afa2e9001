"""The loop bodies of the samplers: each solver is one or two phases, a phase is one step rule
scanned over a grid.

A body maps (x, carry, info) to (x_next, carry, x0_hat). What differs between solvers is what they
carry from step to step: nothing, earlier slopes (PNDM), the earlier denoised image (DPM-Solver++)
or the churn rule's carry.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ogdm_jax.diffusion import steps
from ogdm_jax.diffusion.denoiser import Denoiser
from ogdm_jax.diffusion.steps import per_example
from ogdm_jax.sampling import adaptive
from ogdm_jax.sampling.churn import Info, added_std
from ogdm_jax.sampling.guidance import Evaluate, Guidance, Moments, plain_step
from ogdm_jax.typing import Array, PyTree

FEWEST_STEPS = {"spndm": 2, "fpndm": 4, "plms": 2, adaptive.NAME: 2}  # of a grid; 1 for the others
WHY_SO_MANY = {
    "spndm": "the first is a Heun step",
    "fpndm": "the first three are Runge-Kutta",
    "plms": "the first is made twice",
    adaptive.NAME: "it integrates from the first level to the one before the last",
}
# Rules of ratios of levels: those that may start at process.PURE_NOISE, which stands for infinity.
FROM_PURE_NOISE = ("euler", "ddim", "ancestral", "dpmpp_2m", "plms")
Step = tuple[Array, PyTree, Array]
Body = Callable[[Array, PyTree, Info], Step]
Transition = Callable[[Array, Array, Info], tuple[Array, Array]]


class Phase(NamedTuple):
    """Steps start..stop-1 of the grid by one body.

    Attributes:
      body: what is scanned.
      start, stop: the steps.
      turns: calls of the body that make a step; the last step of the phase is made by one.
    """

    body: Body
    start: int
    stop: int
    turns: int = 1


@dataclasses.dataclass(frozen=True)
class Problem:
    """Everything a body needs beside the state.

    Attributes:
      denoise: under every transform of guidance.
      label: the images' condition.
      noise: step -> [B,...] in the state's dtype.
      guidance: the owner of the transition, or None.
      churn: the owner of churn, or None.
      round_sigma: to the levels that the network knows.
      eta: of `sample`.
      variance: of `sample`.
      sigmas: [N+1] the grid.
      options: of this solver alone, see `config.groups.SOLVER_OPTIONS`.
      shift: (x, sigma, label) -> what moves the mean of ancestral steps, or None.
      remembers: whether guidance has a memory, see `run`.
    """

    denoise: Denoiser
    label: PyTree
    noise: Callable[[Array], Array]
    guidance: Guidance | None
    churn: Guidance | None
    round_sigma: Callable[[Array], Array]
    eta: float | Array
    variance: Any
    sigmas: Array
    options: Mapping[str, Any]
    shift: Callable[[Array, Array, PyTree], Array] | None = None
    remembers: bool = False

    @property
    def noisy(self) -> bool:
        """Whether eta asks for random steps."""
        return not (isinstance(self.eta, int | float) and self.eta == 0)

    def x0(self, x: Array, sigma: Array) -> Array:
        """The denoiser, in the state's dtype."""
        return self.denoise(x, sigma, self.label).astype(x.dtype)

    def slope(self, x: Array, sigma: Array) -> Array:
        """The ODE's dx/dsigma."""
        return steps.slope(x, self.x0(x, sigma), sigma)


def random_step(
    p: Problem, evaluate: Evaluate, transition: Moments, x: Array, info: Info
) -> tuple[Array, Array]:
    """(x_next, x0_hat): what the transition's owner makes of a step, else mean + std * noise."""
    noise = p.noise(info.step)
    if p.guidance is None or p.guidance.transition is None:
        return plain_step(evaluate, transition, x, noise, info)
    return p.guidance.transition(evaluate, transition, x, noise, p.guidance.about(info))


def random_body(p: Problem, moments: Transition, x: Array, carry: PyTree, info: Info) -> Step:
    """The body of a solver whose step is (mean, std) = moments(x0_hat, x, info)."""
    evaluate, transition = partial(p.x0, sigma=info.sigma), lambda x0, x: moments(x0, x, info)
    x_next, x0_hat = random_step(p, evaluate, transition, x, info)
    return x_next, carry, x0_hat


def _churned(p: Problem, x: Array, carry: PyTree, info: Info) -> tuple[Array, Array, Array, PyTree]:
    """(x_hat, sigma_hat, x0_hat, carry): the state after churn, and the denoiser there."""
    if p.churn is None or p.churn.churn is None:
        return x, info.sigma, p.x0(x, info.sigma), carry
    rule, seen = p.churn.churn, p.churn.about(info)
    gamma, noise_scale = rule.amounts(carry, seen)
    sigma_hat = p.round_sigma(info.sigma * (1 + gamma)).astype(info.sigma.dtype)
    added = added_std(info.sigma, sigma_hat, noise_scale)
    if p.guidance is None:
        x = x + per_example(added, x) * p.noise(info.step)
    else:
        x = _guided_churn(p, x, sigma_hat, added, info)
    x0_hat, carry = rule.evaluate(p.denoise, carry, x, sigma_hat, p.label, seen)
    return x, sigma_hat, x0_hat.astype(x.dtype), carry


def _guided_churn(p: Problem, x: Array, sigma_hat: Array, added: Array, info: Info) -> Array:
    """Churn's noise under guidance: x -> x_hat is N(x, std^2 I), a transition as good as another.

    One more evaluation, at sigma, on those steps that add noise. Images to which the rule adds none
    stay where they are, whatever the other images of the batch do.
    """

    def up(x: Array) -> Array:
        raised = info._replace(sigma_next=sigma_hat, churned=True)
        evaluate = partial(p.x0, sigma=info.sigma)
        guided, _ = random_step(p, evaluate, lambda x0, x: (x, added), x, raised)
        return jnp.where(per_example(added, x) > 0, guided, x)

    return jax.lax.cond(jnp.any(added > 0), up, lambda x: x, x)


def _churn_carry(p: Problem, x: Array) -> PyTree:
    rule = None if p.churn is None else p.churn.churn
    return () if rule is None else rule.init(x.shape[0])


def _euler(p: Problem, x: Array, carry: PyTree, info: Info) -> Step:
    x, sigma, x0_hat, carry = _churned(p, x, carry, info)
    return steps.euler_update(x, x0_hat, sigma, info.sigma_next), carry, x0_hat


def euler(p: Problem, x: Array, n: int) -> tuple[list[Phase], PyTree]:
    """N Euler steps, with churn."""
    return [Phase(partial(_euler, p), 0, n)], _churn_carry(p, x)


def _heun(p: Problem, x: Array, carry: PyTree, info: Info) -> Step:
    x, sigma, x0_hat, carry = _churned(p, x, carry, info)
    return steps.heun(p.denoise, x, sigma, info.sigma_next, p.label, x0_hat), carry, x0_hat


def _heun_turn(p: Problem, x: Array, carry: PyTree, info: Info) -> Step:
    """One of the two evaluations of a Heun step. Carry: the state at the step's start and its slope
    there, and whether this is the second one.
    """
    start, slope, second = carry
    sigma = jnp.where(second, info.sigma_next, info.sigma)
    x0_hat = p.x0(x, sigma)
    here = steps.slope(x, x0_hat, sigma)
    predicted = steps.euler_update(x, x0_hat, sigma, info.sigma_next)
    corrected = steps.heun_mean(start, slope, here, info.sigma, info.sigma_next)
    return jnp.where(second, corrected, predicted), (x, here, ~second), x0_hat


def heun(p: Problem, x: Array, n: int) -> tuple[list[Phase], PyTree]:
    """N - 1 corrected steps and the step to 0: 2 N - 1 evaluations and no wasted one.

    Without churn, a corrector and memory all evaluations are turns of one scan, whose program holds
    the network once and compiles in less than half the time.
    """
    if not (p.noisy or p.churn or p.denoise.corrector or p.remembers):
        return [Phase(partial(_heun_turn, p), 0, n, turns=2)], (x, x, jnp.asarray(False))
    if not p.noisy:
        phases = [Phase(partial(_heun, p), 0, n - 1), Phase(partial(_euler, p), n - 1, n)]
        return phases, _churn_carry(p, x)

    def down_and_up(x0: Array, x: Array, info: Info) -> tuple[Array, Array]:
        return steps.heun_moments(p.denoise, x, x0, info.sigma, info.sigma_next, p.label, p.eta)

    return [Phase(partial(random_body, p, down_and_up), 0, n - 1), Phase(_ddim(p), n - 1, n)], ()


def _ddim(p: Problem) -> Body:
    if not p.noisy:
        return partial(_euler, p)
    return partial(
        random_body,
        p,
        lambda x0, x, info: steps.ddim_moments(x, x0, info.sigma, info.sigma_next, p.eta),
    )


def ddim(p: Problem, x: Array, n: int) -> tuple[list[Phase], PyTree]:
    """N steps of DDIM; eta = 0 is Euler's."""
    return [Phase(_ddim(p), 0, n)], ()


def _ddpm(p: Problem, x0: Array, x: Array, info: Info, variance: Any) -> tuple[Array, Array]:
    """(mean, std) of a DDPM step, its mean shifted where guidance asks for it."""
    mean, std = steps.ancestral_moments(x, x0, info.sigma, info.sigma_next, variance)
    if p.shift is None:
        return mean, std
    gradient = p.shift(x, info.sigma, p.label)
    return steps.shifted_mean(mean, std, gradient, info.sigma, info.sigma_next), std


def _learned(p: Problem) -> Body:
    """DDPM steps whose variance the network says, from the same evaluation as x0_hat.

    Guidance evaluates where and as often as it likes: then the transition evaluates the network
    once more, without gradient. Its std is like x, one number a pixel and channel.
    """
    both = p.denoise.variance
    assert both is not None  # sample() has looked

    def at_once(x: Array, carry: PyTree, info: Info) -> Step:
        x0_hat, fraction = (v.astype(x.dtype) for v in both(x, info.sigma, p.label))
        mean, std = _ddpm(p, x0_hat, x, info, fraction)
        return mean + std * p.noise(info.step), carry, x0_hat

    def moments(x0: Array, x: Array, info: Info) -> tuple[Array, Array]:
        fraction = jax.lax.stop_gradient(both(x, info.sigma, p.label)[1].astype(x.dtype))
        return _ddpm(p, x0, x, info, fraction)

    return at_once if p.guidance is None else partial(random_body, p, moments)


def ancestral(p: Problem, x: Array, n: int) -> tuple[list[Phase], PyTree]:
    """N DDPM steps."""
    if isinstance(p.variance, str) and p.variance == "learned":
        return [Phase(_learned(p), 0, n)], ()

    def moments(x0: Array, x: Array, info: Info) -> tuple[Array, Array]:
        return _ddpm(p, x0, x, info, p.variance)

    return [Phase(partial(random_body, p, moments), 0, n)], ()


def _multistep(p: Problem, x: Array, carry: PyTree, info: Info) -> Step:
    """Carry: the earlier slopes, newest first; their number plus one is the order."""
    x0_hat = p.x0(x, info.sigma)
    slopes = (steps.slope(x, x0_hat, info.sigma), *carry)
    return steps.pndm(x, slopes, info.sigma, info.sigma_next), slopes[:-1], x0_hat


def spndm(p: Problem, x: Array, n: int) -> tuple[list[Phase], PyTree]:
    """First step Heun, then Adams-Bashforth 2: n + 1 evaluations (arXiv 2202.09778; OGDM's sampler
    of EDM models).
    """

    def start(x: Array, carry: PyTree, info: Info) -> Step:
        x0_hat, levels = p.x0(x, info.sigma), (info.sigma, info.sigma_next)
        # `corrector` is Heun's: of a discriminator's weights the first acts in all steps here
        x_next = steps.heun(p.denoise.evaluate, x, *levels, p.label, x0_hat)
        return x_next, (steps.slope(x, x0_hat, info.sigma),), x0_hat

    return [Phase(start, 0, 1), Phase(partial(_multistep, p), 1, n)], (jnp.zeros_like(x),)


def fpndm(p: Problem, x: Array, n: int) -> tuple[list[Phase], PyTree]:
    """Three Runge-Kutta steps, then Adams-Bashforth 4: n + 9 evaluations (arXiv 2202.09778)."""

    def start(x: Array, carry: PyTree, info: Info) -> Step:
        sigma, middle, end = info.sigma, (info.sigma + info.sigma_next) / 2, info.sigma_next
        slope_at = lambda sigma: partial(p.slope, sigma=sigma)
        slopes = (slope_at(sigma), slope_at(middle), slope_at(end))
        x_next, d = steps.pseudo_runge_kutta(slopes, x, sigma, middle, end)
        return x_next, (d, *carry[:-1]), x - steps.per_example(sigma, x) * d

    return [Phase(start, 0, 3), Phase(partial(_multistep, p), 3, n)], (jnp.zeros_like(x),) * 3


def plms(p: Problem, x: Array, n: int) -> tuple[list[Phase], PyTree]:
    """Stable Diffusion's PLMS (PNDM of diffusers without Runge-Kutta steps): N + 1 evaluations.

    Adams-Bashforth of order 1 to 4 over what the network gives (eps or v, `Denoiser.parts`), each
    step DDIM's. The first one is made again with the mean of its output and the one at its end.
    """

    def output(x: Array, sigma: Array) -> tuple[Array, Array]:
        x0_hat = p.x0(x, sigma)
        skip, out = (per_example(c, x) for c in p.denoise.parts(sigma))
        return (x0_hat - skip * x) / out, x0_hat

    def moved(x: Array, weighed: Array, info: Info) -> Array:
        skip, out = (per_example(c, x) for c in p.denoise.parts(info.sigma))
        return steps.euler_update(x, skip * x + out * weighed, info.sigma, info.sigma_next)

    def start(x: Array, carry: PyTree, info: Info) -> Step:
        first, x0_hat = output(x, info.sigma)
        second, _ = output(moved(x, first, info), info.sigma_next)
        return moved(x, (first + second) / 2, info), (first, *carry[:-1]), x0_hat

    def later(x: Array, carry: PyTree, info: Info) -> Step:
        now, x0_hat = output(x, info.sigma)
        outputs = (now, *carry)
        weights = orders[jnp.minimum(info.step, 3)]
        weighed = sum(w * f for w, f in zip(weights, outputs))
        return moved(x, jnp.asarray(weighed), info), outputs[:-1], x0_hat

    rows = [(*steps.ADAMS_BASHFORTH[k], *(0.0,) * (4 - k)) for k in (1, 2, 3, 4)]
    orders = jnp.asarray(rows, x.dtype)
    return [Phase(start, 0, 1), Phase(later, 1, n)], (jnp.zeros_like(x),) * 3


def run(
    phases: Sequence[Phase],
    carry: PyTree,
    x: Array,
    sigmas: Array,
    key_of: Callable[[Array], Array | None],
    trajectory: bool,
    memory: PyTree = (),
    remember: Callable[[PyTree, Array, Array], tuple[Sequence[Phase], PyTree]] | None = None,
) -> tuple[Array, tuple[Array, Array] | None]:
    """Scans the phases over the grid; returns x and, if asked, the states after and the x0_hats of
    every step.

    Where guidance has a memory, remember(memory, x, sigma) gives the phases of the step that starts
    at x and the memory after it.
    """
    n, batch = sigmas.shape[0] - 1, x.shape[0]
    kept = []
    for i, phase in enumerate(phases):

        def scanned(state: tuple[Array, PyTree, PyTree], xs: PyTree, i: int = i) -> PyTree:
            (x, carry, memory), (step, sigma, sigma_next) = state, xs
            sigma, sigma_next = (jnp.full((batch,), level) for level in (sigma, sigma_next))
            now = phases
            if remember is not None:
                now, memory = remember(memory, x, sigma)
            info = Info(step, n, sigma, sigma_next, key_of(step))
            x, carry, x0_hat = now[i].body(x, carry, info)
            return (x, carry, memory), (x, x0_hat) if trajectory else None

        if phase.stop <= phase.start:
            continue
        at = np.repeat(np.arange(phase.start, phase.stop, dtype=np.int32), phase.turns)
        at = at[: len(at) + 1 - phase.turns]
        xs = (jnp.asarray(at), sigmas[:-1][at], sigmas[1:][at])
        if len(at) == 1:  # no loop around a single step
            (x, carry, memory), out = scanned((x, carry, memory), jax.tree.map(lambda a: a[0], xs))
            out = jax.tree.map(lambda a: a[None], out)
        else:
            (x, carry, memory), out = jax.lax.scan(scanned, (x, carry, memory), xs)
        if trajectory and phase.turns > 1:  # a step's last state and its first x0_hat
            ends = np.flatnonzero(np.diff(at, append=n))
            out = out[0][ends], out[1][:: phase.turns]
        kept.append(out)
    return x, jax.tree.map(lambda *parts: jnp.concatenate(parts), *kept) if trajectory else None
