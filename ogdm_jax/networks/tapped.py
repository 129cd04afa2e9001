"""What every denoiser's network is asked, however it is built: its output, and features."""

from collections.abc import Sequence

import flax.linen as nn

from ogdm_jax.typing import Array


class Tapped(nn.Module):
    """A network that gives its output, or what it computes on its way there.

    A network writes `_run` and `layer_names`; what its labels and layers are, its own text says.
    """

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
        return self._run(x, c_noise, label, augment, dropout_keys, ["out"])[0]

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
        found = self._run(x, c_noise, label, augment, dropout_keys, at.split(","))
        return found if len(found) > 1 else found[0]

    @property
    def layer_names(self) -> list[str]:
        """The layers whose output `features` gives, beside "mid" and "emb"."""
        raise NotImplementedError

    def _run(
        self,
        x: Array,
        c_noise: Array,
        label: Array | None,
        augment: Array | None,
        dropout_keys: Array | None,
        names: Sequence[str],
    ) -> list[Array]:
        """The outputs of the layers named; "out" is the network's own."""
        raise NotImplementedError
