"""InceptionV3 as the Frechet Inception distance uses it, and two ways to bring images to its size.

The network of the TensorFlow archive inception-2015-12-05 as pytorch-fid 0.3.0 and torch-fidelity
0.4.0 rebuilt it (architecture: Szegedy et al., arXiv 1512.00567). It differs from torchvision's in
four places: average pools leave the padding out of the mean (Mixed_5b-5d, 6b-6e, 7b), the last
block pools the maximum, BatchNorm has epsilon 1e-3, and the head has 1,008 classes. Module names
are the checkpoint's.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from ogdm_jax.typing import Array

SIZE = 299
# Parallel branches of a block: each a chain of (name, channels, kernel height x width); stride-2
# layers end with "s".
_Layer = tuple[str, int, str]
Branch = tuple[_Layer, ...]


def _a(pool: int) -> tuple[Branch, ...]:
    return (
        (("branch1x1", 64, "1x1"),),
        (("branch5x5_1", 48, "1x1"), ("branch5x5_2", 64, "5x5")),
        (
            ("branch3x3dbl_1", 64, "1x1"),
            ("branch3x3dbl_2", 96, "3x3"),
            ("branch3x3dbl_3", 96, "3x3"),
        ),
        (("avg", 0, ""), ("branch_pool", pool, "1x1")),
    )


def _c(width: int) -> tuple[Branch, ...]:
    double = ("7x1", "1x7", "7x1", "1x7")
    return (
        (("branch1x1", 192, "1x1"),),
        (("branch7x7_1", width, "1x1"), ("branch7x7_2", width, "1x7"), ("branch7x7_3", 192, "7x1")),
        (
            ("branch7x7dbl_1", width, "1x1"),
            *(
                (f"branch7x7dbl_{i + 2}", width if i < 3 else 192, kernel)
                for i, kernel in enumerate(double)
            ),
        ),
        (("avg", 0, ""), ("branch_pool", 192, "1x1")),
    )


_B = (
    (("branch3x3", 384, "3x3s"),),
    (("branch3x3dbl_1", 64, "1x1"), ("branch3x3dbl_2", 96, "3x3"), ("branch3x3dbl_3", 96, "3x3s")),
    (("maxs", 0, ""),),
)
_D = (
    (("branch3x3_1", 192, "1x1"), ("branch3x3_2", 320, "3x3s")),
    (
        ("branch7x7x3_1", 192, "1x1"),
        ("branch7x7x3_2", 192, "1x7"),
        ("branch7x7x3_3", 192, "7x1"),
        ("branch7x7x3_4", 192, "3x3s"),
    ),
    (("maxs", 0, ""),),
)


def _e(pool: str) -> tuple[Branch, ...]:
    # "a|b": both layers see the same input and their outputs stand side by side.
    return (
        (("branch1x1", 320, "1x1"),),
        (("branch3x3_1", 384, "1x1"), ("branch3x3_2a|branch3x3_2b", 384, "1x3|3x1")),
        (
            ("branch3x3dbl_1", 448, "1x1"),
            ("branch3x3dbl_2", 384, "3x3"),
            ("branch3x3dbl_3a|branch3x3dbl_3b", 384, "1x3|3x1"),
        ),
        ((pool, 0, ""), ("branch_pool", 192, "1x1")),
    )


BLOCKS = {
    "Mixed_5b": _a(32),
    "Mixed_5c": _a(64),
    "Mixed_5d": _a(64),
    "Mixed_6a": _B,
    "Mixed_6b": _c(128),
    "Mixed_6c": _c(160),
    "Mixed_6d": _c(160),
    "Mixed_6e": _c(192),
    "Mixed_7a": _D,
    "Mixed_7b": _e("avg"),
    "Mixed_7c": _e("max"),
}


class FrozenNorm(nn.Module):
    """BatchNorm with stored statistics: (x - mean) / sqrt(var + epsilon) * scale + bias."""

    epsilon: float = 1e-3

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Of x [b, h, w, c], channel by channel."""
        width = (x.shape[-1],)
        scale = self.param("scale", nn.initializers.ones, width)
        bias = self.param("bias", nn.initializers.zeros, width)
        mean = self.variable("buffers", "mean", jnp.zeros, width).value
        var = self.variable("buffers", "var", jnp.ones, width).value
        factor = scale * jax.lax.rsqrt(var + self.epsilon)
        return x * factor[None, None, None] + (bias - mean * factor)[None, None, None]


class ConvNorm(nn.Module):
    """Convolution without bias, FrozenNorm, rectifier.

    Attributes:
      features: channels of the output.
      kernel: height and width such as "1x7"; "3x3s" has stride 2 and no padding.
      padded: "same" padding where the stride is 1.
    """

    features: int
    kernel: str
    padded: bool = True

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Maps x [b, h, w, c] to [b, h', w', features]."""
        height, width = (int(side) for side in self.kernel.rstrip("s").split("x"))
        stride = 2 if self.kernel.endswith("s") else 1
        x = nn.Conv(
            self.features,
            (height, width),
            (stride, stride),
            "SAME" if self.padded and stride == 1 else "VALID",
            use_bias=False,
            # a published FID is a float32 number; TF32 and bfloat16 shift it
            precision=jax.lax.Precision.HIGHEST,
            name="conv",
        )(x)
        return nn.relu(FrozenNorm(name="bn")(x))


class Mixed(nn.Module):
    """Parallel branches, concatenated."""

    branches: tuple[Branch, ...]

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Maps x [b, h, w, c] to [b, h', w', c'], the channels of all branches side by side."""
        outputs = []
        for branch in self.branches:
            h = x
            for name, features, kernel in branch:
                if not kernel:
                    h = _pool(h, name)
                    continue
                sides = [
                    ConvNorm(features, k, name=n)(h)
                    for n, k in zip(name.split("|"), kernel.split("|"), strict=True)
                ]
                h = jnp.concatenate(sides, -1) if len(sides) > 1 else sides[0]
            outputs.append(h)
        return jnp.concatenate(outputs, -1)


