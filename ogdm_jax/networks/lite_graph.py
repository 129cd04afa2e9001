"""Runs the graph of a LiteRT (TensorFlow Lite) file: a list of operations on numbered arrays."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from ogdm_jax.networks.convolution import conv2d, depthwise
from ogdm_jax.typing import Array

VALID = 1  # of the file's paddings; 0 is SAME
ACTIVATIONS: dict[int, Callable[[Array], Array]] = {0: lambda x: x, 1: jax.nn.relu, 3: nn.relu6}


class Op(NamedTuple):
    """One operation.

    Attributes:
      kind: its name in the file's format, such as CONV_2D.
      inputs: numbers of the arrays that it reads.
      output: number of the array that it writes.
      options: {name: number} of its own.
      sizes: integers that it reads from a constant (a target size, axes).
    """

    kind: str
    inputs: tuple[int, ...]
    output: int
    options: Mapping[str, int]
    sizes: tuple[int, ...] = ()


class Graph(NamedTuple):
    """A network of one image that gives one array.

    Attributes:
      ops: in the order in which they run.
      input: number of the image's array.
      output: number of the result's array.
      shape: (height, width, channels) of the image.
    """

    ops: tuple[Op, ...]
    input: int
    output: int
    shape: tuple[int, ...]


def run(graph: Graph, weights: Mapping[str, Array], x: Array) -> Array:
    """The result [B,...] of images [B,*graph.shape], any B, in the number range of the file's
    network.

    Args:
      graph: of `interop.litert.read_litert`.
      weights: {number of an array: constant}, as read with the graph.
      x: images.
    """
    values: dict[int, Array] = {int(number): value for number, value in weights.items()}
    values[graph.input] = x
    with jax.default_matmul_precision("highest"):
        for op in graph.ops:
            values[op.output] = OPERATIONS[op.kind](op, *(values[i] for i in op.inputs))
    return values[graph.output]


def _padding(op: Op, x: Array, kernel: tuple[int, int]) -> tuple[tuple[int, int], tuple[int, int]]:
    if op.options["padding"] == VALID:
        return ((0, 0), (0, 0))
    strides = (op.options["stride_h"], op.options["stride_w"])
    top, left = jax.lax.padtype_to_pads(x.shape[1:3], kernel, strides, "SAME")
    return (top, left)


def _activated(op: Op, x: Array) -> Array:
    return ACTIVATIONS[op.options.get("activation", 0)](x)


def _conv(op: Op, x: Array, kernel: Array, bias: Array) -> Array:
    """The kernel is OHWI."""
    pads = _padding(op, x, (kernel.shape[1], kernel.shape[2]))
    x = conv2d(x, kernel.transpose(1, 2, 3, 0), pads, op.options["stride_h"])
    return _activated(op, x + bias[None, None, None])


def _depthwise(op: Op, x: Array, kernel: Array, bias: Array) -> Array:
    """The kernel is [1,h,w,channels]."""
    x = depthwise(x, kernel.transpose(1, 2, 0, 3), op.options["stride_h"])
    return _activated(op, x + bias[None, None, None])


def _mean_pool(op: Op, x: Array) -> Array:
    window = op.options["filter_h"], op.options["filter_w"]
    strides = op.options["stride_h"], op.options["stride_w"]
    pads = "VALID" if op.options["padding"] == VALID else "SAME"
    return _activated(op, nn.avg_pool(x, window, strides, pads, count_include_pad=False))


def _resize(op: Op, x: Array) -> Array:
    """Bilinear by pixel centres."""
    shape = (x.shape[0], *op.sizes, x.shape[-1])
    return jax.image.resize(x, shape, "bilinear", antialias=False)


def _transpose_conv(op: Op, x: Array, kernel: Array, bias: Array) -> Array:
    """Every pixel becomes a block of its own: the stride is the kernel's side. kernel is OHWI."""
    out, high, wide, _ = kernel.shape
    blocks = jnp.einsum("bijc,ohwc->bihjwo", x, kernel)
    x = blocks.reshape(x.shape[0], x.shape[1] * high, x.shape[2] * wide, out)
    return x + bias[None, None, None]


OPERATIONS: dict[str, Callable[..., Any]] = {
    "ADD": lambda op, x, y: _activated(op, x + y),
    "AVERAGE_POOL_2D": _mean_pool,
    "CONV_2D": _conv,
    "DEPTHWISE_CONV_2D": _depthwise,
    "HARD_SWISH": lambda op, x: x * nn.relu6(x + 3) / 6,
    "LOGISTIC": lambda op, x: jax.nn.sigmoid(x),
    "MEAN": lambda op, x: x.mean(op.sizes, keepdims=bool(op.options["keep_dims"])),
    "MUL": lambda op, x, y: _activated(op, x * y),
    "RELU": lambda op, x: jax.nn.relu(x),
    "RESIZE_BILINEAR": _resize,
    "Convolution2DTransposeBias": _transpose_conv,
}


def refusal(op: Op, weights: Mapping[str, np.ndarray]) -> str:
    """Why `run` cannot do an operation as its file means it; "" where it can."""
    options = op.options
    kernel = next((weights[str(i)] for i in op.inputs if str(i) in weights), None)
    if op.kind not in OPERATIONS:
        return "is not known here"
    if options.get("activation", 0) not in ACTIVATIONS:
        return f"has the activation {options['activation']}"
    strides = options.get("stride_h", 1), options.get("stride_w", 1)
    if strides[0] != strides[1]:
        return "has two different strides"
    if any(options.get(f"dilation_{axis}", 1) != 1 for axis in "hw"):
        return "is dilated"
    if op.kind == "DEPTHWISE_CONV_2D" and (
        options["padding"] == VALID or options["depth_multiplier"] not in (0, 1)
    ):
        return "is not padded to SAME, or has several filters a channel"
    if op.kind == "RESIZE_BILINEAR" and (options["align_corners"] or not options["half_pixel"]):
        return "does not count by pixel centres"
    if op.kind == "Convolution2DTransposeBias" and (kernel is None or kernel.shape[1:3] != strides):
        return "has a kernel larger than its stride"
    return ""
