"""DG's network (arXiv 2211.17091): an encoder that is trained alone, or a shallow head that is
trained on the features of an encoder with constant weights.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, cast

import jax.numpy as jnp

from ogdm_jax.networks.adm_openai import ADMEncoder
from ogdm_jax.typing import Array, PyTree

TIME_SCALE = 999.0  # encoders are asked at times in [0, 1] and embed 999 times them
# the head on 8x8 features
AUTHORS_HEAD: Mapping[str, Any] = {
    "model_channels": 128,
    "channel_mult": (1,),
    "num_blocks": 2,
    "attn_resolutions": (8,),
    "head_channels": 64,
}


@dataclasses.dataclass(frozen=True)
class FeatureDiscriminator:
    """logit = head(features(x_vp, t), t, label), the logit of "real"; no sigmoid inside.

    Attributes:
      head: the network that is trained, with out_channels 1. With an extractor its input are
        features (8x8x512 in the authors' pixel models), else the image. With label_dim > 0 it is
        conditional (1000 rows in the authors' files, whatever the data set).
      extractor: an ADM classifier of noisy images with constant weights, which never sees labels;
        None: the head is trained from scratch.
    """

    head: ADMEncoder
    extractor: ADMEncoder | None = None

    def __post_init__(self) -> None:
        if self.head.out_channels != 1:
            raise ValueError(
                f"head.out_channels: {self.head.out_channels} given; expected 1, the logit"
            )

    @property
    def label_dim(self) -> int:
        """Classes of the head, 0 if it is unconditional."""
        return self.head.label_dim

    def init(self, key: Array) -> tuple[PyTree, PyTree]:
        """Fresh (params of the head, {}), without those of the extractor."""
        side, channels = self.head.img_resolution, self.head.img_channels
        label = jnp.zeros((1,), jnp.int32) if self.label_dim else None
        x = jnp.zeros((1, side, side, channels))
        return self.head.init({"params": key}, x, jnp.zeros((1,)), label)["params"], {}

    def logit(
        self,
        params: PyTree,
        frozen: PyTree,
        x_vp: Array,
        time: Array,
        label: Array | None = None,
        dropout_keys: Array | None = None,
    ) -> Array:
        """The logit of "real" of each image.

        Args:
          params: of the head.
          frozen: params of the extractor, or None without one. Gradients reach x_vp through it.
          x_vp: [B,H,W,C] = (x0 + sigma eps) / sqrt(1 + sigma^2).
          time: [B] in [0, 1].
          label: [B] int32 true classes, needed by a conditional head: it knows no "no class".
          dropout_keys: [B] typed keys of the head; None switches dropout off.

        Returns:
          [B] logits.

        Raises:
          ValueError: a conditional head without labels.
        """
        h = x_vp
        if self.extractor is not None:
            h = self.extractor.apply({"params": frozen}, x_vp, time, method="features")
        if self.label_dim and label is None:
            raise ValueError(
                "label=None; a conditional discriminator expects the classes of the images"
            )
        label = label if self.label_dim else None
        logits = self.head.apply({"params": params}, h, time, label, dropout_keys=dropout_keys)
        return cast(Array, logits)[:, 0]


def build(
    side: int,
    channels: int,
    label_dim: int = 0,
    extractor: ADMEncoder | None = None,
    dtype: jnp.dtype = jnp.float32,
    remat: bool = False,
    **settings: Any,
) -> FeatureDiscriminator:
    """The discriminator of images of this size.

    Args:
      side: of the images.
      channels: of the images.
      label_dim: classes of the head, 0 if it is unconditional.
      extractor: see FeatureDiscriminator.
      dtype: compute type.
      remat: recompute the blocks' activations in the backward pass.
      **settings: attributes of the head that differ from AUTHORS_HEAD.

    Raises:
      ValueError: an extractor of other images, or a side that the levels cannot halve.
    """
    if extractor is not None:
        found = (extractor.img_resolution, extractor.img_channels)
        if found != (side, channels):
            raise ValueError(
                f"extractor: made for {found[0]} pixels and {found[1]} channels; expected {side} "
                f"and {channels}"
            )
        extractor = extractor.clone(time_scale=TIME_SCALE, dtype=dtype, remat=remat)
        side, channels = extractor.sides[-1], extractor.widths[-1]
    settings = {**AUTHORS_HEAD, **settings}
    mult = tuple(settings["channel_mult"])
    if side % 2 ** (len(mult) - 1):
        raise ValueError(f"channel_mult: {mult} given; its levels do not halve a side of {side}")
    head = ADMEncoder(
        img_resolution=side,
        img_channels=channels,
        out_channels=1,
        label_dim=label_dim,
        time_scale=TIME_SCALE,
        dtype=dtype,
        remat=remat,
        **settings,
    )
    return FeatureDiscriminator(head, extractor)
