"""What the numbers of latents are (arXiv 2112.10752), without JAX: reading processes need it."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class Latents:
    """What the numbers of a set of latents are.

    An item is [views, h, w, C] of samples or [views, h, w, 2C] of mean and standard deviation. A
    diffusion model sees z = (item - shift) * scale, or the item itself where it is scaled already.

    Attributes:
      shape: (h, w, C) of z.
      views: 2 where the mirrored image was encoded, too, else 1.
      moments: whether an item is a mean and a standard deviation; else it is a sample.
      scaled: whether the numbers are scaled already.
      scale: of the autoencoder.
      shift: of the autoencoder.
      dtype: of the items.
      vae: {"path", "sha256"} of the autoencoder that encoded them, {} where it is not known.
      pixels: {"name", "data_dir", "resolution", "channels", "data_set"} of what was encoded.
    """

    shape: tuple[int, int, int]
    views: int = 2
    moments: bool = True
    scaled: bool = False
    scale: float = 0.18215
    shift: float = 0.0
    dtype: str = "float16"
    vae: Mapping[str, Any] = dataclasses.field(default_factory=dict, hash=False)
    pixels: Mapping[str, Any] = dataclasses.field(default_factory=dict, hash=False)

    @property
    def item_shape(self) -> tuple[int, int, int, int]:
        """Of one item of the set."""
        height, width, channels = self.shape
        return self.views, height, width, channels * (1 + self.moments)

    def scaled_of(self, values: Any) -> Any:
        """Means or samples as a diffusion model sees them."""
        return values if self.scaled else (values - self.shift) * self.scale

    def item_of(self, z: np.ndarray) -> np.ndarray:
        """Items [n, ...] float32 that are exactly z [n,h,w,C], the same in every view."""
        values = z if self.scaled else z / self.scale + self.shift
        if self.moments:
            values = np.concatenate([values, np.zeros_like(values)], axis=-1)
        return np.repeat(values[:, None], self.views, axis=1).astype(np.float32)


def difference(one: Latents | None, other: Latents | None, names: Sequence[str] = ()) -> str:
    """In what two sets differ that should hold numbers of one kind, in words; "" in nothing.

    Args:
      one: what its numbers are, None: pixels.
      other: likewise.
      names: of attributes that have to agree beside scale and shift.
    """
    if one is None or other is None:
        return "" if one is other else "pixels in one and latents in the other"
    for name in ("scale", "shift", *names):
        values = getattr(one, name), getattr(other, name)
        if values[0] != values[1]:
            return f"{name} {values[0]} and {values[1]}"
    return ""


def from_json(about: Mapping[str, Any]) -> Latents:
    """The record that `dataclasses.asdict` makes, as JSON gives it back."""
    known = {field.name for field in dataclasses.fields(Latents)}
    values: dict[str, Any] = {name: value for name, value in about.items() if name in known}
    return Latents(**{**values, "shape": tuple(values["shape"])})
