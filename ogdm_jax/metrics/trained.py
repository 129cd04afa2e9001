"""Features of a small classifier, trained at first use on the labels of a source.

A distance needs features that react to what makes an image wrong. Random weights do not (noise and
blur move their Frechet distance by less than its spread), and Inception's weights need a file and
say little about 8x8 digits. A small convolutional classifier of the user's own labels takes seconds
and reacts to noise, blur, shifts and missing classes.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ogdm_jax.brief import brief
from ogdm_jax.pixels import to_float
from ogdm_jax.typing import Array, PyTree

HIDDEN = 64
MOST_IMAGES = 20_000  # a random subset of larger sources: the classifier is no better for more
BATCH = 128


@dataclasses.dataclass(frozen=True, eq=False)
class TrainedFeatures:
    """A function uint8 images [n,h,w,c] -> float32 features [n, dim].

    The features are the mean over positions of every convolution's output (texture: noise, blur)
    and the hidden layer before its rectifier (content: classes), each shifted and scaled to mean 0,
    spread 1 over the training images. A feature that hardly varies is scaled by a tenth of the
    median spread instead, or rare activations would outweigh all others.

    Attributes:
      name: of the Frechet distance taken in it.
      image_shape: (h, w, c).
      num_classes: of the classifier.
      accuracy: on the training images.
      params: of the classifier.
      mean: of the raw features over the training images.
      spread: what they are divided by.
      classes: the labels that it was trained on, in the order of its probabilities.
      class_names: of the source, by label, where known.
      trained_on: digest of the images and labels, where known; spaces may share a name.
    """

    name: str
    image_shape: tuple[int, int, int]
    num_classes: int
    accuracy: float
    params: PyTree
    mean: np.ndarray
    spread: np.ndarray
    classes: np.ndarray
    class_names: tuple[str, ...] = ()
    trained_on: str = ""
    __repr__ = brief

    @property
    def dim(self) -> int:
        """Features of an image."""
        return len(self.mean)

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """The features [n, dim]."""
        return self.both(images)[0]

    def both(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(features [n, dim], class probabilities [n, num_classes]) from one pass."""
        images = np.asarray(images)
        if images.dtype != np.uint8 or images.shape[1:] != self.image_shape:
            shape = f"{images.dtype} {images.shape}"
            raise ValueError(
                f"images: {shape}; {self.name} expects uint8 [n, "
                f"{', '.join(map(str, self.image_shape))}]."
            )
        raw, probabilities = _extract(self.params, images)
        return (raw - self.mean[None]) / self.spread[None], probabilities


def train_features(
    name: str,
    images: np.ndarray,
    labels: np.ndarray,
    seed: int | np.random.Generator = 0,
    steps: int | None = None,
) -> TrainedFeatures:
    """Trains the classifier.

    A convolution with 32 channels, then stride-2 convolutions with 64 down to 4 x 4, a hidden layer
    of 64, softmax. AdamW, cosine learning rate from 2e-3, batches of 128 in shuffled passes. All
    draws come from `seed` and the work is done on the CPU, so the same machine gives the same
    features again and an accelerator changes nothing.

    Args:
      name: of the space.
      images: uint8 [n,h,w,c].
      labels: integers [n]; images with -1 are left out.
      seed: of the weights and the batches; a generator goes on where it stands.
      steps: of training; None takes about 20 passes, 200 to 400 steps.

    Raises:
      ValueError: fewer than two classes or too few images, or the classifier did not learn to tell
        the classes apart (its features would be little better than random ones).
    """
    rng = np.random.default_rng(seed)
    images, targets, known = _labelled(images, labels, rng)
    classes = len(known)
    if classes < 2 or len(images) < 10 * classes:
        found = f"{len(images)} labelled images of {classes} classes"
        raise ValueError(
            f"labels: {found}; features need at least 2 classes and 10 images of each."
        )
    if steps is None:
        steps = int(np.clip(20 * len(images) / BATCH, 200, 400))
    with jax.default_device(_cpu()):
        params = _fit(rng, images, targets, classes, steps)
    features, probabilities = _extract(params, images)
    accuracy = float((probabilities.argmax(1) == targets).mean())
    most_common = float(np.bincount(targets).max() / len(targets))
    if accuracy < most_common + 0.25 * (1 - most_common):
        right = (
            f"the classifier is right on {accuracy:.0%} after {steps} steps, guessing is on "
            f"{most_common:.0%}"
        )
        raise ValueError(f"{name}: {right}; expected labels that the pixels tell.")
    spread = features.std(0)
    spread = np.maximum(spread, 0.1 * max(float(np.median(spread)), 1e-6))
    return TrainedFeatures(
        name, images.shape[1:], classes, accuracy, params, features.mean(0), spread, known
    )


