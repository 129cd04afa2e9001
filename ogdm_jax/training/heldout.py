"""The loss of images that are never trained on, and of as many that are, under the same draws."""

import dataclasses
import hashlib
import logging
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ogdm_jax import data, latents, platforms, randomness
from ogdm_jax.config import Config, ConfigError, replace
from ogdm_jax.data import identity, moments
from ogdm_jax.diffusion.noise import NoiseDistribution
from ogdm_jax.models import Model
from ogdm_jax.pixels import to_float
from ogdm_jax.training import run as runs
from ogdm_jax.training import texts
from ogdm_jax.training.workdir import open_source
from ogdm_jax.typing import Array, PyTree

_BATCH = 256
_LOG = logging.getLogger("ogdm_jax")


class HeldOut:
    """Measures the weighted squared error of a model, without dropout and augmentation.

    Every image has one noise level and one noise, drawn from a fixed key and its number alone: from
    evaluation to evaluation, and from run to run of one noise distribution, only the model differs.
    Image i of both sets has the same draws, whose luck would else be taken for what is known by
    heart: the loss of a level is many times that of another.
    """

    def __init__(self, run: runs.DenoiserRun) -> None:
        """Opens the images of config.data.heldout; errors are those of `open_images`."""
        config, trained = run.config, run.source
        found = open_images(config, trained, bool(run.model.label_dim))
        if run.tokenizer is not None:
            texts.check_source(found, "data.heldout")
            found = texts.tokenised(found, run.tokenizer)
        num = min(config.evaluate.heldout or len(found), len(found))
        self._sets = {"loss": _take(found, num), "train": _take(trained, num)}
        assert run.noise is not None, "a denoiser's run has a noise distribution"
        # an image's level is its own: strata would tie it to the others of its batch
        levels = dataclasses.replace(run.noise, stratified=False)
        loss, platform = _loss_of(run.model, levels), run.plan.local_devices[0].platform
        self._loss = jax.jit(platforms.traced_for(platform, loss))

    def __call__(self, params: PyTree, buffers: PyTree) -> dict[str, float]:
        """{"heldout/loss", "heldout/train"}: means over the held-out images, and over as many that
        are trained on; the difference is what the model knows by heart.
        """
        found = {}
        for name, batch in self._sets.items():
            parts = []
            for start in range(0, len(batch["row"]), _BATCH):
                at = np.arange(start, start + _BATCH) % len(batch["row"])  # one size is compiled
                part = {key: value[at] for key, value in batch.items()}
                parts.append(np.asarray(self._loss(params, buffers, part)))
            values = np.concatenate(parts)[: len(batch["row"])]
            found[f"heldout/{name}"] = float(values.mean(dtype=np.float64))
        return found


def open_images(config: Config, trained: data.Source, classes: bool) -> data.Source:
    """The images of config.data.heldout. classes: whether they must have those of `trained`.

    Raises:
      ConfigError: they cannot be opened, are those that are trained on, or of another size or other
        classes.
    """
    name = config.data.heldout
    try:
        found = open_source(replace(config, {"data.source": name}))
    except data.SourceError as error:
        raise ConfigError(f"config.data.heldout: {error}") from None
    _check(name, trained, found, classes)
    return found


def _loss_of(model: Model, noise: NoiseDistribution) -> Any:
    def loss(params: PyTree, buffers: PyTree, batch: dict[str, Array]) -> Array:
        """lambda(sigma) |x0_hat - x0|^2 summed over pixels [b], of {"image", "label", "row"}."""
        keys = lambda purpose: randomness.example_keys(randomness.seeded(0), purpose, batch["row"])
        sigma = noise.sample(keys("heldout sigma"))
        if model.latents is None:
            x0 = to_float(batch["image"])
        else:
            x0 = moments.draw(model.latents, batch["image"], keys("heldout latent"))
        xt = x0 + sigma[:, None, None, None] * randomness.normal(keys("heldout"), x0.shape[1:])
        label = batch["label"] if model.label_dim else None
        if model.text is not None:
            label = model.condition(buffers, {"prompt": batch["label"]})
        x0_hat = model.denoiser(params, buffers)(xt, sigma, label)
        return noise.weight(sigma) * jnp.sum(jnp.square(x0_hat - x0), axis=(1, 2, 3))

    return loss


def _take(source: data.Source, num: int) -> dict[str, np.ndarray]:
    """So many images, spread evenly over a set, with the numbers from 0 of their draws."""
    rows = data.spread(len(source), num)
    return source.take(rows) | {"row": np.arange(len(rows), dtype=np.int32)}


def _check(name: str, trained: data.Source, found: data.Source, classes: bool) -> None:
    """Raises ConfigError for images that cannot be held out of a run."""
    field = f"config.data.heldout: {name!r}"
    if found.shape != trained.shape:
        raise ConfigError(
            f"{field} has images of {found.shape}, those trained on are {trained.shape} (height, "
            "width, channels); expected one shape (data.resolution and data.channels make it)"
        )
    differs = latents.difference(trained.latents, found.latents, ("moments", "scaled"))
    if differs:
        raise ConfigError(
            f"{field} holds other numbers than data.source ({differs}); expected both alike"
        )
    labels = [(s.num_classes, s.label_size, s.class_names) for s in (found, trained)]
    if classes and labels[0] != labels[1]:
        raise ConfigError(f"{field} has other classes than data.source; expected the same")
    same = not identity.difference(data.fingerprint(trained), data.fingerprint(found))
    repeated = 0 if same else _repeated(trained, found)
    if same or repeated > len(found) // 2:
        what = (
            "are the training set itself"
            if same
            else (f"has {repeated} of {len(found)} images in the training set")
        )
        raise ConfigError(
            f"{field}: these {what}; expected images that are never trained on, such as another "
            "split: digits/train and digits/test, tfds:NAME/train and tfds:NAME/test"
        )
    if repeated:
        _LOG.warning(
            "data.heldout: %d of %d images of %r are in the training set, too",
            *(repeated, len(found), name),
        )


def _repeated(trained: data.Source, found: data.Source) -> int:
    """How many images of `found` are also trained on, where both are in memory; else 0."""
    if trained.images is None or found.images is None:
        return 0
    digest = lambda image: hashlib.blake2b(image.tobytes(), digest_size=16).digest()
    known = set(map(digest, trained.images))  # not the images: they may take half of the memory
    return sum(digest(image) in known for image in found.images)
