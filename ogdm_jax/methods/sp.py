"""Self-perceptual objective (Lin and Yang, arXiv 2401.00110, algorithm 1): a model judged by its
own features.

Phase 1 trains with the squared error. Phase 2 freezes a copy f of that model and fine-tunes the
model so that

    L = mean( (f(x0_hat + s' eps_hat; s') - f(x0 + s' eps; s'))^2 ),   f(x; s): mid-block features,
    s' a fresh level

where eps is the noise that made x_t and eps_hat = (x_t - x0_hat) / sigma the predicted noise: both
pairs jump to s' along their own straight line, so the loss is 0 at s' = sigma and no new noise
enters. In the network's own scale the two inputs of f differ by sin(theta - theta') times the
output error, theta = arctan(sigma / sigma_data): well scaled at every pair of levels.

The authors published no training code. Our own additions, off in the preset `paper`: a pixel-space
anchor (the squared error stays), a noise gate, and a weight calibrated once. The fine-tuned network
is no posterior mean any more.

The teacher is saved by reference: the configuration names its folder, the state its step and the
hash of its weights, and no run goes on with other weights than it began with.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from ogdm_jax.config import Group, choose, require, setting
from ogdm_jax.diffusion import noise
from ogdm_jax.diffusion.process import eps_from_x0
from ogdm_jax.methods.contract import (
    Carry,
    Constants,
    Context,
    DenoiserOf,
    Example,
    Metrics,
    Own,
    Slots,
    Update,
    noise_bins,
    squared_error,
)
from ogdm_jax.models import fingerprint
from ogdm_jax.typing import Array, Features, PyTree

SIGMA_NEXT = ("same", "sd_uniform", "angle_uniform")
DISTANCES = ("mse", "mae")
FEATURE_NORMS = ("none", "relative")


@dataclasses.dataclass(frozen=True)
class Settings(Group):
    """The switches of SP; the values here are the defaults of config.sp (the preset pixel_edm)."""

    GROUP = "sp"
    mse_weight: float = setting(1.0, "weight of the squared error", least=0)
    weight: float = setting(1.0, "weight of the self-perceptual loss", least=0)
    auto: bool = setting(True, "calibrate the weight once, by the size of the gradients")
    sigma_next: str = setting("same", "distribution of the second level s'", choices=SIGMA_NEXT)
    sigma_max: float = setting(
        2.3, "the loss acts at noise levels up to this", least=0, most=float("inf")
    )
    teacher: str = setting("", "training folder of the teacher; '' = init.workdir", free=True)
    teacher_step: int | None = setting(
        None, "its step; None = init.step, of another folder the newest", least=0, free=True
    )
    teacher_weights: str = setting("ema", "ema or params", choices=("ema", "params"), free=True)
    tap: str = setting(
        "mid",
        "features of the teacher: mid = output of the middle block, or blocks' names with commas",
    )
    feature_norm: str = setting(
        "none",
        "none (paper), or relative: divided by the real features' mean square",
        choices=FEATURE_NORMS,
    )
    distance: str = setting("mse", "mse or mae of the features", choices=DISTANCES)
    share: float = setting(
        0.2,
        "auto: size of the feature gradient relative to the squared error's",
        least=0,
        only="auto",
    )
    calibration: int = setting(
        100, "auto: steps over which the weight is measured; then it stays", least=0, only="auto"
    )
    normalize_jump: bool = setting(
        False, "divide by max(sin^2(theta - theta'), 0.05): equal scale for all s'"
    )
    remat: bool = setting(False, "recompute the teacher's activations in the backward pass")
    bins: tuple[float, ...] = setting(
        (0.5, 2.0, 10.0), "edges of the metrics' bins", above=0, rising=True
    )

    def _check_together(self) -> None:
        some = "a positive number, as sp.mse_weight is 0"
        require(self.weight > 0 or self.mse_weight > 0, "sp.weight", self.weight, some)
        if self.calibrated:
            anchor = "False, or sp.mse_weight > 0: it measures against the squared error"
            require(self.mse_weight > 0, "sp.auto", True, anchor)
            steps = "at least 1 step with auto"
            require(self.calibration >= 1, "sp.calibration", self.calibration, steps)

    @property
    def calibrated(self) -> bool:
        """Whether the weight is measured: there is nothing to measure for a weight of 0."""
        return self.auto and self.weight > 0


PRESETS: dict[str, dict[str, Any]] = {
    # The paper's loss: nothing but features, at every noise level.
    "paper": {
        "mse_weight": 0.0,
        "weight": 1.0,
        "auto": False,
        "sigma_next": "sd_uniform",
        "sigma_max": float("inf"),
    },
    # Pixels have no decoder that hides high-frequency drift: keep the squared error, stay where
    # x0_hat is an image.
    "pixel_edm": {},  # the defaults
}

# Stable Diffusion's uniform t (zero-terminal-SNR schedule) as a log-normal distribution of sigma /
# sigma_data.
_SD_MEAN, _SD_STD = 0.776, 1.587
_SMALLEST_JUMP = 0.05


def preset(name: str) -> dict[str, Any]:
    """All settings of a published recipe's loss, "paper" or "pixel_edm" (for config.sp.update).

    What else the paper's recipe has lies in other groups of the configuration;
    configs/cifar10_sp_paper.py sets it: the distribution of t as wide as that of t' (noise.mean,
    noise.std), learning rate 3e-5 (optim), EMA of 0.9995 per step (ema), 50,000 steps (train) of
    896 images (data).

    Raises:
      ValueError: another name.
    """
    return dataclasses.asdict(Settings(**choose("sp.preset", name, PRESETS)))


def self_perceptual_loss(
    features: Features,
    x0: Array,
    eps: Array,
    x0_hat: Array,
    eps_hat: Array,
    sigma_next: Array,
    distance: str = "mse",
    feature_norm: str = "none",
) -> Array:
    """Distance of the features of the predicted and the true pair at a fresh noise level
    (2401.00110, algorithm 1).

    The real branch is a constant; the gradient flows through x0_hat and eps_hat, into the inputs of
    `features`.

    Args:
      features: (x [B,H,W,C], sigma [B]) -> [B, ...], or a list of such arrays: the frozen teacher
        in eval mode, with the labels and augmentation labels of the example.
      x0, eps: [B,H,W,C], x_t = x0 + sigma * eps.   x0_hat, eps_hat: [B,H,W,C], the prediction from
        x_t.
      sigma_next: [B] > 0, the level s' at which both are compared, drawn independently of sigma.
      distance: mse (paper) or mae.   feature_norm: none (paper), or relative: over the real
        features' mean square (mse) or mean absolute value (mae).

    Returns:
      [B] float32 >= 0: the mean over features; with several feature arrays, the mean of their
      means.

    Raises:
      ValueError: an unknown distance or feature_norm.
    """
    predicted, real = _both(features, x0, eps, x0_hat, eps_hat, sigma_next)
    return _distance(predicted, real, distance, feature_norm)


def jump_sine(sigma: Array, sigma_next: Array, sigma_data: float = 0.5) -> Array:
    """sin(theta - theta') [B] with theta = arctan(sigma / sigma_data): how much of an output error
    f gets to see.
    """
    norms = jnp.sqrt(jnp.square(sigma) + sigma_data**2) * jnp.sqrt(
        jnp.square(sigma_next) + sigma_data**2
    )
    return sigma_data * (sigma - sigma_next) / norms


def draw_sigma_next(kind: str, keys: Array, context: Context) -> Array:
    """The noise levels s' [B] of typed keys [B], clipped to the context's range.

    Kinds are "same" (the training distribution again), "sd_uniform" (log-normal, fitted to the
    paper's uniform t, which is much noisier) and "angle_uniform" (theta' uniform between the
    range's ends).

    Raises:
      ValueError: an unknown kind.
    """
    low, high, data = context.sigma_min, context.sigma_max, context.sigma_data
    choose("sp.sigma_next", kind, SIGMA_NEXT)
    if kind == "same":
        levels = context.noise
    elif kind == "sd_uniform":
        levels = noise.edm(float(np.log(data)) + _SD_MEAN, _SD_STD, data)
    else:
        levels = noise.angle_uniform(low, high, data)
    return jnp.clip(levels.sample(keys), low, high)


def calibration() -> dict[str, Array]:
    """The state of a calibration that has seen nothing."""
    return {"count": jnp.zeros((), jnp.int32), "mse": jnp.zeros(()), "sp": jnp.zeros(())}


def calibrate(state: Mapping[str, Array], mse: Array, sp: Array, steps: int) -> dict[str, Array]:
    """Adds a step's mean squared gradient norms of both losses; after `steps` steps the state no
    longer changes.
    """
    open_ = (state["count"] < steps).astype(jnp.int32)
    return {
        "count": state["count"] + open_,
        "mse": state["mse"] + open_ * mse,
        "sp": state["sp"] + open_ * sp,
    }


def calibrated_weight(state: Mapping[str, Array], share: float) -> Array:
    """The weight at which SP's gradient is `share` of the squared error's; 0 before the first
    measurement.
    """
    known = state["sp"] != 0  # of nan too, which stays
    return jnp.where(
        known, share * jnp.sqrt(state["mse"] / jnp.where(known, state["sp"], 1.0)), 0.0
    )


def check_teacher(carry: Mapping[str, Array], constants: Mapping[str, Any]) -> None:
    """Raises ValueError if a run resumes with another teacher than the one it began with."""
    if not np.array_equal(np.asarray(carry["teacher"]), np.asarray(constants["fingerprint"])):
        began, now = int(carry["teacher_step"]), int(constants["step"])
        raise ValueError(
            f"config.sp.teacher: holds other weights at step {now} than this run began with; "
            f"expected the teacher of then, with config.sp.teacher_step={began}"
        )


def _wide(v: Array, x: Array) -> Array:
    return v[(slice(None),) + (None,) * (x.ndim - 1)]


def _both(
    features: Features, x0: Array, eps: Array, x0_hat: Array, eps_hat: Array, sigma_next: Array
) -> tuple[list[Array], list[Array]]:
    """Predicted and real features, each a list of [B,K] float32. Two calls: one of 2B would keep
    what the real half needs for a backward pass that never comes.
    """
    level = _wide(sigma_next, x0)
    flat = lambda tree: [
        f.reshape(f.shape[0], -1).astype(jnp.float32) for f in jax.tree.leaves(tree)
    ]
    real = features(jax.lax.stop_gradient(x0 + level * eps), sigma_next)
    return flat(features(x0_hat + level * eps_hat, sigma_next)), jax.lax.stop_gradient(flat(real))


def _distance(predicted: list[Array], real: list[Array], distance: str, feature_norm: str) -> Array:
    choose("sp.distance", distance, DISTANCES)
    choose("sp.feature_norm", feature_norm, FEATURE_NORMS)
    size = jnp.square if distance == "mse" else jnp.abs
    parts = [jnp.mean(size(p - r), axis=1) for p, r in zip(predicted, real, strict=True)]
    if feature_norm == "relative":
        parts = [part / jnp.mean(size(r), axis=1) for part, r in zip(parts, real)]
    return functools.reduce(jnp.add, parts) / len(parts)


def training(settings: Settings, context: Context) -> Slots:
    """Fills the distance slot: mse_weight * (squared error to the target) + weight * gate *
    self-perceptual loss.

    STF may replace the target of the squared error; SP compares with the features of the actual
    image and noise. The teacher is read from settings.teacher when the run starts; it is this
    method's constants. Its fingerprint travels in the carry, with the calibration: resuming with
    another teacher makes the loss nan, and `check_teacher` says why. A weight of 0 is plain
    training, bit for bit.

    Raises:
      ConfigError: no teacher, or a tap that is no block of it.
      CheckpointError: the teacher's folder does not fit.
    """
    teacher = functools.cache(functools.partial(_teacher, settings, context))
    _check_tap(settings.tap, context.layers)
    teacher()  # read now: what is asked for later may be inside a trace, where nothing can be read

    def init(key: Array) -> dict[str, Array]:
        del key  # nothing is drawn
        known = {"teacher": teacher()["fingerprint"], "teacher_step": teacher()["step"]}
        return calibration() | jax.tree.map(jnp.asarray, known)

    def update(carry: PyTree, update: Update) -> tuple[PyTree, Mapping[str, Array]]:
        if not settings.calibrated:
            return carry, {}
        measured = (update.metrics["sp/grad_mse"], update.metrics["sp/grad_sp"])
        return carry | calibrate(carry, *measured, settings.calibration), {}

    return Slots(
        name="sp",
        distance=functools.partial(_distance_slot, settings, context),
        constants=Constants(teacher, weights=True),
        carry=Carry(init, update, check_teacher),
        sees_target=settings.mse_weight > 0,
    )


def _teacher(settings: Settings, context: Context) -> dict[str, Any]:
    """{"params", "buffers", "fingerprint", "step"} of the teacher, on the host."""
    params, buffers, step = context.weights(
        settings.teacher, settings.teacher_weights, settings.teacher_step, "config.sp.teacher"
    )
    variables = jax.tree.map(np.asarray, {"params": params, "buffers": buffers})
    return variables | {"fingerprint": fingerprint(variables), "step": np.int32(step)}


def _check_tap(tap: str, blocks: Sequence[str]) -> None:
    """Refuses what is no block, and the embedding ("emb"): it does not see the image, so the loss
    would be 0.
    """
    known = tap == "mid" or all(name in blocks for name in tap.split(","))
    require(
        known, "sp.tap", tap, f"mid, or blocks among {', '.join(blocks)} with commas between them"
    )


def _distance_slot(
    settings: Settings,
    context: Context,
    example: Example,
    x0_hat: Array,
    target: Array,
    denoiser: DenoiserOf,
    own: Own,
) -> tuple[Array, Metrics]:
    """The whole loss [b]; nan where the teacher is not the one that the run began with."""
    del denoiser
    squared = squared_error(example, x0_hat, target, context.noise.weight)
    same_teacher = jnp.all(own.carry["teacher"] == own.constants["fingerprint"])
    if settings.weight == 0:  # bitwise the plain denoiser's gradient
        loss = jnp.where(same_teacher, settings.mse_weight * squared, jnp.nan)
        return loss, {"loss/mse": squared}
    gated = _gated(settings, context, example, x0_hat, own)
    perceptual, cosine = gated(x0_hat)
    weight, norms = jnp.asarray(settings.weight, jnp.float32), {}
    if settings.calibrated:
        weight = weight * calibrated_weight(own.carry, settings.share)
        norms = _gradient_norms(settings, context, example, (x0_hat, target), gated, own.carry)
    loss = settings.mse_weight * squared + weight * perceptual
    loss = jnp.where(same_teacher, loss, jnp.nan)
    # Features may be blind to a prediction whose mean colour is off, and without the squared error
    # nothing else holds it: the log shows how far off it is.
    colour = jnp.mean(jax.lax.stop_gradient(x0_hat) - example.x0, axis=(1, 2))
    metrics: Metrics = {
        "loss/mse": squared,
        "loss/sp": perceptual,
        "sp/cosine": cosine,
        "sp/weight": weight * jnp.ones_like(loss),
        "sp/colour": jnp.mean(jnp.abs(colour), axis=-1),
    }
    metrics |= noise_bins({"sp/loss": perceptual}, example.sigma, settings.bins)
    return loss, metrics | norms


def _gated(
    settings: Settings, context: Context, example: Example, x0_hat: Array, own: Own
) -> Callable[[Array], tuple[Array, Array]]:
    """x0_hat -> (the self-perceptual loss behind its gate, cosine of the features) [b] each."""
    teacher = context.denoiser(own.constants["params"], own.constants["buffers"], example.augment)

    def features(x: Array, sigma: Array) -> PyTree:
        return teacher.features(x, sigma, example.label, at=settings.tap)

    if settings.remat:
        features = jax.checkpoint(features)
    sigma = example.sigma
    sigma_next = draw_sigma_next(settings.sigma_next, example.keys("sp/sigma_next"), context)
    gate = (sigma <= settings.sigma_max).astype(jnp.float32)
    if settings.normalize_jump:
        sine = jump_sine(sigma, sigma_next, context.sigma_data)
        gate = gate / jnp.maximum(jnp.square(sine), _SMALLEST_JUMP)
    # The gradient takes the way through x0_hat, which is exact; the value is the stable one of
    # example.eps_hat.
    eps_hat = cast(Array, example.eps_hat)
    rounding = jax.lax.stop_gradient(eps_hat - eps_from_x0(example.xt, x0_hat, sigma))

    def gated(x0_hat: Array) -> tuple[Array, Array]:
        eps_hat = eps_from_x0(example.xt, x0_hat, sigma) + rounding
        predicted, real = _both(features, example.x0, example.eps, x0_hat, eps_hat, sigma_next)
        loss = _distance(predicted, real, settings.distance, settings.feature_norm)
        return gate * loss, _cosine(predicted, real)

    return gated


def _cosine(predicted: list[Array], real: list[Array]) -> Array:
    """Cosine between predicted and real features [B]."""
    dot = lambda a, b: sum(jnp.sum(x * y, axis=1) for x, y in zip(a, b))
    return jax.lax.stop_gradient(
        dot(predicted, real) * jax.lax.rsqrt(dot(predicted, predicted) * dot(real, real) + 1e-20)
    )


def _gradient_norms(
    settings: Settings,
    context: Context,
    example: Example,
    both: tuple[Array, Array],
    gated: Callable[[Array], tuple[Array, Array]],
    carry: Mapping[str, Array],
) -> Metrics:
    """Squared norms [b] of both losses' gradients in the network's own output scale, while the
    calibration is open.

    EDM's F-space, where both losses are well scaled: d/dF = c_out d/dx0_hat. It needs one more
    backward pass through the teacher, and only in those steps.
    """
    x0_hat, target = jax.lax.stop_gradient(both)  # prediction and target
    sigma, data = example.sigma, context.sigma_data
    scale = jnp.square(sigma * data) / (jnp.square(sigma) + data**2)
    norm = lambda g: scale * jnp.sum(jnp.square(g), axis=(1, 2, 3))

    def measure() -> tuple[Array, Array]:
        weight = context.noise.weight
        squared = lambda x: settings.mse_weight * jnp.sum(squared_error(example, x, target, weight))
        perceptual = lambda x: jnp.sum(gated(x)[0])
        return norm(jax.grad(squared)(x0_hat)), norm(jax.grad(perceptual)(x0_hat))

    closed = lambda: (jnp.zeros_like(sigma), jnp.zeros_like(sigma))
    mse, sp = jax.lax.cond(carry["count"] < settings.calibration, measure, closed)
    return {"sp/grad_mse": mse, "sp/grad_sp": sp}
