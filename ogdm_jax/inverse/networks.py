"""Measurements made by a network: style, embedding, segmentation. The input is an example to
follow, and the result need not equal it.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from ogdm_jax.inverse.operators import HIGHEST, Function, Loss, Operator
from ogdm_jax.typing import Array


def style(features: Callable[[Array], Array | Sequence[Array]]) -> Operator:
    """Gram matrices G = F^T F of features F [B,n,d] or [B,h,w,d] -> [B,d,d]; DSG's style loss
    compares them.

    Of several features at once (a list: the layers of a VGG) the matrices lie side by side, each
    divided by n d, [B, sum of d^2]: their squared distance is then the style loss of Gatys et al.
    (arXiv 1508.06576) with equal weights of the layers, but for a factor.
    """

    def gram(f: Array) -> Array:
        f = f.reshape(f.shape[0], -1, f.shape[-1])
        return jnp.einsum("bnd,bne->bde", f, f, precision=HIGHEST)

    def forward(x: Array) -> Array:
        found = features(x)
        if isinstance(found, Sequence):
            each = [(gram(f) / np.prod(f.shape[1:])).reshape(len(f), -1) for f in found]
            return jnp.concatenate(each, axis=1)
        return gram(found)

    return Operator("style", forward)


def embedding(network: Function) -> Operator:
    """What a network says of the image (identity, class, CLIP): [B,d], of unit length."""

    def forward(x: Array) -> Array:
        e = network(x)
        e = e.reshape(e.shape[0], -1)
        square = jnp.sum(e**2, axis=1, keepdims=True)
        positive = square != 0  # of nan too, which stays
        return jnp.where(positive, e / jnp.sqrt(jnp.where(positive, square, 1.0)), 0.0)

    return Operator("embedding", forward)


def segmentation(network: Function) -> Operator:
    """Class logits [B,h,w,k] of a given network; compare them by `label_loss`, or as numbers by
    `measurement_loss`.
    """
    return Operator("segmentation", network)


def label_loss(operator: Operator, labels: Array) -> Loss:
    """Mean cross-entropy [B] of the operator's logits [B,...,k] with integer labels [B,...]:
    classes, segmentations.
    """

    def loss(x0_hat: Array) -> Array:
        logs = jax.nn.log_softmax(operator.forward(x0_hat))
        if logs.shape[:-1] != labels.shape:
            raise ValueError(
                f"labels: shape {labels.shape}; expected {logs.shape[:-1]}, what {operator.name} "
                "gives"
            )
        picked = jnp.take_along_axis(logs, labels[..., None], axis=-1)
        return -jnp.mean(picked.reshape(picked.shape[0], -1), axis=1)

    return loss
