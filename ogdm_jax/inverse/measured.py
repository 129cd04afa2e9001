"""Measurements: made of clean images, seen by guidance, and what is judged of the images that come
back.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ogdm_jax import randomness
from ogdm_jax.brief import brief
from ogdm_jax.inverse import degradations, operators
from ogdm_jax.inverse.operators import Loss, Operator
from ogdm_jax.inverse.tasks import Settings, Task
from ogdm_jax.metrics import distances
from ogdm_jax.networks import AutoencoderKL
from ogdm_jax.pixels import check_floats, check_range
from ogdm_jax.sampling import generate
from ogdm_jax.sampling.decode import decode
from ogdm_jax.typing import Array, PyTree

_AT_A_TIME = 32  # images that are measured or judged in one call


@dataclasses.dataclass(frozen=True, eq=False)
class Measured:
    """Measurements of a batch of images, as a sampling method sees them.

    Attributes:
      task: its name.
      operator: A of y = A(x0) + noise.
      y: [B,...] measurements.
      noise: standard deviation of the Gaussian noise on y, images in [-1, 1]; 0 of an example.
      poisson: counts per grey level of Poisson noise instead; 0: none.
      least: smallest `std`; of an example, which has no noise, the unit of its `energy`.
    """

    task: str
    operator: Operator
    y: Array
    noise: float
    poisson: float = 0.0
    least: float = 1e-3
    __repr__ = brief

    @property
    def std(self) -> Array | float:
        """Noise of y's numbers: a number, or like y for Poisson noise; at least `least`."""
        if self.poisson:
            return degradations.poisson_std(self.y, self.poisson)
        return max(self.noise, self.least)

    @property
    def loss_unit(self) -> float:
        """Noise of the residuals in `loss`, which for Poisson noise are divided by it; 0: none."""
        return 1.0 if self.poisson else self.noise

    def loss(self, squared: bool = True) -> Loss:
        """`operators.measurement_loss`: x0_hat -> ||y - A(x0_hat)||^2 [B]; residuals of Poisson
        noise are divided by it. squared: False for the norm.
        """
        std = self.std if self.poisson else None
        return operators.measurement_loss(self.operator, self.y, squared, std)

    def energy(self) -> Loss:
        """x0_hat -> ||(y - A(x0_hat)) / std||^2 / 2 [B]: -log p(y | x0_hat) but for a constant."""
        loss = operators.measurement_loss(self.operator, self.y, True, self.std)
        return lambda x0_hat: loss(x0_hat) / 2