def _pool(x: Array, kind: str) -> Array:
    if kind == "avg":
        return nn.avg_pool(x, (3, 3), (1, 1), "SAME", count_include_pad=False)
    return (
        nn.max_pool(x, (3, 3), (2, 2), "VALID")
        if kind == "maxs"
        else nn.max_pool(x, (3, 3), (1, 1), "SAME")
    )


class InceptionV3(nn.Module):
    """FID's classifier of images, asked for its features.

    Attributes:
      num_classes: of the logits.
    """

    num_classes: int = 1008

    def __call__(self, x: Array) -> Array:
        """The features "pool3" [b, 2048] of x [b, h, w, 3], at least 75 x 75, about in [-1, 1]."""
        return self.features(x)["pool3"]

    @nn.compact
    def features(self, x: Array) -> dict[str, Array]:
        """All features of x, as `__call__`; under jit only those that are used are computed.

        Returns:
          Means over positions after the two stem pools and Mixed_6e ("64", "192", "768":
          torch-fidelity's names) and at the end ("pool3" [b, 2048]), "logits" [b, num_classes] and
          "logits_unbiased" (without the bias, as the Inception score of the TensorFlow graph takes
          them).

        Raises:
          ValueError: x has another shape or is smaller.
        """
        if x.ndim != 4 or x.shape[-1] != 3 or min(x.shape[1:3]) < 75:
            raise ValueError(f"x: shape {x.shape}; expected [b, h, w, 3] with h and w at least 75.")
        x = ConvNorm(32, "3x3s", name="Conv2d_1a_3x3")(x)
        x = ConvNorm(32, "3x3", padded=False, name="Conv2d_2a_3x3")(x)
        x = ConvNorm(64, "3x3", name="Conv2d_2b_3x3")(x)
        x = _pool(x, "maxs")
        taps = {"64": x.mean((1, 2))}
        x = ConvNorm(80, "1x1", name="Conv2d_3b_1x1")(x)
        x = ConvNorm(192, "3x3", padded=False, name="Conv2d_4a_3x3")(x)
        x = _pool(x, "maxs")
        taps["192"] = x.mean((1, 2))
        for name, branches in BLOCKS.items():
            x = Mixed(branches, name=name)(x)
            if name == "Mixed_6e":
                taps["768"] = x.mean((1, 2))
        taps["pool3"] = x.mean((1, 2))
        head = nn.Dense(
            self.num_classes, use_bias=False, precision=jax.lax.Precision.HIGHEST, name="fc"
        )
        taps["logits_unbiased"] = head(taps["pool3"])
        bias = self.param("fc_bias", nn.initializers.zeros, (self.num_classes,))
        taps["logits"] = taps["logits_unbiased"] + bias[None]
        return taps


def _lerp(x: Array, axis: int, size: int, half_pixel: bool) -> Array:
    length = x.shape[axis]
    position = np.arange(size) * (length / size)
    if half_pixel:
        position = np.maximum((np.arange(size) + 0.5) * (length / size) - 0.5, 0)
    low = np.floor(position).astype(np.int32)
    high = np.minimum(low + 1, length - 1)
    shape = [1] * x.ndim
    shape[axis] = size
    fraction = (position - low).astype(np.float32).reshape(shape)
    below = jnp.take(x, low, axis=axis)
    return below + (jnp.take(x, high, axis=axis) - below) * fraction


def resize(images: Array, size: int = SIZE, half_pixel: bool = False) -> Array:
    """Bilinear resizing [b, h, w, c] -> [b, size, size, c] without antialiasing.

    The two ways give different FIDs for the same images.

    Args:
      images: [b, h, w, c].
      size: side of the result.
      half_pixel: False: output i samples input i * h / size, TensorFlow 1's resize_bilinear
        (align_corners=False) and the way of the original FID, of NVIDIA's detector and of
        torch-fidelity. True: it samples (i + 1/2) h / size - 1/2, PyTorch's interpolate and the way
        of pytorch-fid.
    """
    return _lerp(_lerp(images.astype(jnp.float32), 1, size, half_pixel), 2, size, half_pixel)


def prepare(images: Array, route: str = "tf") -> Array:
    """The network's input [b, 299, 299, 3] of uint8 images [b, h, w, 1 or 3]; grey is repeated.

    Args:
      images: [b, h, w, 1 or 3] in [0, 255].
      route: "tf": TensorFlow-1 resize, then (v - 128) / 128 (original FID, EDM, StyleGAN).
        "pytorch_fid": v / 255, half-pixel resize, then 2 v - 1.

    Raises:
      ValueError: an unknown route, or another shape.
    """
    if route not in ("tf", "pytorch_fid"):
        raise ValueError(f"route: '{route}'; expected 'tf' or 'pytorch_fid'.")
    if images.ndim != 4 or images.shape[-1] not in (1, 3):
        raise ValueError(f"images: shape {images.shape}; expected [b, h, w, 1 or 3].")
    images = jnp.broadcast_to(images, (*images.shape[:3], 3))
    if route == "tf":
        return (resize(images) - 128) / 128
    return 2 * resize(images.astype(jnp.float32) / 255, half_pixel=True) - 1
