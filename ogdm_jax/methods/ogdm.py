"""OGDM: observation-guided diffusion (2310.04041, CVPR 2024).

The denoiser is trained on its usual loss plus an observation loss: one sampler step of random
length, from level t down to a level s, must land where a discriminator D sees real noised images of
level s,

    L = L_denoise + gamma * E[ ell_G( D( f_theta(x_t; t -> s), t, s ) ) ],   ell_G(z) = -z or
    softplus(-z),

while D is trained beside it on real = x0 + sigma_s eps against fake = f_theta(x_t; t -> s), both
made from the same x0 and eps, with R1 on the real images. Sampling is unchanged and costs nothing.

gamma is relative to a loss that is a mean over pixels; losses here are sums, so the penalty is
gamma * h*w*c * ell_G. The two released repositories (on EDM and on guided-diffusion) differ in a
dozen switches: PRESETS has both.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ogdm_jax import randomness
from ogdm_jax.config import ConfigError, Group, choose, duration, require, setting
from ogdm_jax.diffusion import jumps
from ogdm_jax.diffusion.denoiser import Denoiser
from ogdm_jax.diffusion.jumps import Pair, next_sigma
from ogdm_jax.diffusion.observation import LOSSES, SOLVERS, logits_and_r1, project
from ogdm_jax.diffusion.observation import discriminator_loss as discriminator_loss
from ogdm_jax.diffusion.observation import generator_loss as generator_loss
from ogdm_jax.diffusion.observation import r1_penalty as r1_penalty
from ogdm_jax.diffusion.process import SCHEDULES, Discrete
from ogdm_jax.methods.contract import (
    Carry,
    Context,
    DenoiserOf,
    Example,
    Metrics,
    Own,
    Slots,
    Update,
)
from ogdm_jax.networks.discriminator import StyleGAN2Discriminator
from ogdm_jax.typing import Array, Denoise, PyTree

_MEMORY = 50  # updates over which the lead of the discriminator is a running mean
_EDM, _ADM = "distribution=edm", "distribution=adm"


@dataclasses.dataclass(frozen=True)
class Settings(Group):
    """The switches of OGDM; the values here are the defaults of config.ogdm."""

    GROUP = "ogdm"
    gamma: float = setting(
        0.025, "weight of the observation loss beside a mean-per-pixel denoising loss", least=0
    )
    warmup: str = setting(
        "0 steps", "gamma is 0 for so long: the discriminator learns alone", only="gamma"
    )
    adaptive: float = setting(
        0.0, "discriminator's lead at which gamma is whole; 0 = off", least=0, below=1, only="gamma"
    )
    k: float = setting(
        0.2,
        "largest jump: a fraction of EDM's rho-warped time axis (above 1 the number of levels of a "
        "Karras grid whose next lower one is taken), or of the discrete steps (distribution adm)",
        least=0,
    )
    distribution: str = setting(
        "edm",
        "how s is drawn given t: edm (2310.04041's EDM code), or adm (its guided-diffusion code)",
        choices=("edm", "adm"),
        was="law",
    )
    solver: str = setting(
        "euler", "the projection's sampler step (ddim equals euler here)", choices=SOLVERS
    )
    loss: str = setting("hinge", "of both players", choices=LOSSES)
    r1: float = setting(1.0, "coefficient of the R1 penalty", least=0)
    r1_interval: int = setting(
        1, "every how many steps R1 is taken (then times the interval)", least=1, only="r1"
    )
    share_denoise: bool = setting(
        True, "the projection starts from the denoising loss's x0_hat: one network call less"
    )
    pass_augment: bool = setting(
        False,
        "the projection's network calls see augmentation labels (always so with share_denoise)",
    )
    resample: str = setting(
        "all",
        "what the discriminator's step draws anew: all (levels, noise, augmentation) or only noise",
        choices=("all", "noise"),
    )
    condition: str = setting(
        "sigma",
        "what the discriminator is told: sigma (sigma_t, sigma_s), log_sigma (their logarithms "
        "/ 4), or index (t, s with t the index and s the gap; distribution adm only)",
        choices=("sigma", "log_sigma", "index"),
    )
    input_scale: str = setting(
        "none",
        "the discriminator gets images: as they are (none), or divided by sqrt(1 + sigma_s^2) "
        "(vp) or by sqrt(sigma_data^2 + sigma_s^2) (unit)",
        choices=("none", "vp", "unit"),
    )
    scale_by_pixels: bool = setting(
        False, "multiply the discriminator's loss by h*w*c, as the EDM code (Adam hardly notices)"
    )
    statistics_batch: int = setting(
        4, "examples that share minibatch statistics; 0 = a device's batch, as the authors", least=0
    )
    channel_base: int = setting(32768, "widths of the discriminator", least=1, most=2**24)
    channel_max: int = setting(512, "greatest width of the discriminator", least=1, most=2**16)
    normalise_condition: bool = setting(False, "the mapped condition gets mean square 1")
    learning_rate: float | None = setting(
        None, "of the discriminator's Adam; None = the denoiser's peak rate", above=0
    )
    betas: tuple[float, float] = setting(
        (0.9, 0.999), "of its Adam", least=0, below=1, expected="two numbers in [0, 1)"
    )
    decay: int = setting(0, "steps in which that rate falls linearly to 0; 0 = constant", least=0)
    sigma_min: float = setting(0.002, "lowest level of the warp (distribution edm)", above=0)
    sigma_max: float = setting(80.0, "highest level of the warp", above=0, only=_EDM)
    rho: float = setting(7.0, "exponent of the warp", least=0.1, most=1000, only=_EDM)
    schedule: str = setting("linear", "betas of distribution adm", choices=SCHEDULES, only=_ADM)
    diffusion_steps: int = setting(1000, "and their number", least=2, most=10**5, only=_ADM)

    def _check_together(self) -> None:
        ordered = self.sigma_min < self.sigma_max
        require(
            ordered, "ogdm.sigma_min", self.sigma_min, f"less than ogdm.sigma_max, {self.sigma_max}"
        )
        grid = "at most 1, or a whole number of levels of a grid, at least 2"
        require(self.k <= 1 or (self.k >= 2 and self.k % 1 == 0), "ogdm.k", self.k, grid)
        if self.distribution == "adm":
            share = "a fraction of the discrete steps, at most 1, with distribution 'adm'"
            require(self.k <= 1, "ogdm.k", self.k, share)
        else:
            told = "'sigma' or 'log_sigma' with distribution 'edm'"
            require(self.condition != "index", "ogdm.condition", self.condition, told)


# What the two released codes do, switch by switch. The augmentation-free ADM code tells the
# discriminator (t, gap).
_RELEASED: dict[str, tuple[Any, Any]] = {
    "gamma": (0.025, 0.01),
    "k": (0.2, 0.1),
    "distribution": ("edm", "adm"),
    "solver": ("euler", "ddim"),
    "loss": ("hinge", "hinge"),
    "r1": (1.0, 0.25),
    "r1_interval": (1, 1),
    "share_denoise": (False, True),
    "pass_augment": (False, False),
    "resample": ("all", "noise"),
    "condition": ("sigma", "index"),
    "input_scale": ("none", "vp"),
    "scale_by_pixels": (True, False),
    "statistics_batch": (0, 0),
}
PRESETS: dict[str, dict[str, Any]] = {
    name: {key: both[i] for key, both in _RELEASED.items()} for i, name in enumerate(("edm", "adm"))
}


def preset(name: str) -> dict[str, Any]:
    """All settings of a released convention, "edm" or "adm" (for config.ogdm.update). Raises
    ValueError otherwise.
    """
    return dataclasses.asdict(Settings(**choose("ogdm.preset", name, PRESETS)))


# -- what the discriminator sees


def draw_pair(settings: Settings, sigma: Array, u: Array) -> Pair:
    """The pair (t, s) of each example by settings.distribution from its level [B] and a uniform
    number [B].

    Distribution "adm" takes the index whose level is nearest on a logarithmic scale: exact for
    levels drawn from the table.
    """
    if settings.distribution == "edm":
        limits = (settings.sigma_min, settings.sigma_max, settings.rho)
        return Pair(sigma, next_sigma(sigma, u, settings.k, *limits))
    chain = Discrete.make(settings.schedule, settings.diffusion_steps)
    index = chain.index(sigma)
    gap = jumps.gap(index, u, settings.k, settings.diffusion_steps)
    return jumps.index_pair(index, gap, chain.sigma)._replace(sigma=sigma)


def condition(pair: Pair, settings: Settings) -> Array:
    """The two numbers [B, 2] that tell the discriminator the pair, by settings.condition."""
    if settings.condition == "index":
        numbers = (cast(Array, pair.index), cast(Array, pair.gap))
        return jnp.stack(numbers, axis=1).astype(pair.sigma.dtype)
    levels = jnp.stack([pair.sigma, pair.sigma_next], axis=1)
    if settings.condition == "sigma":
        return levels
    return jnp.log(jnp.maximum(levels, settings.sigma_min)) / 4


def view(images: Array, pair: Pair, settings: Settings, sigma_data: float = 0.5) -> Array:
    """Images of level sigma_next in the scale in which the discriminator gets them, by
    settings.input_scale.
    """
    if settings.input_scale == "none":
        return images
    constant = 1.0 if settings.input_scale == "vp" else sigma_data**2
    return images * jax.lax.rsqrt(constant + jnp.square(pair.sigma_next))[:, None, None, None]


def project_pair(
    denoise: Denoise,
    xt: Array,
    pair: Pair,
    label: Array | None,
    settings: Settings,
    x0_hat: Array | None = None,
) -> Array:
    """`project` from a pair's level to its next one, by settings: what the discriminator judges.

    denoise.corrector, where there is one, makes Heun's second evaluation; x0_hat is the denoiser's
    output at (xt, sigma), or None to evaluate it here.
    """
    levels = (pair.sigma, pair.sigma_next)
    return project(denoise, xt, *levels, settings.solver, label, x0_hat, settings.sigma_min)


def own_loss(
    discriminate: Callable[[Array, Pair], Array],
    real: Array,
    fake: Array,
    pair: Pair,
    settings: Settings,
    step: Array | int = 0,
) -> tuple[Array, Metrics]:
    """The discriminator's loss per example, l_D + r1 * R1(real), with R1 every r1_interval steps
    (the authors: 1): ([B], metrics).

    Args:
      discriminate: (images, pair) -> logits [B], a function of what discriminator sees (see view)
        and of the pair.
      real, fake: [B,h,w,c] as the discriminator sees them; no gradient goes into fake's making.
      step: int32 scalar, the optimiser step.
    """
    fake_logits = discriminate(jax.lax.stop_gradient(fake), pair)
    judge = lambda x: discriminate(x, pair)
    without = lambda x: (judge(x), jnp.zeros_like(fake_logits))
    penalised = lambda x: logits_and_r1(judge, x)
    if settings.r1 == 0:
        real_logits, r1 = without(real)
    elif settings.r1_interval == 1:
        real_logits, r1 = penalised(real)
    else:
        now = step % settings.r1_interval == 0
        real_logits, r1 = jax.lax.cond(now, penalised, without, real)
        r1 = settings.r1_interval * r1
    loss = discriminator_loss(real_logits, fake_logits, settings.loss) + settings.r1 * r1
    right = 0.5 * ((real_logits > 0).astype(loss.dtype) + (fake_logits < 0).astype(loss.dtype))
    metrics = {"ogdm/real_logit": real_logits, "ogdm/fake_logit": fake_logits}
    metrics |= {"ogdm/r1": r1, "ogdm/accuracy": right}
    if settings.adaptive:
        metrics["ogdm/lead"] = jnp.sign(real_logits - fake_logits)
    if settings.scale_by_pixels:
        loss = loss * (real.size // real.shape[0])
    return loss, metrics


# -- the training slots


def training(settings: Settings, context: Context) -> Slots:
    """Fills the penalty slot with the observation loss; its carry, trained after the denoiser in
    every step, has the discriminator's "params" and "opt_state", and "lead" for settings.adaptive.

    Raises:
      ConfigError: images are not square with a side 2^n >= 8, the device batch cannot be cut into
        groups of minibatch statistics, or distribution "adm" has other levels than config.noise.
    """
    _check_levels(settings, context)
    players = Players(settings, context, discriminator(settings, context))
    return Slots("ogdm", penalty=players.penalty, carry=Carry(players.init, players.update))


@dataclasses.dataclass(frozen=True)
class Players:
    """Both sides of the game: the observation loss of the denoiser, and what trains D."""

    settings: Settings
    context: Context
    network: StyleGAN2Discriminator

    @property
    def adam(self) -> optax.GradientTransformation:
        """The discriminator's optimiser."""
        settings = self.settings
        peak = settings.learning_rate
        peak = self.context.learning_rate if peak is None else peak
        fall = lambda step: peak * jnp.maximum(1.0 - step / settings.decay, 0.0)
        return optax.adam(fall if settings.decay else peak, *settings.betas, eps=1e-8)

    def init(self, key: Array) -> dict[str, PyTree]:
        """A fresh discriminator with its Adam."""
        label = jnp.zeros((1,), jnp.int32) if self.context.label_dim else None
        image, pair = jnp.zeros((1, *self.context.image_shape)), jnp.ones((1, 2))
        key = randomness.quick(randomness.fold_in_name(key, "ogdm/companion"))
        params = self.network.init(key, image, pair, label)["params"]
        lead = {"lead": jnp.zeros(())} if self.settings.adaptive else {}
        return {"params": params, "opt_state": self.adam.init(params), **lead}

    def share(self, carry: PyTree) -> Array | float:
        """What gamma is multiplied by: 0 for the discriminator's first updates (warmup), then 1, a
        switch as disc_start of 2012.09841's code; times clip(lead / adaptive, 0, 1).

        The lead is a running mean of sign(d(real) - d(fake)), from 0: the r_t of 2006.06676, which
        is E[sign(d(real))], for real and fake of one x0 and eps, whose logits have one sign.
        """
        wait = duration(self.settings.warmup, self.context.batch, "config.ogdm.warmup")
        share = (carry["opt_state"][0].count >= wait).astype(jnp.float32) if wait else 1.0
        if self.settings.adaptive:
            share = share * jnp.clip(carry["lead"] / self.settings.adaptive, 0.0, 1.0)
        return share

    def penalty(
        self, example: Example, x0_hat: Array, denoiser: DenoiserOf, own: Own
    ) -> tuple[Array, Metrics]:
        """The observation loss gamma * share * pixels * ell_G [b]."""
        settings = self.settings
        if settings.gamma == 0:  # bitwise the plain denoiser's gradient
            return jnp.zeros_like(example.sigma), {}
        pair = self.pair_of(example)
        judge = self.discriminate(jax.lax.stop_gradient(own.carry["params"]), example.label)
        sees = lambda x, pair: judge(view(x, pair, settings, self.context.sigma_data), pair)
        shared = x0_hat if settings.share_denoise else None
        denoise = _denoiser(denoiser, settings, "ogdm")
        fake = project_pair(denoise, example.xt, pair, example.label, settings, shared)
        logits = sees(fake, pair)
        h, w, c = self.context.image_shape
        gamma = settings.gamma * self.share(own.carry)
        loss = gamma * (h * w * c) * generator_loss(logits, settings.loss)
        ratio = pair.sigma_next / pair.sigma
        metrics: Metrics = {"ogdm/generator_logit": logits, "ogdm/level_ratio": ratio}
        if not isinstance(gamma, float):
            metrics["ogdm/gamma"] = jnp.full_like(logits, gamma)
        return loss, metrics

    def update(self, carry: PyTree, update: Update) -> tuple[PyTree, Mapping[str, Array]]:
        """One Adam step of the discriminator on the batch and the updated denoiser."""
        fresh = randomness.fold_in_name(update.key, "ogdm/companion")
        key = update.key if self.settings.resample == "noise" else fresh
        loss = lambda params, example, denoiser: self.loss(params, example, denoiser, update.step)
        grads, metrics = update.gradient(loss, carry["params"], key, fresh)
        updates, opt_state = self.adam.update(grads, carry["opt_state"], carry["params"])
        new = {"params": optax.apply_updates(carry["params"], updates), "opt_state": opt_state}
        if self.settings.adaptive:
            new["lead"] = carry["lead"] + (metrics["ogdm/lead"] - carry["lead"]) / _MEMORY
        return new, metrics

    def loss(
        self, params: PyTree, example: Example, denoiser: DenoiserOf, step: Array | int
    ) -> tuple[Array, Metrics]:
        """The discriminator's loss [b]: real and fake are of the same x0, eps and lower level."""
        settings, pair = self.settings, self.pair_of(example)
        real = example.x0 + pair.sigma_next[:, None, None, None] * example.eps
        denoise = _denoiser(denoiser, settings, "ogdm/companion")
        fake = project_pair(denoise, example.xt, pair, example.label, settings)
        real, fake = (view(x, pair, settings, self.context.sigma_data) for x in (real, fake))
        judge = self.discriminate(params, example.label)
        loss, metrics = own_loss(judge, real, fake, pair, settings, step)
        return loss, metrics | {"loss/ogdm_discriminator": loss}

    def pair_of(self, example: Example) -> Pair:
        """Where each example's projection starts and ends."""
        return draw_pair(self.settings, example.sigma, randomness.uniform(example.keys("ogdm/gap")))

    def discriminate(self, params: PyTree, label: Array | None) -> Callable[[Array, Pair], Array]:
        """(images as the discriminator sees them, pair) -> logits [b]."""

        def judge(x: Array, pair: Pair) -> Array:
            told = condition(pair, self.settings)
            return cast(Array, self.network.apply({"params": params}, x, told, label))

        return judge