def some_rows(rows: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The rows, in order; of more than MOST_IMAGES so many at random."""
    if len(rows) <= MOST_IMAGES:
        return rows
    return np.sort(rng.choice(rows, MOST_IMAGES, replace=False))


def _labelled(
    images: np.ndarray, labels: np.ndarray, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(images, int32 numbers of their classes from 0, the label of each class) of at most
    MOST_IMAGES that have a label.
    """
    images, labels = np.asarray(images), np.asarray(labels)
    if images.dtype != np.uint8 or images.ndim != 4 or len(images) == 0:
        raise ValueError(f"images: {images.dtype} {images.shape}; expected uint8 [n, h, w, c].")
    if labels.shape != (len(images),) or not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(
            f"labels: {labels.dtype} {labels.shape}; expected integers [{len(images)}], one an "
            "image."
        )
    rows = some_rows(np.flatnonzero(labels >= 0), rng)
    known, numbers = np.unique(labels[rows], return_inverse=True)
    return images[rows], numbers.astype(np.int32), known


def _cpu() -> Any:
    """The device that trains."""
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError:  # the user allowed an accelerator only
        return jax.local_devices()[0]


def _strides(size: int) -> list[int]:
    strides = [1 if size <= 8 else 2]
    size = -(-size // strides[0])
    while size > 4:
        strides.append(2)
        size = -(-size // 2)
    return strides


def _init(rng: np.random.Generator, shape: tuple[int, int, int], classes: int) -> PyTree:
    def layer(*dims: int) -> dict[str, np.ndarray]:
        weight = rng.normal(size=dims) * np.sqrt(2 / np.prod(dims[:-1]))
        return {"weight": weight.astype(np.float32), "bias": np.zeros(dims[-1], np.float32)}

    height, width, channels = shape
    convolutions = []
    for i, stride in enumerate(_strides(max(height, width))):
        convolutions.append(layer(3, 3, channels, min(32 * 2**i, 64)))
        channels = convolutions[-1]["bias"].shape[0]
        height, width = -(-height // stride), -(-width // stride)
    hidden, out = layer(height * width * channels, HIDDEN), layer(HIDDEN, classes)
    return {"convolutions": convolutions, "hidden": hidden, "out": out}


def _forward(params: PyTree, images: Array) -> tuple[Array, Array]:
    """uint8 images -> (raw features, logits)."""
    x = jnp.asarray(to_float(images))
    pooled = []
    for stride, layer in zip(_strides(max(images.shape[1:3])), params["convolutions"], strict=True):
        x = jax.lax.conv_general_dilated(
            x, layer["weight"], (stride, stride), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        x = jax.nn.relu(x + layer["bias"][None, None, None])
        pooled.append(x.mean((1, 2)))
    hidden = x.reshape(len(x), -1) @ params["hidden"]["weight"] + params["hidden"]["bias"][None]
    logits = jax.nn.relu(hidden) @ params["out"]["weight"] + params["out"]["bias"][None]
    return jnp.concatenate([*pooled, hidden], axis=1), logits


def _fit(
    rng: np.random.Generator, images: np.ndarray, labels: np.ndarray, classes: int, steps: int
) -> PyTree:
    optimiser = optax.adamw(optax.cosine_decay_schedule(2e-3, steps), weight_decay=1e-2)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params: PyTree, state: PyTree, x: Array, y: Array) -> tuple[PyTree, PyTree]:
        def loss(params: PyTree) -> Array:
            return optax.softmax_cross_entropy_with_integer_labels(_forward(params, x)[1], y).mean()

        updates, state = optimiser.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    params = jax.tree.map(jnp.asarray, _init(rng, images.shape[1:], classes))
    state = optimiser.init(params)
    batch = min(BATCH, len(images))
    order = np.empty(0, np.int64)
    for _ in range(steps):
        if len(order) < batch:
            order = rng.permutation(len(images))  # the rest of a pass is dropped
        rows, order = order[:batch], order[batch:]
        params, state = step(params, state, images[rows], labels[rows])
    return jax.tree.map(np.asarray, params)


@jax.jit
def _features_and_probabilities(params: PyTree, images: Array) -> tuple[Array, Array]:
    features, logits = _forward(params, images)
    return features, jax.nn.softmax(logits)


def _extract(params: PyTree, images: np.ndarray, batch: int = 512) -> tuple[np.ndarray, np.ndarray]:
    """In batches of one shape (the last one padded), so that any number of images compiles once."""
    if len(images) == 0:
        raise ValueError("images: none; expected at least one image.")
    parts = []
    with jax.default_device(_cpu()):
        for i in range(0, len(images), batch):
            rows = images[i : i + batch]
            padded = np.pad(rows, [(0, batch - len(rows)), (0, 0), (0, 0), (0, 0)])
            parts.append(jax.device_get(_features_and_probabilities(params, padded)))
    features, probabilities = (np.concatenate(a)[: len(images)] for a in zip(*parts))
    return features, probabilities
