"""The trunk that all U-Nets here share: encoder, two middle blocks, decoder with skip connections.

`UNet.plan` says which blocks there are and how they are wired, and they are applied in that order.
What distinguishes the published networks is data: the blocks' `Style`, and the attributes and small
methods that a network overrides (first convolution, attention, embedding, output layer).
Parameters have EDM's names: enc_64x64_block0, dec_8x8_in0, ...
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike

from ogdm_jax.networks import layers
from ogdm_jax.networks.blocks import Style, UNetBlock
from ogdm_jax.networks.tapped import Asked, Tapped
from ogdm_jax.typing import Array


@dataclasses.dataclass(frozen=True)
class Step:
    """One block of the trunk.

    Attributes:
      name: of its parameters.
      width: channels of its output; None = those of its input.
      attend: whether it has attention.
      up: double the resolution.
      down: halve the resolution.
      stores_skip: its output is kept for the decoder.
      takes_skip: the last output kept joins its input.
    """

    name: str
    width: int | None = None
    attend: bool = False
    up: bool = False
    down: bool = False
    stores_skip: bool = False
    takes_skip: bool = False


class UNet(Tapped):
    """What SongUNet, DhariwalUNet, ADMUNet and ADMEncoder have in common.

    Labels are [B] int32 (-1 = no class), [B, label_dim] float, or None. The layers are blocks such
    as "enc_8x8_block0" (an output [B,h,w,c]); "mid" is the second middle block.

    Attributes:
      img_resolution: side of the square images that the names of the blocks are made from; other
        sizes work where the levels halve them.
      img_channels: channels of the input.
      out_channels: channels of the output; None = img_channels.
      label_dim: classes, 0 = unconditional.
      model_channels: width that the multipliers refer to.
      channel_mult: width of each level as a multiple of model_channels.
      channel_mult_emb: width of the embedding as a multiple of model_channels.
      num_blocks: blocks of an encoder level; a decoder level has one more.
      attn_resolutions: sides at which blocks attend. The deepest level's first block always does.
      dropout: probability; active only where dropout_keys are given.
      dtype: compute type of the blocks; parameters, embedding and statistics stay float32.
      remat: recompute the blocks' activations in the backward pass.
    """

    img_resolution: int
    img_channels: int = 3
    out_channels: int | None = None
    label_dim: int = 0
    model_channels: int = 128
    channel_mult: Sequence[float] = (1, 2, 2, 2)
    channel_mult_emb: int = 4
    num_blocks: int = 4
    attn_resolutions: Sequence[int] = (16,)
    dropout: float = 0.10
    dtype: DTypeLike = jnp.float32
    remat: bool = False

    def _layers(self, x: Array, emb: Array, asked: Asked) -> Iterator[tuple[str, Array]]:
        image = x.astype(self.dtype)
        h = self._conv(self._first_name, self._first_width)(image)
        yield self._first_name, h
        skips = [h]
        for step in self.plan():
            if step.takes_skip:
                h = jnp.concatenate([h, skips.pop()], axis=-1)
            h = self._block(step, h, emb, asked.dropout_keys)
            yield step.name, h
            if step.name.endswith("_in1"):
                yield "mid", h
            if step.down:
                h, image = self._join_image(step, h, image)
            if step.stores_skip:
                skips.append(h)
        yield "out", self._head(h, skips).astype(layers.wide(x.dtype))

    def _block(self, step: Step, h: Array, emb: Array, dropout_keys: Array | None) -> Array:
        width = h.shape[-1] if step.width is None else step.width
        make = nn.remat(UNetBlock) if self.remat else UNetBlock
        module = make(
            style=self._style,
            out=width,
            heads=self.heads(width) if step.attend else 0,
            up=step.up,
            down=step.down,
            dropout=self.dropout,
            dtype=self.dtype,
            name=step.name,
        )
        return module(h, emb, dropout_keys)

    def _conv(self, name: str, width: int, **more: Any) -> layers.Conv:
        """A 3x3 convolution of the trunk, with the blocks' initialisers unless others are named."""
        style = self._style
        settings = {"kernel_init": style.kernel_init, "bias_init": style.bias_init} | more
        return layers.Conv(width, 3, name=name, dtype=self.dtype, **settings)

    def _norm(self, h: Array) -> Array:
        """The norm of the output layer."""
        style = self._style
        return layers.GroupNorm(style.eps, style.groups, name=self._head_prefix + "norm")(h)

    @property
    def layer_names(self) -> list[str]:
        """The first convolution and the blocks."""
        return [self._first_name, *(step.name for step in self.plan())]

    def check_widths(self) -> None:
        """Raises ValueError where the channels of a block do not divide into its norms' groups or
        its attention's heads.
        """
        h, skips = self._first_width, [self._first_width]
        for step in self.plan():
            h += skips.pop() if step.takes_skip else 0
            width = h if step.width is None else step.width
            heads = self.heads(width) if step.attend else 0
            parts = [(n, layers.norm_groups(n, self._style.groups), "groups") for n in (h, width)]
            for channels, count, what in [*parts, (width, heads or 1, "heads")]:
                if channels < 1 or channels % count:
                    raise ValueError(
                        f"{step.name} has {channels} channels, which do not divide into {count} "
                        f"{what}"
                    )
            h = width
            skips += [h] if step.stores_skip else []

    # Sizes

    @property
    def _factor(self) -> int:
        return 2 ** (len(self.channel_mult) - 1)

    @property
    def sides(self) -> list[int]:
        """Resolution of each level."""
        return [self.img_resolution >> level for level in range(len(self.channel_mult))]

    @property
    def widths(self) -> list[int]:
        """Channels of each level; multipliers below 1 occur (OpenAI's 512 pixels)."""
        return [int(mult * self.model_channels) for mult in self.channel_mult]

    @property
    def _outputs(self) -> int:
        return self.img_channels if self.out_channels is None else self.out_channels

    @property
    def _first_name(self) -> str:
        return f"enc_{self.img_resolution}x{self.img_resolution}_conv"

    # What a network overrides

    layer_word = "block"
    only_last_attends = False  # of the blocks of a decoder level at attn_resolutions

    @property
    def _style(self) -> Style:
        raise NotImplementedError

    @property
    def _first_width(self) -> int:
        return self.widths[0]

    @property
    def _head_prefix(self) -> str:
        return "out_"

    def heads(self, channels: int) -> int:
        """Attention heads of a block with this many channels."""
        raise NotImplementedError

    def plan(self) -> list[Step]:
        """The blocks behind the first convolution, in their order."""
        return self._encoder() + self._decoder()

    def _encoder(self) -> list[Step]:
        """Up to the two middle blocks, of which the first attends whatever its resolution."""
        steps = []
        for level, (side, width) in enumerate(zip(self.sides, self.widths, strict=True)):
            at, attend = f"enc_{side}x{side}_", side in self.attn_resolutions
            if level:
                steps.append(Step(at + "down", down=True, stores_skip=True))
            for i in range(self.num_blocks):
                steps.append(Step(f"{at}block{i}", width, attend, stores_skip=True))
        at = f"dec_{self.sides[-1]}x{self.sides[-1]}_"
        return [*steps, Step(at + "in0", attend=True), Step(at + "in1")]

    def _decoder(self) -> list[Step]:
        steps, last = [], self.num_blocks
        for side, width in zip(reversed(self.sides), reversed(self.widths), strict=True):
            at, attends = f"dec_{side}x{side}_", side in self.attn_resolutions
            if side != self.sides[-1]:
                steps.append(Step(at + "up", up=True))
            for i in range(last + 1):
                attend = attends and (i == last or not self.only_last_attends)
                steps.append(Step(f"{at}block{i}", width, attend, takes_skip=True))
        return steps

    def _join_image(self, step: Step, h: Array, image: Array) -> tuple[Array, Array]:
        """Behind a halving: what goes on, and the image that travels beside the blocks."""
        return h, image

    @layers.input_computed_once
    def _head(self, h: Array, skips: list[Array]) -> Array:
        """The output layer, behind the last block; skips: what no decoder has taken."""
        conv = self._head_prefix + "conv"
        zero = {"kernel_init": self._style.zero_init, "bias_init": None}
        return self._conv(conv, self._outputs, **zero)(nn.silu(self._norm(h)))
