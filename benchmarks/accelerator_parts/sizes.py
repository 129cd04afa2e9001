"""What is measured, in full and in the rehearsal, which is the same in tiny form."""

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True)
class Size:
    """Attributes:
    shape: of the images of CIFAR-10's network.   batch: of its train step.   flags: changes of
      configs/cifar10_edm.py.
    method_flags: more changes where a method is on.   torch: the same network as settings of EDM's
      SongUNet.
    adm_shape, adm_batch, adm_flags, adm_torch: of configs/imagenet64_edm.py.   classes: of its
      labels.
    references: STF's reference set.   product: side of the matrix product that measures the
      device's rate.
    sample_batch, sample_steps: of the unguided sampler.   guided_batch, guided_steps: of DSG and
      DPS.
    timing: seconds that one figure is repeated for.
    images_flags: changes of configs/cifar10_ogdm.py for the real images.   images_batch: of its
      train step.
    evaluations: (solver, network evaluations) at which the real images are compared, in this order.
    samples: of each; 0 = half the set.   block: train steps between two looks at the clock.
    """

    shape: tuple[int, int, int]
    batch: int
    flags: tuple[str, ...]
    method_flags: tuple[str, ...]
    torch: dict[str, Any]
    adm_shape: tuple[int, int, int]
    adm_batch: int
    adm_flags: tuple[str, ...]
    adm_torch: dict[str, Any]
    classes: int
    references: int
    product: int
    sample_batch: int
    sample_steps: int
    guided_batch: int
    guided_steps: int
    timing: float
    images_flags: tuple[str, ...]
    images_batch: int
    evaluations: tuple[tuple[str, int], ...]
    samples: int
    block: int


FULL = Size(
    shape=(32, 32, 3),
    batch=512,
    flags=(),
    method_flags=(),
    torch=dict(model_channels=128, channel_mult=[2, 2, 2], num_blocks=4, attn_resolutions=[16]),
    adm_shape=(64, 64, 3),
    adm_batch=128,
    adm_flags=(),
    adm_torch=dict(
        model_channels=192, channel_mult=[1, 2, 3, 4], num_blocks=3, attn_resolutions=[32, 16, 8]
    ),
    classes=1000,
    references=50_000,
    product=8192,
    sample_batch=512,
    sample_steps=18,
    guided_batch=256,
    guided_steps=10,
    timing=3.0,
    images_flags=("network.model_channels=64",),
    images_batch=256,
    evaluations=(("euler", 10), ("euler", 35), ("euler", 5), ("euler", 18), ("heun", 35)),
    samples=0,
    block=50,
)

_TINY = ("network.channel_mult=(1,)", "network.num_blocks=1", "network.attn_resolutions=(8,)")
_DISCRIMINATOR = ("ogdm.channel_base=64", "ogdm.channel_max=8")
# they take half of a tiny step's compilation
_NO_DRAWS = (
    "data.augment=0.0",
    "network.dropout=0.0",
)
_TORCH = dict(channel_mult=[1], num_blocks=1, attn_resolutions=[8])
REHEARSAL = Size(
    shape=(8, 8, 3),
    batch=8,
    flags=(*_TINY, *_DISCRIMINATOR, "network.model_channels=8"),
    method_flags=_NO_DRAWS,
    torch=dict(model_channels=8, **_TORCH),
    adm_shape=(8, 8, 3),
    adm_batch=4,
    adm_flags=(*_TINY, "network.model_channels=64"),
    adm_torch=dict(model_channels=64, **_TORCH),
    classes=10,
    references=64,
    product=256,
    sample_batch=4,
    sample_steps=3,
    guided_batch=4,
    guided_steps=3,
    timing=0.2,
    images_flags=(
        *_TINY,
        *_DISCRIMINATOR,
        *_NO_DRAWS,
        "network.model_channels=8",
        "optim.ramp=0 steps",
    ),
    images_batch=16,
    evaluations=(("euler", 2), ("heun", 3)),
    samples=32,
    block=3,
)


def of(rehearse: bool) -> Size:
    return REHEARSAL if rehearse else FULL
