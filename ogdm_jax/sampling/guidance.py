"""What guidance is: one object with up to four parts, and how several of them meet in one sampler.

    denoiser     another denoiser instead of the model's (classifier-free guidance, DG)
    transition   how a random step (mean, std, noise) becomes the next state (DPS, DSG, DDNM, ...)
    churn        how much noise each image is raised by before a step (DG's boosting)
    shift        what moves the mean of DDPM's steps (a classifier's gradient)

The way of a guided step: `sample` transforms the denoiser (`Parts.transform`); a solver's loop body
asks the transition's owner for the next state (`solvers.random_step`); `schedule.Scheduled` decides
whether this step is guided and how often; the method's rule evaluates the denoiser, takes a
gradient (gradients.py) and moves.
"""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from ogdm_jax.brief import brief
from ogdm_jax.diffusion.denoiser import Denoiser, as_denoiser, clipped
from ogdm_jax.diffusion.steps import spread
from ogdm_jax.sampling.churn import ChurnRule, Info, as_rule
from ogdm_jax.typing import Array, Denoise, PyTree

Evaluate = Callable[[Array], Array]
Moments = Callable[[Array, Array], tuple[Array, Array]]


class TransitionRule(Protocol):
    """How a random step of a solver becomes the next state."""

    def __call__(
        self, evaluate: Evaluate, transition: Moments, x: Array, noise: Array, info: Info
    ) -> tuple[Array, Array]:
        """(x_next, x0_hat) of one step.

        Args:
          evaluate: x [B,H,W,C] -> x0_hat at this step's level; may be differentiated.
          transition: (x0_hat, x) -> (mean like x, std: a number, [B] or like x), the solver's step.
          x: [B,H,W,C] state at info.sigma.
          noise: like x, ~ N(0, I); the plain step is mean + std * noise.
          info: where the sampler stands, and this guidance's constants and rows.
        """
        ...


class Memory(NamedTuple):
    """What a transform of the denoiser remembers from step to step (APG's momentum).

    Attributes:
      init: x -> the memory before the first step; leaves lead with [B].
      step: (denoise, constants, memory, x, sigma, label) -> (the guided denoiser of the step that
        starts at x, the memory after it). Once a step; the evaluation that it makes at (x, sigma)
        is that of the step where the solver evaluates those very arrays.
    """

    init: Callable[[Array], PyTree]
    step: Callable[..., tuple[Denoise, PyTree]]


@dataclasses.dataclass(frozen=True, eq=False)
class Guidance:
    """One sampling method; a part that is None is left to others.

    Attributes:
      name: for messages.
      denoiser: (denoise, constants) -> the guided denoiser.
      exact: where derivatives of that guided denoiser leave something out (a discriminator's), the
        same with all of them, which a likelihood differentiates.
      transition: a rule, see `TransitionRule`.
      churn: a rule, see `churn.ChurnRule`.
      shift: (x, sigma [B], label, constants) -> a gradient like x, which moves the mean of
        ancestral steps, see `steps.shifted_mean`; several are added.
      constants: arrays that the compiled sampler receives as an argument, the same for all images
        (a discriminator's weights); other values compile nothing. Rules find them in info.
      rows: arrays with one row per image, in the order of the seeds (measurements, masks); divided
        over devices with the seeds. Rules find those of their batch in info.
      memory: what its transform remembers from step to step, see `Memory`.
      replaces_x0: its transition steps from another x0_hat than the denoiser's: Heun's second
        evaluation would not see that, and churn's noise has no x0_hat; both are refused.
      outermost: its transform comes after those with a smaller number, in whatever order they are
        given; above 0: a correction that is to see each image once, and is not clamped; below 0:
        a comparison with the condition that means none, of which there is one at most.
    """

    name: str
    denoiser: Callable[[Denoiser, PyTree], Denoise] | None = None
    transition: TransitionRule | None = None
    churn: ChurnRule | None = None
    constants: PyTree = None
    rows: PyTree = None
    outermost: int = 0
    replaces_x0: bool = False
    # Behind the others, whose places people may have used.
    exact: Callable[[Denoiser, PyTree], Denoise] | None = None
    shift: Callable[[Array, Array, PyTree, PyTree], Array] | None = None
    memory: Memory | None = None
    __repr__ = brief

    def about(self, info: Info) -> Info:
        """The info that this guidance's rules see: with its own arrays."""
        return info._replace(constants=self.constants, rows=self.rows)


class Preset(NamedTuple):
    """Published settings of a sampling method.

    Attributes:
      settings: fields of the method's Settings.
      sampling: what they were published with: task, solver, eta and steps, and the grid where the
        model has steps of its own.
    """

    settings: dict[str, Any]
    sampling: dict[str, Any] = {}


