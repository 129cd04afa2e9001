"""Training an autoencoder for latent models: another task of the loop (config.task=autoencoder).

    python train.py --config configs/digits_vae.py --workdir runs/digits_vae

The first stage of arXiv 2112.10752 with KL regularisation, without its discriminator and perceptual
term: sum |x - decode(z)| + kl * KL(q(z|x) || N(0, I)) of each image, z drawn from q. At the end
WORKDIR/vae is a folder of diffusers, whose scaling_factor was measured here.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from ogdm_jax import data, parallel, platforms, randomness
from ogdm_jax.config import Config, Group, require, setting
from ogdm_jax.data import augment, pictures
from ogdm_jax.interop import autoencoder, diffusers, export
from ogdm_jax.methods.contract import combine
from ogdm_jax.metrics.distances import psnr
from ogdm_jax.metrics.features import distance_report
from ogdm_jax.networks import AutoencoderKL, vae
from ogdm_jax.pixels import to_float, to_uint8
from ogdm_jax.training import evaluate, heldout, logs, task
from ogdm_jax.training import run as runs
from ogdm_jax.training.gradients import Sums, sums
from ogdm_jax.training.objective import Loss, Objective
from ogdm_jax.training.state import TrainState
from ogdm_jax.training.workdir import open_source
from ogdm_jax.typing import Array, PyTree

FOLDER = "vae"  # of the training folder: what diffusers reads
_BATCH, _MOST, _COLUMNS = 256, 50_000, 8


@dataclasses.dataclass(frozen=True)
class Settings(Group):
    """The group config.vae; widths, blocks and compute type are those of config.network."""

    GROUP = "vae"
    latent_channels: int = setting(4, "of a latent", least=1, most=64)
    groups: int = setting(32, "of the norms; divides the width of every level", least=1, most=4096)
    loss: str = setting(
        "l1", "of a pixel: l1 (absolute) or l2 (squared error)", choices=("l1", "l2")
    )
    kl: float = setting(1e-6, "weight of the KL divergence beside the sum over pixels", least=0)


@dataclasses.dataclass(frozen=True)
class Autoencoder:
    """An autoencoder as a run wants its model. image_shape: (h, w, c)."""

    network: AutoencoderKL
    image_shape: tuple[int, int, int]

    def init(self, key: Array) -> tuple[PyTree, PyTree]:
        """Fresh (params, no buffers)."""
        return self.network.init(key, jnp.zeros((1, *self.image_shape)))["params"], {}


def build(config: Config, source: data.Source, plan: parallel.Plan) -> runs.Run[Autoencoder]:
    """The run of a configuration.

    Raises:
      ConfigError: latents, widths that groups do not divide, sides that the levels do not halve,
        or a batch that the devices and rounds do not divide.
    """
    network = _network(config, source)
    parallel.check_batch(config.data.batch, config.optim.accumulate, len(plan.devices))
    model, goal = Autoencoder(network, source.shape), Objective(training_loss(config, network))
    return runs.Run.of(config, source, model, combine([]), goal, plan)


def _network(config: Config, source: data.Source) -> AutoencoderKL:
    net, settings = config.network, config.settings("vae", Settings)
    require(source.latents is None, "data.source", config.data.source, "pictures, no latents")
    widths = tuple(round(net.model_channels * part) for part in net.channel_mult)
    network = AutoencoderKL(
        source.shape[-1],
        settings.latent_channels,
        widths,
        net.num_blocks,
        settings.groups,
        dtype=getattr(jnp, net.dtype),
        remat=net.remat,
    )
    need = f"a divisor of every width {widths}"
    require(
        not any(width % settings.groups for width in widths), "vae.groups", settings.groups, need
    )
    sides, times = source.shape[:2], len(widths) - 1
    need = f"as many levels as halve sides of {' x '.join(map(str, sides))} ({times} times)"
    halved = not any(side % network.factor for side in sides)
    require(halved, "network.channel_mult", net.channel_mult, need)
    return network


def training_loss(config: Config, network: AutoencoderKL) -> Loss:
    """The loss of the step: sums over an image's pixels and latents, as LDM has them; an image's z
    comes from its own key.
    """
    settings = config.settings("vae", Settings)

    def loss(
        params: PyTree, state: TrainState, constants: Any, batch: dict[str, Any], key: Array
    ) -> tuple[Array, Sums]:
        keys = lambda purpose: randomness.example_keys(key, purpose, batch["index"])
        image = to_float(batch["image"])
        if config.data.xflip:
            image = augment.xflip(keys("xflip"), image)
        moments = cast(Array, network.apply({"params": params}, image, method="encode"))
        mean, std = vae.posterior(moments)
        z = mean + std * randomness.normal(keys("posterior"), mean.shape[1:])
        error = cast(Array, network.apply({"params": params}, z, method="decode")) - image
        error = jnp.abs(error) if settings.loss == "l1" else jnp.square(error)
        kl = vae.kl_divergence(moments)
        total = error.sum((1, 2, 3)) + settings.kl * kl
        pixel = error.mean((1, 2, 3))
        return jnp.mean(total), sums({"loss": total, f"loss/{settings.loss}": pixel, "kl": kl})

    return loss


class View(NamedTuple):
    """Some images [n,h,w,c] and what the posterior's mean becomes again, both uint8."""

    images: np.ndarray
    made: np.ndarray


@functools.partial(jax.jit, static_argnums=(0, 1))
def _view(platform: str, network: AutoencoderKL, params: PyTree, images: Array) -> Array:
    """What the posterior's mean becomes, of uint8 images."""

    def view(params: PyTree, images: Array) -> Array:
        moments = network.apply({"params": params}, to_float(images), method="encode")
        mean, _ = vae.posterior(cast(Array, moments))
        return cast(Array, network.apply({"params": params}, mean, method="decode"))

    return platforms.traced_for(platform, view)(params, images)


