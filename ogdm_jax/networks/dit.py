"""DiT, the diffusion transformer (Peebles and Xie, arXiv 2212.09748), NHWC.

A plain transformer on patches. The noise level and the class enter through adaptive layer norms
alone: of each block's condition one linear layer makes shift, scale and gate of its two branches.
Parameters have the names of the authors' files; those of the blocks are stacked along a first axis,
and one loop body is compiled for all of them.
"""

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from ogdm_jax.networks import layers
from ogdm_jax.networks.tapped import Asked, Tapped
from ogdm_jax.typing import Array, PyTree

# width, depth, heads of the published sizes (table 1)
SIZES: Mapping[str, tuple[int, int, int]] = {
    "S": (384, 12, 6),
    "B": (768, 12, 12),
    "L": (1024, 24, 16),
    "XL": (1152, 28, 16),
}
_TIME_FEATURES = 256
_XAVIER = layers.scaled_init("xavier_uniform")
_SMALL = nn.initializers.normal(0.02)
_ZERO = nn.initializers.zeros
_EPS = 1e-6


def position_table(rows: int, columns: int, width: int) -> np.ndarray:
    """[rows * columns, width] float32: [sin(q w) | cos(q w) | sin(r w) | cos(r w)] for the patch in
    row r and column q, w_k = 10000^(-k / (width / 4)). The column comes first, as in the authors'
    code.

    Raises:
      ValueError: a width that 4 does not divide.
    """
    if width % 4:
        raise ValueError(f"position_table: width {width} given; expected a multiple of 4")
    frequencies = 10000.0 ** (-np.arange(width // 4) / (width / 4))
    row, column = np.meshgrid(np.arange(rows), np.arange(columns), indexing="ij")
    angles = [np.outer(axis.reshape(-1), frequencies) for axis in (column, row)]
    return np.concatenate([f(a) for a in angles for f in (np.sin, np.cos)], 1).astype(np.float32)


def _normalised(h: Array, shift: Array, scale: Array) -> Array:
    """LN(h) (1 + scale) + shift for tokens [B,N,D]; the norm has no parameters of its own."""
    wide = h.astype(layers.wide(h.dtype))
    centred = wide - wide.mean(-1, keepdims=True)
    unit = centred * jax.lax.rsqrt(jnp.square(centred).mean(-1, keepdims=True) + _EPS)
    return (unit * (1 + scale[:, None]) + shift[:, None]).astype(h.dtype)


class Block(nn.Module):
    """x += gate1 Attention(LN(x) (1 + scale1) + shift1), then x += gate2 MLP(the like of it).

    Attributes:
      heads: of the attention.
      hidden: width inside the MLP.
      dtype: compute type; norms and softmax are at least float32.
    """

    heads: int
    hidden: int
    dtype: DTypeLike

    @nn.compact
    def __call__(self, h: Array, condition: Array) -> Array:
        """Tokens h [B,N,D] under SiLU(embedding) [B,D]."""
        batch, tokens, width = h.shape
        dense = functools.partial(layers.Dense, kernel_init=_XAVIER, dtype=self.dtype)
        adaptive = dense(6 * width, kernel_init=_ZERO, name="adaLN_modulation.1")(condition)
        shift1, scale1, gate1, shift2, scale2, gate2 = jnp.split(adaptive, 6, axis=-1)
        qkv = dense(3 * width, name="attn.qkv")(_normalised(h, shift1, scale1))
        q, k, v = jnp.moveaxis(qkv.reshape(batch, tokens, 3, self.heads, -1), 2, 0)
        attended = layers.attend(q, k, v).reshape(h.shape)
        h = h + gate1[:, None] * dense(width, name="attn.proj")(attended)
        inside = dense(self.hidden, name="mlp.fc1")(_normalised(h, shift2, scale2))
        return h + gate2[:, None] * dense(width, name="mlp.fc2")(nn.gelu(inside, approximate=True))


class DiT(Tapped):
    """F(x; c_noise, label) of the published models: eps, and a variance in further channels.

    c_noise [B] are time steps (0 to 999, fractions allowed). Labels are [B] int32 (-1 = no class)
    or None, which only a table with a row for it takes. There is no dropout in it, and no place for
    augmentation labels. Fresh parameters give exactly 0. The layers are "block0" to the last
    (tokens [B,N,D] behind it); "mid" is the block depth // 2.

    Attributes:
      img_resolution: side of the input that it is made for; other sizes that the patches divide
        work, with the table of positions computed for them.
      img_channels: channels of the input: 4 for latents.
      out_channels: channels of the output; None = img_channels. Twice as many with a variance.
      label_dim: classes, 0 = unconditional.
      no_class: whether the table of classes has a row more, for "none" (label -1). The published
        models have it, because labels were dropped in training.
      patch: side of a patch.
      width: of a token.
      depth: blocks.
      heads: of each attention.
      mlp_ratio: width inside the MLP over the token's.
      dtype: compute type of the blocks.
      remat: recompute the blocks' activations in the backward pass.
    """

    img_resolution: int
    img_channels: int = 4
    out_channels: int | None = None
    label_dim: int = 0
    no_class: bool = True
    patch: int = 2
    width: int = 1152
    depth: int = 28
    heads: int = 16
    mlp_ratio: float = 4.0
    dtype: DTypeLike = jnp.float32
    remat: bool = False

    @property
    def layer_names(self) -> list[str]:
        """The blocks."""
        return [f"block{i}" for i in range(self.depth)]

    def check_widths(self) -> None:
        """Raises ValueError where width, heads and patches do not fit together."""
        if self.width % self.heads or self.width % 4:
            raise ValueError(
                f"DiT: width {self.width}; expected a multiple of 4 and of the {self.heads} heads"
            )
        if self.img_resolution % self.patch:
            raise ValueError(
                f"DiT: {self.img_resolution} pixels; expected a multiple of the patch {self.patch}"
            )

    @property
    def _factor(self) -> int:
        return self.patch

    def _layers(self, x: Array, emb: Array, asked: Asked) -> Iterator[tuple[str, Array]]:
        """Gives the layers named alone: between two of them is one loop over blocks."""
        rows, columns = x.shape[1] // self.patch, x.shape[2] // self.patch
        stops = {"mid": self.depth // 2 + 1, "out": self.depth}  # blocks up to each layer
        stops |= {name: i + 1 for i, name in enumerate(self.layer_names)}
        h, condition, start = self._patches(x, rows, columns), nn.silu(emb), 0
        run = self._blocks(h, condition)
        for name in sorted((n for n in asked.names if n in stops), key=stops.__getitem__):
            h, start = run(h, start, stops[name]), stops[name]
            if name == "out":
                image = self._head(h, condition, rows, columns)
                yield name, image.astype(layers.wide(x.dtype))
            else:
                yield name, h

    def _patches(self, x: Array, rows: int, columns: int) -> Array:
        """Tokens [B, rows * columns, D] of the patches, with their positions."""
        p, shape = self.patch, (self.patch, self.patch, self.img_channels, self.width)
        fans = (p * p * self.img_channels, self.width)
        kernel = self.param("x_embedder.proj.kernel", lambda key: _XAVIER(key, shape, fans=fans))
        bias = self.param("x_embedder.proj.bias", _ZERO, (self.width,))
        cut = x.astype(self.dtype).reshape(-1, rows, p, columns, p, self.img_channels)
        cut = jnp.moveaxis(cut, 2, 3).reshape(-1, rows * columns, fans[0])
        tokens = jnp.dot(cut, kernel.reshape(fans).astype(self.dtype))
        positions = position_table(rows, columns, self.width) + bias[None]
        return tokens + positions[None].astype(self.dtype)

    def _embed(self, batch: int, c_noise: Array, asked: Asked) -> Array:
        """MLP(time features) + the class's row, [B,D]."""
        dense = functools.partial(layers.Dense, kernel_init=_SMALL)
        time = layers.positional_embedding(jnp.broadcast_to(c_noise, (batch,)), _TIME_FEATURES)
        # the type of the features: float64 in, float64 out
        time = dense(self.width, name="t_embedder.mlp.0", dtype=time.dtype)(time)
        time = dense(self.width, name="t_embedder.mlp.2", dtype=time.dtype)(nn.silu(time))
        if not self.label_dim:
            return time
        rows = self.label_dim + self.no_class
        table = self.param("y_embedder.embedding_table.embedding", _SMALL, (rows, self.width))
        label = asked.label
        if label is None:
            label = jnp.full((batch,), -1, jnp.int32)
            if not self.no_class:
                raise ValueError("DiT: label=None; this network has no row for images of no class")
        if label.shape != (batch,) or not jnp.issubdtype(label.dtype, jnp.integer):
            raise ValueError(
                f"DiT: label {label.dtype}{label.shape} given; expected integers [{batch}]"
            )
        # a class that has no row gives nan: an index beyond the table would be the last row's
        row = jnp.where(label < 0, self.label_dim, label)
        known = jnp.asarray(table).at[row].get(mode="fill", fill_value=jnp.nan)
        return time + known.astype(time.dtype)

    def _blocks(self, h: Array, condition: Array) -> Callable[[Array, int, int], Array]:
        """(h, start, stop) -> h behind the blocks start..stop-1."""
        block = Block(self.heads, int(self.width * self.mlp_ratio), self.dtype, parent=None)

        def init(key: Array) -> PyTree:
            one = lambda key: block.init(key, h[:1], condition[:1])["params"]
            return jax.vmap(one)(jax.random.split(key, self.depth))

        stacked = self.param("blocks", init)

        def step(h: Array, params: PyTree) -> tuple[Array, None]:
            after: Any = block.apply({"params": params}, h, condition)
            return after, None

        body = jax.checkpoint(step) if self.remat else step

        def run(h: Array, start: int, stop: int) -> Array:
            return jax.lax.scan(body, h, jax.tree.map(lambda p: p[start:stop], stacked))[0]

        return run

    def _head(self, h: Array, condition: Array, rows: int, columns: int) -> Array:
        """The image [B,H,W,out_channels] of the last block's tokens."""
        p, channels = self.patch, self.out_channels or self.img_channels
        dense = functools.partial(layers.Dense, kernel_init=_ZERO, dtype=self.dtype)
        adaptive = dense(2 * self.width, name="final_layer.adaLN_modulation.1")(condition)
        shift, scale = jnp.split(adaptive, 2, axis=-1)
        out = dense(p * p * channels, name="final_layer.linear")(_normalised(h, shift, scale))
        out = jnp.moveaxis(out.reshape(-1, rows, columns, p, p, channels), 3, 2)
        return out.reshape(-1, rows * p, columns * p, channels)