class Parts(NamedTuple):
    """All guidance of one run: the transforms in their order, and the owner of each single part."""

    transforms: tuple[Guidance, ...]
    transition: Guidance | None
    churn: Guidance | None
    shifts: tuple[Guidance, ...] = ()

    def shift(self, x: Array, sigma: Array, label: PyTree) -> Array:
        """The sum of all shifts, like x."""
        found = (g.shift and g.shift(x, sigma, label, g.constants) for g in self.shifts)
        return sum((s for s in found if s is not None), start=jnp.zeros_like(x))

    @property
    def remembering(self) -> tuple[Guidance, ...]:
        """Those whose transform has a memory."""
        return tuple(g for g in self.transforms if g.memory is not None)

    def step(
        self, denoise: Denoiser, clip: bool, memories: PyTree, x: Array, sigma: Array, label: PyTree
    ) -> tuple[Denoiser, PyTree]:
        """(the denoiser of the step that starts at x, the memories after it: {name: memory})."""
        after = dict(memories)

        def apply(guidance: Guidance, denoise: Denoiser) -> Denoise:
            assert guidance.memory is not None
            now = memories[guidance.name]
            guided, after[guidance.name] = guidance.memory.step(
                denoise, guidance.constants, now, x, sigma, label
            )
            return guided

        return self.transform(denoise, clip, apply), after

    def transform(
        self,
        denoise: Denoiser,
        clip: bool = False,
        remembered: Callable[[Guidance, Denoiser], Denoise] | None = None,
    ) -> Denoiser:
        """The denoiser under every transform.

        With clip x0_hat is clamped to [-1, 1] below those with outermost > 0, as guided-diffusion
        does: what classifier-free guidance gives is clamped, what a discriminator adds is not.
        """
        for guidance in self.transforms:
            if clip and guidance.outermost > 0:
                denoise, clip = clipped(denoise), False
            if remembered is not None and guidance.memory is not None:
                denoise = as_denoiser(remembered(guidance, denoise))
            elif guidance.denoiser is not None:
                denoise = as_denoiser(guidance.denoiser(denoise, guidance.constants))
        return clipped(denoise) if clip else denoise


def listed(guidance: Guidance | Sequence[Guidance] | None) -> list[Guidance]:
    """One guidance, several or None as a list; ValueError for what is none."""
    several = list(guidance or ()) if isinstance(guidance, Iterable | None) else [guidance]
    for one in several:
        if not isinstance(one, Guidance):
            raise ValueError(
                f"guidance: {one!r} given; expected what a method gives, such as dsg.guidance(loss)"
            )
    return several


def combine(guidance: Guidance | Sequence[Guidance] | None, churn: Any = None) -> Parts:
    """The parts of several guidances.

    Args:
      guidance: one or several; None: none.
      churn: of `sample`: one more owner of that part; see `churn.as_rule`.

    Raises:
      ValueError: no guidance; two owners of the transition or of churn (both are named); a bad
        churn.
    """
    several = listed(guidance)
    rule = as_rule(churn)
    if rule is not None:
        several.append(Guidance("churn", churn=rule))
    single: dict[str, Guidance | None] = {}
    for part, noun in (("transition", "a transition"), ("churn", "churn")):
        owners = [g for g in several if getattr(g, part) is not None]
        if len(owners) > 1:
            raise ValueError(
                f"guidance: {owners[0].name} and {owners[1].name} both bring {noun}; choose one of "
                "them"
            )
        single[part] = owners[0] if owners else None
    inner = [g.name for g in several if g.denoiser is not None and g.outermost < 0]
    if len(inner) > 1:
        raise ValueError(
            f"guidance: {inner[0]} and {inner[1]} both bring a comparison with no condition; "
            "choose one of them"
        )
    transforms = sorted((g for g in several if g.denoiser is not None), key=lambda g: g.outermost)
    shifts = tuple(g for g in several if g.shift is not None)
    return Parts(tuple(transforms), single["transition"], single["churn"], shifts)


def constant(number: Any) -> Any:
    """A number among a guidance's `constants`; an array (traced, or one number per image) too."""
    return number if isinstance(number, jax.Array) else np.float32(number)


def per_image(make: Callable[..., Guidance], rows: PyTree, constants: PyTree = None) -> Guidance:
    """Guidance that is made anew from the rows of each batch: measurements, masks.

        per_image(lambda rows: dsg.guidance(measurement_loss(inpaint(rows["mask"]), rows["y"])),
                  {"mask": masks, "y": y})

    Args:
      make: rows of a batch -> guidance whose transition is made of them; with constants: (rows,
        constants) -> guidance. Called once here, with the first row, so that bad settings are
        refused before anything is compiled.
      rows: arrays with one row per image in the order of the seeds.
      constants: arrays that are the same for all images, such as a frozen network's weights; see
        `Guidance.constants`. None: there are none.
    """
    made = (lambda rows, held: make(rows)) if constants is None else make
    first = made(jax.tree.map(lambda leaf: leaf[:1], rows), constants)
    if first.transition is None:
        return first

    def transition(
        evaluate: Evaluate, transition: Moments, x: Array, noise: Array, info: Info
    ) -> tuple[Array, Array]:
        rule = made(info.rows, info.constants).transition
        assert rule is not None  # as of the first row
        return rule(evaluate, transition, x, noise, info)

    return dataclasses.replace(first, transition=transition, rows=rows, constants=constants)


def plain_step(
    evaluate: Evaluate, transition: Moments, x: Array, noise: Array, info: Info
) -> tuple[Array, Array]:
    """The step without guidance, mean + std * noise: the rule that others fall back on."""
    x0_hat = evaluate(x)
    mean, std = transition(x0_hat, x)
    return mean + spread(std, x) * noise, x0_hat
