"""Images from seeds, over any number of devices. An image depends only on its seed."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ogdm_jax import platforms, randomness
from ogdm_jax.config import ConfigError, Sample, require
from ogdm_jax.diffusion import grids, process
from ogdm_jax.models import VAE, Model
from ogdm_jax.sampling import adaptive, decode, discrete
from ogdm_jax.sampling.guidance import Guidance, combine
from ogdm_jax.sampling.sampler import check_parts, sample
from ogdm_jax.sampling.solvers import FEWEST_STEPS, FROM_PURE_NOISE
from ogdm_jax.typing import Array, PyTree

AXIS = "images"
Images = Callable[[PyTree, PyTree, Any, Any, PyTree, PyTree], Any]  # see `sampler`
# Names of config.sample.grid (config.groups.GRIDS lists them, too). Continuous grids lie within the
# sampler's and the model's range of levels. The others are steps of a discrete model's own process:
# guided-diffusion's respacing, DDIM's two (arXiv 2010.02502 D.2), and one that ends at the top.
CONTINUOUS = {
    "edm": grids.edm,
    "vp": lambda n, low, high, rho: grids.vp(n, low, high),
    "ve": lambda n, low, high, rho: grids.ve(n, low, high),
    "iddpm": lambda n, low, high, rho: grids.iddpm(n, low, high),
}
DISCRETE = {"respaced": "even", "ddim": "uniform", "quad": "quad", "trailing": "trailing"}
DISCRETE |= {"leading": "leading", "linspace": "linspace"}
UNBOUNDED = "false with latents, which have no bounds"  # of what clips to [-1, 1]
# Of one more step diffusers drops the lowest, where these have leading or linspace spacing.
FURTHER = ("dpmpp_2m", "dpmpp_2m_sde", "unipc")
ORDERS = {"spndm": 2, "fpndm": 4}
PNDM = "pndm"  # the released code of S- and F-PNDM, `discrete.pndm`


def seed_keys(seeds: Array) -> Array:
    """One typed key per seed."""
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(randomness.seeded(0), seeds)


def seed_noise(seeds: Array, shape: tuple[int, ...]) -> tuple[Array, Array]:
    """What `sample` starts from, of seeds [n]: latents [n, *shape] and a key for each image."""
    keys = seed_keys(seeds)
    latents = randomness.normal(randomness.fold_in_each(keys, "latent"), shape)
    return latents, randomness.fold_in_each(keys, "steps")


def most_at_a_time(model: Model, most: int = 256) -> int:
    """Images that a device draws at a time where nobody says how many.

    So many that their pictures have 512 x 32 x 32 pixels, at most `most`: 8 of 256 x 256. There ADM
    takes 0.3 GiB an image, by the compiler for a TPU v5e.
    """
    height, width, _ = model.picture_shape
    return min(most, max(1, 512 * 32 * 32 // (height * width)))


def batch_size(
    model: Model, num: int, devices: int, each: int | None = None, most: int = 256
) -> int:
    """Images of a compiled batch: a multiple of the devices, at most `each` on every one, and no
    more than `num` images need.

    Args:
      model: what is sampled.
      num: images in all.
      devices: how many there are.
      each: None: `most_at_a_time`, at most `most`.
    """
    return devices * min(each or most_at_a_time(model, most), -(-num // devices))


def pending(done: np.ndarray, batch: int) -> list[int]:
    """The first numbers of the batches that `generate` draws, where some images are done.

    A batch is drawn whole or not at all, so that a run that was stopped and one that was not
    compute the same.

    Args:
      done: [n] whether an image need not be drawn.
      batch: images at a time.
    """
    return [at for at in range(0, len(done), batch) if not done[at : at + batch].all()]


def batch_rows(start: int, batch: int, count: int) -> np.ndarray:
    """[batch] rows from start on, of count; the last batch repeats its first up to that size."""
    return np.resize(np.arange(start, min(start + batch, count)), batch)


def random_labels(seeds: np.ndarray, num_classes: int) -> np.ndarray:
    """The class of each seed: uniform, drawn from the seed alone."""
    keys = randomness.fold_in_each(seed_keys(jnp.asarray(seeds, jnp.uint32)), "label")
    return np.asarray(jax.vmap(lambda k: jax.random.randint(k, (), 0, num_classes))(keys))


def labels_for(
    seeds: np.ndarray, num_classes: int, label: int | Sequence[int] | np.ndarray | None
) -> np.ndarray | None:
    """The class of each image: `label`, or one drawn from each seed; None without classes.

    Args:
      seeds: [n].
      num_classes: of the model, 0 if it is unconditional.
      label: of all images (-1: no class), of each, or None.

    Raises:
      ConfigError: a label for an unconditional model, or one that is no class.
    """
    if label is None:
        return random_labels(seeds, num_classes) if num_classes else None
    if not num_classes:
        raise ConfigError(
            f"--label: {label} given, but the model is unconditional; leave the option out"
        )
    labels = np.asarray(label)
    known = labels.dtype.kind in "iu" and labels.shape in ((), (len(seeds),))
    known = known and bool((labels >= -1).all() and (labels < num_classes).all())
    each = f", or {len(seeds)} of them" if labels.ndim else ""
    require(known, "--label", label, f"0 to {num_classes - 1}, or -1 for no class{each}")
    return np.broadcast_to(labels, (len(seeds),)).astype(np.int32)


def noise_levels(model: Model, settings: Sample) -> np.ndarray:
    """The grid of config.sample for a model: [steps + 1] decreasing levels, float64, the last 0
    (of the released PNDM, and with sample.end first: the process's lowest).

    Raises:
      ConfigError: the grid needs a discrete model, or has fewer steps than wanted.
    """
    name, steps, table = settings.grid, settings.steps, model.table
    denoise = model.denoiser({}, {})
    if name == "flow":
        knows = f"one of {', '.join(CONTINUOUS)}: the model does not know pure noise, as flow does"
        # a range without an end (edm) is not one that was trained up to its end
        require(denoise.sigma_max == process.PURE_NOISE, "sample.grid", name, knows)
        return grids.flow(steps, settings.shift)
    of_eps = "another grid, such as ddim: the released PNDM is of models that predict eps"
    require(name != PNDM or model.predicts == "eps", "sample.grid", name, of_eps)
    fitting = f"one of {', '.join(CONTINUOUS)}: the model is not a discrete one"
    require(name in CONTINUOUS or table is not None, "sample.grid", name, fitting)
    try:
        if name in DISCRETE and table is not None:
            further = name in ("leading", "linspace") and settings.solver in FURTHER
            how = {"offset": settings.offset, "further": further, "end": settings.end}
            return grids.ddim(steps, table, DISCRETE[name], **how)
        if name == PNDM and table is not None:
            return discrete.pndm_levels(steps, table, ORDERS[settings.solver])
        low, high = grids.clip_range(denoise, settings.sigma_min, settings.sigma_max)
        return CONTINUOUS[name](steps, low, high, settings.rho)
    except ValueError as error:
        raise ConfigError(
            f"config.sample.steps: {steps} given for the grid {name!r}: {error}"
        ) from None


def replaced(settings: Sample, changes: Mapping[str, Any]) -> Sample:
    """The settings with some replaced; a change to dpmpp_2m_sde, which eta 0 makes dpmpp_2m, brings
    eta 1 where neither says another, and one to dopri5, which chooses its steps, a grid of two.
    """
    if changes.get("solver") == "dpmpp_2m_sde" and not settings.eta:
        changes = {"eta": 1.0} | dict(changes)
    if changes.get("solver") == adaptive.NAME:
        changes = {"steps": max(settings.steps, 2)} | dict(changes)
    return dataclasses.replace(settings, **changes)


def check_settings(settings: Sample, model: Model | None = None) -> None:
    """Raises ConfigError for too few steps, or a grid or variance that the model does not have."""
    least = FEWEST_STEPS.get(settings.solver, 1)
    require(settings.steps >= least, "sample.steps", settings.steps, f"at least {least}")
    random = settings.solver != "dpmpp_2m_sde" or settings.eta > 0
    require(random, "sample.eta", settings.eta, "above 0, such as 1, or sample.solver=dpmpp_2m")
    if model is None:
        return
    require(model.pixels or not settings.clip, "sample.clip", settings.clip, UNBOUNDED)
    denoise, solvers = model.denoiser({}, {}), ", ".join(FROM_PURE_NOISE)
    finite_start = noise_levels(model, settings)[0] < process.PURE_NOISE
    starts = finite_start or settings.solver in FROM_PURE_NOISE
    expected = f"one of {solvers} with the grid {settings.grid!r}, which starts from pure noise"
    require(starts, "sample.solver", settings.solver, expected)
    bounded = finite_start or settings.variance != "diffusion"
    finite = (
        f"small, large or learned with the grid {settings.grid!r}: from pure noise it is infinite"
    )
    require(bounded, "sample.variance", settings.variance, finite)
    known = settings.variance != "learned" or denoise.variance is not None
    fixed = "small, large or diffusion: the model has learned no variance"
    require(known, "sample.variance", settings.variance, fixed)
    if settings.solver == adaptive.NAME:
        try:
            adaptive.check_control(adaptive.Control(), denoise)
        except ValueError as error:
            raise ConfigError(f"config.sample.solver: {error}") from None


def sampler(
    model: Model,
    settings: Sample,
    devices: Sequence[Any],
    churn: Any = None,
    guidance: Sequence[Guidance] = (),
    trajectory: bool = False,
) -> Images:
    """A compiled function (params, buffers, seeds, labels, constants, rows) -> images.

    seeds are [b], labels [b] or None, constants and rows those of `arrays`, images [b,h,w,c] in
    about [-1, 1]; those of a model with an autoencoder are decoded. With dopri5 it returns
    (images, network evaluations of each [b]).

    Args:
      model: what is sampled.
      settings: solver, steps, grid, sigma_min, sigma_max, rho, eta, clip, variance, rtol,
        atol of config.sample; of dopri5 the grids vp and ve name the variable, too.
      devices: b must be a multiple of their number; each samples its share.
      churn: of `sample`, where no method brings it.
      guidance: sampling methods; their constants and rows come with each call.
      trajectory: return a `sampler.Trajectory` behind the images. Its x0_hats are decoded, too; its
        states are those of the sampler.

    Raises:
      ConfigError: settings that do not fit the model; a trajectory of the released PNDM.
      ValueError: two owners of one part of guidance.
    """
    check_settings(settings, model)
    levels = noise_levels(model, settings)
    check_guidance(settings, guidance, churn)
    chooses = settings.solver == adaptive.NAME
    keeps = "another grid, such as ddim: the released PNDM does not keep its steps"
    require(not (trajectory and settings.grid == PNDM), "sample.grid", settings.grid, keeps)

    def images(
        params: PyTree,
        buffers: PyTree,
        seeds: Array,
        labels: Array | None,
        constants: PyTree,
        rows: PyTree,
    ) -> Any:
        latents, key = seed_noise(seeds, model.image_shape)
        labels = model.condition(buffers, labels)
        if settings.grid == PNDM:
            drawn = _pndm(model.eps(params, buffers), latents, labels, settings, model.table)
            return _pictures(model, buffers, drawn, 0, len(devices))  # in x_vp already
        if settings.grid in DISCRETE and settings.start == "vp":  # sample() multiplies by a level
            latents *= float(np.sqrt(1 + levels[0] ** -2))
        drawn: Any = sample(
            model.denoiser(params, buffers),
            latents,
            levels,
            solver=settings.solver,
            key=key,
            churn=churn,
            label=labels,
            guidance=bound(guidance, constants, rows),
            eta=settings.eta,
            clip=settings.clip,
            variance=None if settings.variance == "auto" else settings.variance,
            **settings.options,
            variable=adaptive.variable_of(settings.grid) if chooses else None,
            trajectory=trajectory,
            with_nfe=chooses,
        )
        drawn, *more = drawn if chooses or trajectory else (drawn,)
        drawn = _pictures(model, buffers, drawn, levels[-1], len(devices))
        if trajectory:
            seen = _pictures(model, buffers, more[0].x0_hats, 0, len(devices))
            more[0] = more[0]._replace(x0_hats=seen)
        return (drawn, *more) if more else drawn

    whole, divided = shardings(devices)
    images = platforms.traced_for(devices[0].platform, images)
    out = None if trajectory else divided  # images are not the first axis of a trajectory
    return jax.jit(
        images, in_shardings=(whole, whole, divided, divided, whole, divided), out_shardings=out
    )


def _pndm(eps: Any, latents: Array, labels: PyTree, settings: Sample, table: Any) -> Array:
    """The released S- or F-PNDM."""
    noise = lambda x, t: eps(x, t, labels)
    return discrete.pndm(noise, latents, settings.steps, table, ORDERS[settings.solver])


def bound(guidance: Sequence[Guidance], constants: PyTree, rows: PyTree) -> list[Guidance]:
    """Guidance with the arrays of a call."""
    found = zip(guidance, constants, rows, strict=True)
    return [dataclasses.replace(method, constants=c, rows=r) for method, c, r in found]


def _pictures(model: Model, buffers: PyTree, x: Array, last: float, devices: int) -> Array:
    """What people see of the last states [...,h,w,c]: where a level is left x_vp, as released;
    decoded.
    """
    x = x * float(process.vp_scale(last)) if last > 0 else x
    if model.autoencoder is None:
        return x
    flat = x.reshape(-1, *x.shape[-3:])
    seen = decode.decode(model.autoencoder, buffers[VAE], flat, decode.BATCH * devices)
    return seen.reshape(*x.shape[:-3], *seen.shape[1:])


def shardings(devices: Sequence[Any]) -> tuple[NamedSharding, NamedSharding]:
    """Where arrays lie: (whole on each device, their rows divided over the devices)."""
    mesh = Mesh(np.asarray(devices), (AXIS,))
    return NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, PartitionSpec(AXIS))


def check_guidance(settings: Sample, guidance: Sequence[Guidance], churn: Any = None) -> None:
    """Raises ValueError for guidance that does not fit the sampler or has two owners of a part."""
    check_parts(settings.solver, combine(guidance, churn), settings.eta)
    if settings.grid == PNDM and guidance:
        raise ConfigError(
            f"--guidance: {guidance[0].name} given with the grid 'pndm', which is a published "
            "sampler of its own; expected another grid, such as ddim"
        )


def arrays(guidance: Sequence[Guidance]) -> tuple[list[PyTree], list[PyTree]]:
    """(constants, rows) of each guidance: the last two arguments of a compiled sampler."""
    return [method.constants for method in guidance], [method.rows for method in guidance]


def generate(
    images: Images,
    params: PyTree,
    buffers: PyTree,
    seeds: np.ndarray,
    labels: PyTree,
    batch: int,
    guidance: Sequence[Guidance] = (),
    done: np.ndarray | None = None,
    counts: list[np.ndarray] | None = None,
) -> Iterator[np.ndarray]:
    """Yields images of all seeds, batch by batch; one compiled size serves all.

    Args:
      images: of `sampler`.
      params: the model's parameters.
      buffers: the model's buffers.
      seeds: [n], one an image.
      labels: [n] classes, tokens of texts (`Model.text`), or None.
      batch: images at a time, a multiple of the devices.
      guidance: as given to `sampler`; their rows follow the seeds.
      done: of `pending`; None draws all.
      counts: receives the evaluations of each batch's images, where the solver is dopri5.
    """
    seeds = np.asarray(seeds, np.uint32)
    constants, rows = arrays(guidance)
    for start in pending(np.zeros(len(seeds), bool) if done is None else done, batch):
        at = batch_rows(start, batch, len(seeds))
        classes, part = jax.tree.map(lambda leaf, at=at: np.asarray(leaf)[at], (labels, rows))
        drawn = images(params, buffers, seeds[at], classes, constants, part)
        if isinstance(drawn, tuple):
            drawn, count = drawn
            if counts is not None:
                counts.append(np.asarray(count)[: len(seeds) - start])
        yield np.asarray(drawn)[: len(seeds) - start]
