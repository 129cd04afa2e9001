"""Classifier guidance (ADM-G, arXiv 2105.05233): a classifier of noisy images pulls every step to
the class.

A classifier p(y | x_t) adds the gradient of its logarithm to the score. OpenAI's classifiers see
x_vp = x / sqrt(1 + sigma^2) and the time step t; in x = x0 + sigma eps, with s the scale and

    g(x, sigma) = s grad_x log p(y | x_vp, t) = s grad_{x_vp} log p(y | x_vp, t) / sqrt(1 + sigma^2)

| rule | as released | here |
|---|---|---|
| score (their DDIM, algorithm 2) | eps - sqrt(1 - alpha_bar) g_vp | D' = D + sigma^2 g |
| mean (their DDPM, algorithm 1) | mean + Sigma g_vp, at x_t | `steps.shifted_mean` |

The two agree to first order in the step; a fixed or learned Sigma weighs the second. With --clip
both are added after the clamp, as released. Beside DG (ADM-G++ of arXiv 2211.17091: score + c + g)
what the discriminator adds comes last. From pure noise the score's rule has no bound, as released:
leave that level out by the window, or shift the mean.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp

from ogdm_jax import places
from ogdm_jax.config import ConfigError, Group, setting
from ogdm_jax.diffusion.denoiser import Denoiser
from ogdm_jax.diffusion.process import Discrete
from ogdm_jax.diffusion.steps import per_example
from ogdm_jax.interop.pretrained import load_pretrained
from ogdm_jax.methods import dg
from ogdm_jax.methods.session import Session
from ogdm_jax.networks import ADMEncoder
from ogdm_jax.sampling.guidance import Guidance, Preset, constant
from ogdm_jax.sampling.schedule import Window, numbers, window_setting
from ogdm_jax.typing import Array, LogRatio, PyTree

_RELEASED = {"solver": "ancestral", "steps": 250, "grid": "respaced", "clip": True}
# The commands of guided-diffusion's README; the last is for 256x256_diffusion_uncond.pt.
PRESETS: dict[str, Preset] = {
    name: Preset({"scale": scale}, _RELEASED)
    for name, scale in (
        ("adm64", 1.0),
        ("adm128", 0.5),
        ("adm256", 1.0),
        ("adm512", 4.0),
        ("adm256_unconditional", 10.0),
    )
}
RULES = ("score", "mean")


@dataclasses.dataclass(frozen=True)
class Settings(Group):
    """Settings of classifier guidance on the command line.

    Attributes:
      checkpoint: file of the classifier, as released.
      scale: s above.
      window: noise levels (low, high) that are guided; None: all.
      schedule: betas of the steps at which the classifier is asked.
      rule: see the table; "auto" is as released: "mean" for ancestral steps, else "score".
    """

    GROUP, PREFIX = "classifier", ""
    checkpoint: str = setting("", "classifier of noisy images, such as 256x256_classifier.pt")
    scale: float = setting(1.0, "factor of the gradient; 1: Bayes' rule", above=0)
    window: Window | None = window_setting()
    schedule: str = setting(
        "model",
        "betas it was trained with: the model's, linear, or cosine (64x64_classifier.pt)",
        choices=("model", "linear", "cosine"),
    )
    rule: str = setting(
        "auto",
        "shift the score, or the mean of ancestral steps; auto: as released, by the solver",
        choices=("auto", *RULES),
    )


def log_probability(
    logits: Callable[[Array, Array], Array], table: Discrete, time_scale: float = 1.0
) -> LogRatio:
    """The classifier's log p(label | x) [B] in x = x0 + sigma eps; 0 of no class, -1.

    Args:
      logits: (x_vp [B,H,W,C], t [B]) -> [B,K].
      table: the process of its steps; the level nearest to sigma (in its logarithm) gives t.
      time_scale: what the classifier calls one step, see `precondition.time_scale`.
    """
    times = table.timesteps * time_scale

    def log_prob(x: Array, sigma: Array, label: PyTree = None) -> Array:
        if label is None:
            raise ValueError("label=None; classifier guidance expects the classes of the images")
        x_vp = x * per_example(jax.lax.rsqrt(1 + sigma**2), x)
        logs = logits(x_vp, jnp.asarray(times, x.dtype)[table.index(sigma)])
        logs = jax.nn.log_softmax(logs.astype(jnp.promote_types(logs.dtype, jnp.float32)))
        found = jnp.take_along_axis(logs, jnp.maximum(label, 0)[:, None], axis=-1)[:, 0]
        return jnp.where(label >= 0, found, 0.0)

    return log_prob


def guidance(
    log_prob: Callable[..., Any],
    scale: float | Array = 1.0,
    window: Window | None = None,
    rule: str = "score",
    *,
    params: PyTree = None,
) -> Guidance:
    """Classifier guidance as guidance of `sample`.

    Args:
      log_prob: (x [B,...], sigma [B], label) -> [B], see `log_probability`; where params are given,
        a function of them that returns it.
      scale: s above; it travels as an array, so that another one compiles nothing.
      window: noise levels (low, high) that are guided; None: all.
      rule: "score", or "mean" for the solver "ancestral".
      params: the classifier's weights, an argument of the compiled sampler.

    Raises:
      ConfigError: a scale, a window or a rule that cannot be.
    """
    chosen = Settings(window=window, rule=rule, **numbers(scale=scale))
    low, high = chosen.window or (0.0, float("inf"))
    constants = {"params": params, "scale": constant(scale)}

    def known(constants: PyTree) -> LogRatio:
        return log_prob if params is None else log_prob(constants["params"])

    def transform(denoise: Denoiser, constants: PyTree, through: bool = False) -> Denoiser:
        return dg.guide(denoise, known(constants), constants["scale"], low, high, through=through)

    if chosen.rule == "mean":
        shift = dg.mean_shift(known, low, high, "scale")
        return Guidance("classifier", shift=shift, constants=constants)
    exact = functools.partial(transform, through=True)
    return Guidance("classifier", transform, exact=exact, constants=constants, outermost=1)


def classes(settings: Settings) -> int:
    """Classes of the checkpoint, which --label may name where the model has none of its own."""
    return int(_open(settings.checkpoint)[0].out_channels or 0)


@functools.lru_cache(maxsize=1)
def _open(name: str) -> tuple[ADMEncoder, PyTree]:
    """(network, params) of the file; read once for all that a command asks of it."""
    field = "--classifier.checkpoint"
    if not name:
        raise ConfigError(f"{field}: not given; expected the file of a classifier of noisy images")
    found = load_pretrained(places.local(name, field), "adm_encoder")
    network = found.network
    assert isinstance(network, ADMEncoder)  # of this kind
    if network.label_dim or (network.out_channels or 0) < 2:
        raise ConfigError(
            f"{field}: {name!r} holds the head of a discriminator; expected a classifier, or "
            "--guidance dg"
        )
    return network, found.variables["params"]


def build(settings: Settings, session: Session) -> Guidance:
    """Guidance by the classifier of a file.

    Raises:
      ConfigError: no file; a classifier of other images or classes; images without a class; a model
        without steps of its own where the classifier's are not given.
    """
    network, params = _open(settings.checkpoint)
    model, field = session.model, "--classifier.checkpoint"
    size = network.img_resolution, network.img_resolution, network.img_channels
    known = network.out_channels
    if size != model.image_shape:
        raise ConfigError(
            f"{field}: {settings.checkpoint!r} is for images {size}, the model's are "
            f"{model.image_shape}; expected a classifier of the same"
        )
    if model.label_dim not in (0, known):
        raise ConfigError(
            f"{field}: {settings.checkpoint!r} knows {known} classes, the model "
            f"{model.label_dim}; expected a classifier of the same"
        )
    if session.labels is None or (session.labels < 0).any():
        raise ConfigError(
            f"--label: the images have no class; --guidance classifier expects one, 0 to {known}"
            " - 1"
        )
    if settings.schedule != "model":
        table, scale = Discrete.make(settings.schedule), 1.0
    elif model.table is not None:
        table, scale = model.table, model.time_scale
    else:
        raise ConfigError(
            "--classifier.schedule: 'model' given, but the model has no steps of its own; expected "
            "linear, or cosine (64x64_classifier.pt)"
        )
    rule = settings.rule
    if rule == "auto":
        rule = "mean" if session.sampling.solver == "ancestral" else "score"

    def log_prob(params: PyTree) -> LogRatio:
        def logits(x: Array, t: Array) -> Array:
            return cast(Array, network.apply({"params": params}, x, t))

        return log_probability(logits, table, scale)

    return guidance(log_prob, settings.scale, settings.window, rule, params=params)