def _batches(run: runs.AnyRun, source: data.Source, num: int) -> Iterator[tuple[np.ndarray, int]]:
    """So many images, spread evenly over a source, batch by batch, as many as a device has in a
    step: (images, how many of them count), for one size is compiled.
    """
    size = min(run.config.data.batch // len(run.plan.devices), _BATCH)
    rows = data.spread(len(source), num)
    for start in range(0, len(rows), size):
        part = rows[start : start + size]
        yield source.take(np.resize(part, size))["image"], len(part)


def viewer(run: runs.Run[Autoencoder]) -> Callable[..., Iterator[View]]:
    """(params, source, num) -> views of so many images, batch by batch."""
    network, platform = run.model.network, run.plan.local_devices[0].platform

    def views(params: PyTree, source: data.Source, num: int) -> Iterator[View]:
        for images, count in _batches(run, source, num):
            made = np.asarray(_view(platform, network, params, images))[:count]
            yield View(images[:count], to_uint8(made))

    return views


def sheet(view: View) -> np.ndarray:
    """A row of images above a row of what was made of them, and so on."""
    rows = range(0, len(view.images), _COLUMNS)
    both = [part[i : i + _COLUMNS] for i in rows for part in (view.images, view.made)]
    return pictures.sheet(np.concatenate(both), min(_COLUMNS, len(view.images)))


def _watch(
    run: runs.Run[Autoencoder], workdir: epath.Path, writer: logs.Writer
) -> Callable[[int, TrainState], None]:
    """Writes samples/STEP.png: images and what the moving average makes of them."""
    views, num = viewer(run), run.config.sample.num
    num = num if num < _COLUMNS else num // _COLUMNS * _COLUMNS  # no row that is cut

    def write(step: int, state: TrainState) -> None:
        params = run.plan.local_copy(state.ema)
        if jax.process_index() == 0:
            parts = zip(*views(params, run.source, num), strict=True)
            picture = sheet(View(*map(np.concatenate, parts)))
            pictures.save_png(workdir / "samples" / f"{step:08d}.png", picture)
            writer.image(step, "reconstructions", picture)

    return write


def _evaluation(
    run: runs.Run[Autoencoder], workdir: epath.Path
) -> Callable[[TrainState], dict[str, Any]]:
    """The distance of reconstructions to other images of the data: the floor of the samples of a
    latent model.
    """
    views, num = viewer(run), run.config.evaluate.num or len(run.source)
    space_of = functools.cache(lambda: evaluate.space_of(run.config))

    def measure(state: TrainState) -> dict[str, Any]:
        params, space = run.plan.local_copy(state.ema), space_of()
        parts = zip(*views(params, run.source, min(num, _MOST)), strict=True)
        whole = View(*map(np.concatenate, parts))
        report = {"step": int(state.step), "solver": "reconstructions", "steps": 1, "nfe": 1}
        report |= distance_report(space, whole.made, whole.images, paired=True)
        evaluate.write_report(workdir, report, whole.made[: evaluate.SHOWN])
        return report

    return measure


def _held_out(run: runs.Run[Autoencoder]) -> Callable[[TrainState], dict[str, float]] | None:
    """Peak signal-to-noise ratios of reconstructions: of config.data.heldout, and of as many that
    are trained on.
    """
    if not run.config.data.heldout:
        return None
    other, views = heldout.open_images(run.config, run.source, classes=False), viewer(run)
    num = min(run.config.evaluate.heldout or len(other), len(other))

    def measure(state: TrainState) -> dict[str, float]:
        params, found = run.plan.local_copy(state.ema), {}
        for name, source in (("heldout", other), ("train", run.source)):
            ratios = [psnr(v.images, v.made) for v in views(params, source, num)]
            found[f"{name}/psnr"] = float(np.concatenate(ratios).mean())
        return found

    return measure


def write(run: runs.Run[Autoencoder], params: PyTree, folder: epath.Path) -> AutoencoderKL:
    """Writes the folder that diffusers reads.

    scaling_factor is 1 / std over all numbers of z, drawn from the posterior, of at most 50,000
    images (LDM takes the first batch's): var z = E[mean^2 + std^2] - E[mean]^2.

    Returns:
      The network with that scale.
    """
    model, moments = run.model, []
    frozen = autoencoder.Autoencoder(model.network, {"params": params}, str(folder))
    for images, count in _batches(run, run.source, _MOST):
        mean, std = (part[:count].astype(np.float64) for part in frozen.encode(images))
        moments.append((mean.size, mean.sum(), (np.square(mean) + np.square(std)).sum()))
    count, total, square = np.sum(moments, axis=0)
    std = float(np.sqrt(square / count - (total / count) ** 2))
    network = model.network.clone(scale=1 / std)
    state = export.to_torch(network, {"params": params})
    diffusers.write(folder, network, state, sample_size=model.image_shape[0])
    return network


def _build(
    config: Config, plan: parallel.Plan, workdir: epath.Path, log: task.Log, began: task.Began
) -> runs.Run[Autoencoder]:
    return build(config, open_source(config), plan)


def _finish(
    run: runs.Run[Autoencoder], state: TrainState, workdir: epath.Path, log: Callable[[str], None]
) -> None:
    """Writes WORKDIR/vae."""
    params = run.plan.local_copy(state.ema)
    if jax.process_index() == 0:
        scale = write(run, params, workdir / FOLDER).scale
        log(f"{workdir / FOLDER} is a folder of diffusers; its latents have std {1 / scale:.4g}")


TASK = task.Task(_build, task.batches, _watch, _evaluation, _held_out, _finish)
