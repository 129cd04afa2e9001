"""Two recognisers of faces: what they say of one person's pictures is alike."""

import re
from collections.abc import Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from ogdm_jax.networks.convolution import conv2d
from ogdm_jax.networks.inception import FrozenNorm
from ogdm_jax.typing import Array

# Of face-api's network: the blocks in their order; "down" halves the side.
FACE_API_BLOCKS = (
    *(f"conv32_{i}" for i in (1, 2, 3)),
    *(f"conv64_{i}" for i in ("down", 1, 2, 3)),
    *(f"conv128_{i}" for i in ("down", 1, 2)),
    *(f"conv256_{i}" for i in ("down", 1, 2, "down_out")),
)
FACE_API_MEAN = (122.782, 117.001, 104.298)  # RGB in [0, 255]
FACE_API_SIDE = 150


def face_api(weights: Mapping[str, Array], images: Array) -> Array:
    """The 128 numbers of a face by face-api's recogniser: dlib's ResNet of 29 layers with fewer
    channels (Davis King, face_recognition_resnet_model_v1), trained so that pictures of one person
    lie closer than 0.6.

    Args:
      weights: {name in its manifest: array}, kernels HWIO.
      images: [B,150,150,3] in [-1, 1], RGB: a face fills the picture, eyes about level.

    Returns:
      [B,128], not of unit length.
    """
    spread = lambda v: v[None, None, None]

    def layer(x: Array, name: str, stride: int = 1) -> Array:
        kernel = weights[f"{name}/conv/filters"]
        x = conv2d(x, kernel, None if stride == 1 else 0, stride)
        x = x + spread(weights[f"{name}/conv/bias"])
        return x * spread(weights[f"{name}/scale/weights"]) + spread(
            weights[f"{name}/scale/biases"]
        )

    x = ((images + 1) * 127.5 - spread(jnp.asarray(FACE_API_MEAN, jnp.float32))) / 255
    with jax.default_matmul_precision("highest"):
        x = nn.max_pool(jax.nn.relu(layer(x, "conv32_down", 2)), (3, 3), (2, 2))
        for name in FACE_API_BLOCKS:
            down = "down" in name
            h = layer(jax.nn.relu(layer(x, f"{name}/conv1", 2 if down else 1)), f"{name}/conv2")
            x = nn.avg_pool(x, (2, 2), (2, 2)) if down else x
            short = x.shape[1] - h.shape[1]  # an odd row and column are zeros
            h = jnp.pad(h, ((0, 0), (0, short), (0, short), (0, 0)))
            x = jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, h.shape[-1] - x.shape[-1])))
            x = jax.nn.relu(x + h)
        return x.mean((1, 2)) @ weights["fc"]


class _PReLU(nn.Module):
    @nn.compact
    def __call__(self, x: Array) -> Array:
        slope = self.param("scale", nn.initializers.constant(0.25), (x.shape[-1],))
        return jnp.where(x > 0, x, slope[None, None, None] * x)


class _Conv(nn.Module):
    features: int
    kernel: int
    stride: int = 1
    padding: int = 0

    @nn.compact
    def __call__(self, x: Array) -> Array:
        shape = self.kernel, self.kernel, x.shape[-1], self.features
        kernel = self.param("kernel", nn.initializers.lecun_normal(), shape)
        return conv2d(x, kernel, self.padding, self.stride)


class _Unit(nn.Module):
    """A residual block whose result is weighed channel by channel by a small network
    (squeeze-and-excitation).
    """

    features: int
    stride: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        width, norm = self.features, lambda name: FrozenNorm(1e-5, name=name)
        h = norm("res_layer_0")(x)
        h = _PReLU(name="res_layer_2")(_Conv(width, 3, 1, 1, name="res_layer_1")(h))
        h = norm("res_layer_4")(_Conv(width, 3, self.stride, 1, name="res_layer_3")(h))
        gate = _Conv(width // 16, 1, name="res_layer_5_fc1")(h.mean((1, 2), keepdims=True))
        h = h * nn.sigmoid(_Conv(width, 1, name="res_layer_5_fc2")(jax.nn.relu(gate)))
        if x.shape[-1] == width:
            return x[:, :: self.stride, :: self.stride] + h
        short = _Conv(width, 1, self.stride, name="shortcut_layer_0")(x)
        return norm("shortcut_layer_1")(short) + h


class IRSE50(nn.Module):
    """ArcFace's recogniser IR-SE50 (Deng et al., arXiv 1801.07698; squeeze-and-excitation: arXiv
    1709.01507) as InsightFace_Pytorch publishes it: the "face identity" of DSG and FreeDoM. Module
    names are the PyTorch checkpoint's, dots as underscores.
    """

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """[B,512] of unit length, of aligned faces x [B,112,112,3] in [-1, 1], RGB."""
        with jax.default_matmul_precision("highest"):
            x = FrozenNorm(1e-5, name="input_layer_1")(_Conv(64, 3, 1, 1, name="input_layer_0")(x))
            x, index = _PReLU(name="input_layer_2")(x), 0
            for features, units in ((64, 3), (128, 4), (256, 14), (512, 3)):
                for i in range(units):
                    x = _Unit(features, 1 if i else 2, name=f"body_{index}")(x)
                    index += 1
            # a dense layer over 7x7 pixels
            x = _Conv(512, 7, name="output_layer_3")(FrozenNorm(1e-5, name="output_layer_0")(x))
            bias = self.param("output_layer_3_bias", nn.initializers.zeros, (512,))
            x = FrozenNorm(1e-5, name="output_layer_4")(x + bias[None, None, None])[:, 0, 0]
            return x / jnp.linalg.norm(x, axis=-1, keepdims=True)


def torch_name(name: str) -> str:
    """A tensor of IRSE50 as PyTorch names it: body_0.res_layer_5_fc1.weight is
    body.0.res_layer.5.fc1.weight.
    """
    return re.sub(r"_(\d+)[_.]", r".\1.", name)


def crop_face(images: Array) -> Array:
    """The face in pictures [B,256,256,3] that are cut as CelebA-HQ's: [B,112,112,3].

    Rows 35 to 222 and columns 32 to 219, averaged down to 112 as torch's adaptive_avg_pool2d does
    (FreeDoM's and DSG's way to IR-SE50): output i is the mean of the inputs floor(188 i / 112) to
    ceil(188 (i + 1) / 112) - 1.
    """
    side, out = 188, 112
    first = np.arange(out) * side // out
    last = -(-(np.arange(1, out + 1) * side) // out)
    at = np.arange(side)
    inside = (at >= first[:, None]) & (at < last[:, None])
    pool = jnp.asarray(inside / inside.sum(1, keepdims=True), images.dtype)
    face = images[:, 35 : 35 + side, 32 : 32 + side]
    highest = jax.lax.Precision.HIGHEST
    return jnp.einsum("ip,jq,bpqc->bijc", pool, pool, face, precision=highest)
