"""The loss of DG's discriminator: binary cross entropy on noisy real and noisy generated images."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ogdm_jax import randomness
from ogdm_jax.config import Config
from ogdm_jax.data import Source, augment, moments
from ogdm_jax.discriminator.network import ratio_of
from ogdm_jax.discriminator.pairs import paired
from ogdm_jax.discriminator.settings import of
from ogdm_jax.latents import Latents
from ogdm_jax.methods import dg
from ogdm_jax.networks.feature_discriminator import FeatureDiscriminator
from ogdm_jax.pixels import to_float
from ogdm_jax.sampling import generate
from ogdm_jax.training.example import Batch
from ogdm_jax.training.gradients import sums
from ogdm_jax.typing import Array, LogRatio, PyTree

_BATCH = 256  # held-out images of either side at a time


def cross_entropy(logit: Array, real: Array) -> tuple[Array, Array]:
    """Binary cross entropy of each example, d = sigmoid(logit).

    Args:
      logit: [B].
      real: [B], 1 for real images and 0 for generated ones.

    Returns:
      (-log d where real is 1 and -log(1 - d) where it is 0, 1 where the logit's sign is right and
      else 0), [B] each.
    """
    value = optax.sigmoid_binary_cross_entropy(logit, real.astype(logit.dtype))
    return value, ((logit > 0) == (real == 1)).astype(logit.dtype)


def training_loss(
    config: Config, network: FeatureDiscriminator, xflip: bool, latents: Latents | None = None
) -> Callable[..., tuple[Array, Any]]:
    """loss(params, state, constants, batch, key) -> (mean loss, sums of metrics) for the step.

    arXiv 2211.17091, equation of L_phi with lambda(t) = g^2 / s^2 as the density of noise levels.

    Args:
      config: of a discriminator.
      network: the discriminator.
      xflip: whether the prior was trained on mirrored images, too. Then real images are mirrored at
        random.
      latents: what the images are, where they are no pixels.
    """

    def loss(
        params: PyTree, state: Any, constants: PyTree, batch: Batch, key: Array
    ) -> tuple[Array, Any]:
        keys = lambda purpose: randomness.example_keys(key, purpose, batch["index"])
        image = _images(latents, batch, keys, xflip)
        ratio = ratio_of(network, of(config).clock, 0.0, keys("dropout"))
        ratio = ratio({"params": params, "extractor": constants["dg"]["extractor"]})
        value, right = _noisy_cross_entropy(config, ratio, image, batch, key)
        return jnp.mean(value), sums({"loss": value, "accuracy": right})

    return loss


def _images(
    latents: Latents | None, batch: Batch, keys: Callable[[str], Array], xflip: bool
) -> Array:
    """Images in [-1, 1], or samples of latents; real ones are mirrored, or of the mirrored view, at
    random where xflip says so.
    """
    flip = augment.flipped(keys("xflip")) & (batch["real"] == 1) if xflip else None
    if latents is not None:
        return moments.draw(latents, batch["image"], keys("latent"), flip)
    image = to_float(batch["image"])
    return image if flip is None else jnp.where(flip[:, None, None, None], image[:, :, ::-1], image)


def _noisy_cross_entropy(
    config: Config, ratio: LogRatio, image: Array, batch: Batch, key: Array
) -> tuple[Array, Array]:
    """`cross_entropy` of a log ratio at x = image + sigma eps; each example draws its own sigma and
    eps from the key.
    """
    settings = of(config)
    keys = lambda purpose: randomness.example_keys(key, purpose, batch["index"])
    u = randomness.uniform(keys("sigma"))
    sigma = dg.training_sigma(u, settings.t_min, settings.importance)
    x = image + sigma[:, None, None, None] * randomness.normal(keys("noise"), image.shape[1:])
    return cross_entropy(ratio(x, sigma, batch["label"]), batch["real"])


class HeldOut:
    """Loss and accuracy on images that were not trained on, at the same noise every time.

    Sides of different lengths are cut to the shorter one.
    """

    def __init__(
        self,
        config: Config,
        network: FeatureDiscriminator,
        extractor: PyTree,
        sides: tuple[Source, Source],
    ) -> None:
        """Takes the params of the extractor (or None), and the real and the generated images."""
        self._extractor, self._sides = extractor, sides

        def values(params: PyTree, extractor: PyTree, batch: Batch) -> tuple[Array, Array]:
            ratio = ratio_of(network, of(config).clock, 0.0)
            ratio = ratio({"params": params, "extractor": extractor})
            keys = lambda purpose: randomness.example_keys(
                randomness.seeded(0), purpose, batch["index"]
            )
            image = _images(sides[0].latents, batch, keys, False)
            return _noisy_cross_entropy(config, ratio, image, batch, randomness.seeded(0))

        self._values = jax.jit(values)

    def __call__(self, params: PyTree) -> dict[str, float]:
        """{"held_out/loss", "held_out/accuracy"} of the head's parameters."""
        totals = []
        count = min(map(len, self._sides))
        for start in range(0, count, _BATCH):
            rows = generate.batch_rows(start, _BATCH, count)
            real, generated = (source.take(rows) for source in self._sides)
            index = (start + np.arange(_BATCH)).astype(np.int32)
            sides = real | {"index": index}, generated | {"index": index}
            pair = paired(*sides, self._sides[0].latents)
            values = self._values(params, self._extractor, pair)
            totals.append([np.asarray(v)[: 2 * min(_BATCH, count - start)] for v in values])
        loss, right = (np.concatenate(parts).mean() for parts in zip(*totals, strict=True))
        return {"held_out/loss": float(loss), "held_out/accuracy": float(right)}
