"""What every denoiser's network is asked, however it is built: its output, and features."""

import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax

from ogdm_jax.typing import Array, PyTree


@functools.partial(jax.jit, static_argnums=0, static_argnames=("at", "method"))
def apply_compiled(network: nn.Module, variables: PyTree, *args: Any, **more: Any) -> Any:
    """network.apply as one program, for who calls it outside of jit, as in a notebook: operation by
    operation, a first call compiles hundreds of small programs.
    """
    return network.apply(variables, *args, **more)


class Asked(NamedTuple):
    """What a network is called with beside x and c_noise; names: the layers to give."""

    label: Array | None
    augment: Array | None
    dropout_keys: Array | None
    names: Sequence[str]


class Tapped(nn.Module):
    """A network that gives its output, or what it computes on its way there.

    A network writes what raises NotImplementedError here; what its labels and layers are, its own
    text says.

    Attributes:
      img_resolution: side of the square images that the network is made for.
      img_channels: channels of the input.
    """

    img_resolution: int
    img_channels: int
    layer_word = "layer"  # what a message calls one of layer_names
    augment_dim = 0  # a field of the networks that have a place for augmentation labels

    def __call__(
        self,
        x: Array,
        c_noise: Array,
        label: Array | None = None,
        augment: Array | None = None,
        dropout_keys: Array | None = None,
    ) -> Array:
        """F(x; c_noise, label, augment).

        Args:
          x: [B,H,W,img_channels], already times c_in.
          c_noise: [B] or a scalar.
          label: the condition, see the network; None: no class. Ignored by unconditional networks.
          augment: [B, augment_dim] or None (not augmented, the same as zeros).
          dropout_keys: [B] typed keys; None switches dropout off, where the network has any.

        Returns:
          [B,H,W,out_channels], at least float32.

        Raises:
          ValueError: the shape of x or of a label does not fit.
        """
        return self._run(x, c_noise, Asked(label, augment, dropout_keys, ["out"]))[0]

    def features(
        self,
        x: Array,
        c_noise: Array,
        label: Array | None = None,
        augment: Array | None = None,
        dropout_keys: Array | None = None,
        *,
        at: str = "mid",
    ) -> Array | list[Array]:
        """What the network computes on its way; call it as `network.apply(..., method="features")`.

        Nothing behind the last layer asked for is computed. Arguments as those of `__call__`, and

        Args:
          at: "emb" (the embedding [B,E]), "mid" (behind the network's middle), or one of
            `layer_names` (that layer's output); or several of these with commas between them.

        Returns:
          One array, or a list of them where `at` has several names.

        Raises:
          ValueError: as `__call__`, and an unknown name.
        """
        found = self._run(x, c_noise, Asked(label, augment, dropout_keys, at.split(",")))
        return found if len(found) > 1 else found[0]

    @property
    def layer_names(self) -> list[str]:
        """The layers whose output `features` gives, beside "mid" and "emb"."""
        raise NotImplementedError

    @property
    def _factor(self) -> int:
        """What the sides of x are multiples of."""
        raise NotImplementedError

    def check_widths(self) -> None:
        """Raises ValueError where the network's widths do not fit together."""
        raise NotImplementedError

    def _embed(self, batch: int, c_noise: Array, asked: Asked) -> Array:
        """The condition of the layers, [B,E]."""
        raise NotImplementedError

    def _layers(self, x: Array, emb: Array, asked: Asked) -> Iterator[tuple[str, Array]]:
        """Applies one layer after another; gives name and output of at least those named."""
        raise NotImplementedError

    @nn.compact
    def _run(self, x: Array, c_noise: Array, asked: Asked) -> list[Array]:
        """The outputs of the layers named; "out" is the network's own."""
        self._check(x, asked)
        emb = self._embed(x.shape[0], c_noise, asked)
        found, outputs = {"emb": emb}, self._layers(x, emb, asked)
        while not found.keys() >= set(asked.names):
            name, h = next(outputs)
            found |= {name: h} if name in asked.names else {}
        return [found[name] for name in asked.names]

    def _check(self, x: Array, asked: Asked) -> None:
        self.check_widths()
        network, sides = type(self).__name__, (*x.shape[1:3], self.img_resolution)
        if x.ndim != 4 or x.shape[-1] != self.img_channels or any(s % self._factor for s in sides):
            raise ValueError(
                f"{network}: x has shape {x.shape} (img_resolution {self.img_resolution}); "
                f"expected [B, H, W, {self.img_channels}] with sides divisible by {self._factor}"
            )
        if asked.augment is not None and not self.augment_dim:
            raise ValueError(
                f"{network}: augmentation labels given; expected None, the network has no place "
                "for them"
            )
        for name in asked.names:
            if name not in ("mid", "emb", "out", *self.layer_names):
                raise ValueError(
                    f"{network}: no {self.layer_word} {name!r}; expected 'mid', 'emb' or some of "
                    f"{', '.join(self.layer_names)}"
                )
