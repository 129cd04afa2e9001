"""EfficientNet-Lite0, the ImageNet classifier whose weights a Python package ships (`fd_lite0`).

Architecture: EfficientNet-B0 (Tan and Le, arXiv 1905.11946, table 1) without squeeze-and-excitation
and with ReLU6, as tensorflow/tpu's efficientnet/lite publishes it. Module names are the PyTorch
checkpoint's, dots as underscores.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from ogdm_jax.networks.convolution import depthwise
from ogdm_jax.networks.inception import FrozenNorm
from ogdm_jax.typing import Array

# kernel, stride of the first block, expansion, channels, blocks
_STAGES = (
    (3, 1, 1, 16, 1),
    (3, 2, 6, 24, 2),
    (5, 2, 6, 40, 2),
    (3, 2, 6, 80, 3),
    (5, 1, 6, 112, 3),
    (5, 2, 6, 192, 4),
)
_LAST = (3, 1, 6, 320, 1)
# of ImageNet in [0, 1]: what the weights were trained on
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)


def _conv(features: int, kernel: int, stride: int, name: str) -> nn.Conv:
    size, strides, highest = (kernel, kernel), (stride, stride), jax.lax.Precision.HIGHEST
    return nn.Conv(features, size, strides, "SAME", use_bias=False, precision=highest, name=name)


class Depthwise(nn.Module):
    """One filter for each channel, kernel x kernel pixels."""

    kernel: int
    stride: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Maps x [b, h, w, c] to [b, h / stride, w / stride, c]."""
        shape = self.kernel, self.kernel, 1, x.shape[-1]
        return depthwise(
            x, self.param("kernel", nn.initializers.lecun_normal(), shape), self.stride
        )


class InvertedResidual(nn.Module):
    """Widen by 1x1, filter each channel, narrow by 1x1; added to the input where the shapes
    allow.

    Attributes:
      features: channels of the output.
      kernel: side of the channels' filters.
      stride: of the filters.
      expansion: width between, as a multiple of the input's.
    """

    features: int
    kernel: int
    stride: int
    expansion: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Maps x [b, h, w, c] to [b, h / stride, w / stride, features]."""
        h, width = x, x.shape[-1] * self.expansion
        if self.expansion > 1:
            h = nn.relu6(FrozenNorm(name="_bn0")(_conv(width, 1, 1, "_expand_conv")(h)))
        h = nn.relu6(
            FrozenNorm(name="_bn1")(Depthwise(self.kernel, self.stride, name="_depthwise_conv")(h))
        )
        h = FrozenNorm(name="_bn2")(_conv(self.features, 1, 1, "_project_conv")(h))
        return x + h if h.shape == x.shape else h


class EfficientNetLite0(nn.Module):
    """The whole network. Attributes: num_classes of the logits."""

    num_classes: int = 1000

    @nn.compact
    def __call__(self, x: Array) -> tuple[Array, Array]:
        """(features [b, 1280], logits [b, 1000]) of x [b, h, w, 3], normalised by MEAN and STD."""
        x = nn.relu6(FrozenNorm(name="_bn0")(_conv(32, 3, 2, "_conv_stem")(x)))
        index = 0
        for kernel, stride, expansion, features, blocks in (*_STAGES, _LAST):
            for i in range(blocks):
                block = InvertedResidual(
                    features, kernel, stride if i == 0 else 1, expansion, name=f"_blocks_{index}"
                )
                x = block(x)
                index += 1
        x = nn.relu6(FrozenNorm(name="_bn1")(_conv(1280, 1, 1, "_conv_head")(x))).mean((1, 2))
        return x, nn.Dense(self.num_classes, precision=jax.lax.Precision.HIGHEST, name="_fc")(x)


def prepare_lite0(images: Array, size: int) -> Array:
    """The network's input [b, size, size, 3] of uint8 images [b, h, w, 1 or 3].

    Bilinear, antialiased when shrinking, then normalised. Raises ValueError for another shape.
    """
    if images.ndim != 4 or images.shape[-1] not in (1, 3):
        raise ValueError(f"images: shape {images.shape}; expected [b, h, w, 1 or 3].")
    images = jnp.broadcast_to(images, (*images.shape[:3], 3)).astype(jnp.float32) / 255
    images = jax.image.resize(images, (len(images), size, size, 3), "bilinear")
    mean, std = (np.array(v, np.float32)[None, None, None] for v in (MEAN, STD))
    return (images - mean) / std