@dataclasses.dataclass(frozen=True)
class Restoration:
    """Measured images, and the judgement of what comes back.

    Attributes:
      task: what was measured.
      settings: how.
      seeds: [n] of the images.
      images: [n,H,W,C] inputs in [-1, 1]; None where only measurements are known.
      drawn: what `task.draw` gave: a row per image.
      y: [n,...] measurements.
      names: [n] of the pictures.
      about: where they are from, for a report.
      coder, decoder: autoencoder and its weights, where guidance sees latents.
    """

    task: Task
    settings: Settings
    seeds: np.ndarray
    images: np.ndarray | None
    drawn: PyTree
    y: np.ndarray
    names: np.ndarray | None = None
    about: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    coder: AutoencoderKL | None = None
    decoder: PyTree = None

    def take(self, rows: np.ndarray) -> "Restoration":
        """Some of the measurements; a row may come several times."""
        kept = {name: getattr(self, name) for name in ("seeds", "images", "drawn", "y", "names")}
        kept = jax.tree.map(lambda leaf: np.asarray(leaf)[rows], kept)
        return dataclasses.replace(self, **kept)

    @property
    def rows(self) -> PyTree:
        """The arrays that guidance receives, a row per image."""
        return {"drawn": self.drawn, "y": self.y}

    def measured(self, rows: PyTree, weights: PyTree = None) -> Measured:
        """The measurements of a batch: some of `rows`; weights: of `Task.made`."""
        operator = self.task.made(rows["drawn"], weights)
        noise, poisson = self.settings.noise, self.settings.poisson
        if not self.task.restores:
            return Measured(self.task.name, operator, rows["y"], 0.0, least=noise)
        return Measured(self.task.name, operator, rows["y"], noise, poisson)

    @property
    def weights(self) -> PyTree:
        """The arrays that guidance receives for all images: of `guided`."""
        own = self.task.weights
        return own if self.coder is None else {"task": own, "decoder": self.decoder}

    def guided(self, rows: PyTree, weights: PyTree) -> Measured:
        """`measured` as guidance sees it: of latents, whose decoder's activations are computed
        anew for the gradient.
        """
        if self.coder is None:
            return self.measured(rows, weights)
        coder, found = dataclasses.replace(self.coder, remat=True), weights["task"]
        pictures = lambda z: decode(coder, weights["decoder"], z, None)
        measured = self.measured(rows, found)
        return dataclasses.replace(measured, operator=measured.operator.after(pictures))

    def judge(self, restored: np.ndarray) -> dict[str, np.ndarray]:
        """Figures per image: PSNR and SSIM of images clipped to [-1, 1] (where there is a truth),
        residuals, and the share of hidden pixels.

        residual_ratio = ||y - A x0|| / (noise sqrt(m)), about 1 where x0 explains y and not its
        noise (absent without noise); residual = ||y - A x0|| / sqrt(m). Where the input is an
        example: distance = ||y - A x0|| / ||y||.
        """
        parts = [self.take(at)._judge(np.asarray(restored)[at]) for at in _parts(len(restored))]
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    def _judge(self, restored: np.ndarray) -> dict[str, np.ndarray]:
        measured, y = self.measured(self.rows), jnp.asarray(self.y)
        x0 = jnp.asarray(restored, jnp.float32)
        if not self.task.restores:
            miss = operators.measurement_loss(measured.operator, y, squared=False)(x0)
            size = jnp.sqrt(jnp.sum(jnp.square(y).reshape(len(y), -1), axis=1))
            return {"distance": np.asarray(miss / size)}
        figures = {}
        if self.images is not None:
            clipped = np.clip(restored, -1, 1)
            figures["psnr"] = np.asarray(distances.psnr(clipped, self.images))
            if min(restored.shape[1:3]) >= 11:
                of_papers = ((clipped + 1) / 2, (self.images + 1) / 2, 1.0)
                figures["ssim"] = np.asarray(distances.ssim(*of_papers))
        ratio = lambda std: np.asarray(operators.residual_ratio(measured.operator, y, x0, std))
        if measured.loss_unit:
            figures["residual_ratio"] = ratio(measured.std)
        figures["residual"] = ratio(1.0)
        if measured.operator.hide is not None:
            seen = np.asarray(measured.operator.count(y))
            figures["hidden"] = 1 - seen / np.prod(y.shape[1:])
        return figures


def _parts(n: int) -> list[np.ndarray]:
    """The rows of n images, so many at a time that a network's activations have room."""
    starts = range(0, max(n, 1), _AT_A_TIME)
    return [np.arange(start, min(start + _AT_A_TIME, n)) for start in starts]


def measure(task: Task, settings: Settings, images: np.ndarray, seeds: np.ndarray) -> Restoration:
    """Measures images [n,H,W,C] in [-1, 1]: one draw of masks and noise, each from its image's
    seed.

    Raises:
      ValueError: images of integers, or far outside [-1, 1].
    """
    images = np.asarray(images)
    check_floats(images.dtype)
    check_range(images)
    images, seeds, drawn = images.astype(np.float32), np.asarray(seeds), task.draw(seeds)

    def noisy(at: np.ndarray) -> np.ndarray:
        operator = task.made(jax.tree.map(lambda leaf: leaf[at], drawn))
        keys = randomness.fold_in_each(
            generate.seed_keys(jnp.asarray(seeds[at], jnp.uint32)), "measurement"
        )
        y = operator.forward(jnp.asarray(images[at]))
        if task.restores and settings.poisson:
            y = degradations.poisson_noise(keys, y, settings.poisson)
        elif task.restores and settings.noise:
            y = degradations.gaussian_noise(keys, y, settings.noise)
        return np.asarray(y if operator.hide is None else operator.hide(y))

    y = np.concatenate([noisy(at) for at in _parts(len(images))])
    return Restoration(task, settings, seeds, images, drawn, y)


def taken(task: Task, settings: Settings, y: np.ndarray, seeds: np.ndarray) -> Restoration:
    """Measurements y [n,...] of which nobody knows the image, as they are."""
    drawn = task.draw(seeds)
    hide = task.made(drawn).hide
    y = np.asarray(y if hide is None else hide(jnp.asarray(y)), np.float32)
    return Restoration(task, settings, np.asarray(seeds), None, drawn, y)