def _check_levels(settings: Settings, context: Context) -> None:
    """Refuses pairs of one discrete chain or grid for levels that are not drawn from it."""
    levels, finite = context.noise.levels, not context.noise.reaches_pure_noise
    grid = "at most 1: above, training must draw its levels from a grid, which no distribution does"
    require(settings.k <= 1, "ogdm.k", settings.k, grid)
    for key, bad, good in (("solver", "heun", "euler"), ("condition", "sigma", "log_sigma")):
        infinite = f"{good}: config.noise comes up to pure noise, whose level is infinite"
        require(finite or getattr(settings, key) != bad, f"ogdm.{key}", bad, infinite)
    if settings.distribution != "adm" or levels is None:
        return
    chain = Discrete.make(settings.schedule, settings.diffusion_steps).sigma
    require(
        chain.shape == levels.shape and np.allclose(chain, levels),
        "ogdm.schedule",
        f"{settings.schedule}, {settings.diffusion_steps} steps",
        "the schedule and diffusion_steps of config.precondition, from which noise.distribution "
        "'ddpm' draws; with precondition.zero_terminal, ogdm.distribution=edm",
    )


def discriminator(settings: Settings, context: Context) -> StyleGAN2Discriminator:
    """The auxiliary network for a training context; see `training` for what it raises."""
    h, w, c = context.image_shape
    if h != w or h < 8 or h & (h - 1):
        expected = "expected squares with a side 2^n of at least 8"
        raise ConfigError(f"config.ogdm: images are {h}x{w}; {expected}")
    base, least = settings.channel_base, f"at least the side of the images, {h}"
    require(base >= h, "ogdm.channel_base", base, least)
    chunk = min(settings.statistics_batch or context.device_batch, context.device_batch)
    fits = context.device_batch % chunk == 0 and chunk % min(4, chunk) == 0
    part = f"a divisor of the {context.device_batch} images of a device that groups of 4 divide"
    require(fits, "ogdm.statistics_batch", settings.statistics_batch, part)
    lasts = settings.decay == 0 or settings.decay >= context.steps
    length = f"0, or at least the run's {context.steps} steps: after as many the rate is 0"
    require(lasts, "ogdm.decay", settings.decay, length)
    wait = duration(settings.warmup, context.batch, "config.ogdm.warmup")
    less = f"less than the run's {context.steps} steps: until then gamma is 0"
    require(not wait or wait < context.steps, "ogdm.warmup", settings.warmup, less)
    return StyleGAN2Discriminator(
        img_resolution=h,
        img_channels=c,
        label_dim=context.label_dim,
        channel_base=settings.channel_base,
        channel_max=settings.channel_max,
        normalised=settings.normalise_condition,
        dtype=context.dtype,
        # under a mesh the network sees the global batch: its own "all" would cross devices
        mbstd_batch=chunk,
    )


def _denoiser(denoiser: DenoiserOf, settings: Settings, purpose: str) -> Denoiser:
    """The projection's denoiser: its two evaluations each with dropout of its own."""
    # Fakes must be made alike in both players' steps: where the denoising output is shared, it
    # knows the augmentation.
    augment = settings.pass_augment or settings.share_denoise
    first, second = (denoiser(f"{purpose}/{i}", augment) for i in (1, 2))
    return dataclasses.replace(first, corrector=second)
