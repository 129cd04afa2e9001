"""Golden files augment_*: EDM's pipe on supplied draws, any subset of its operations."""

import jax
import jax.numpy as jnp
import numpy as np

from ogdm_jax.data.augment import AugmentPipe
from tests.support import golden_support

OFF = dict(xflip=0, yflip=0, scale=0, rotate_frac=0, aniso=0, translate_frac=0)


@golden_support.family("augment_")
def check(golden):
    pipe = AugmentPipe(p=golden.config["p"], **(OFF | golden.config["multipliers"]))
    draws = {
        k.removeprefix("draw_"): jnp.asarray(v)
        for k, v in golden.arrays.items()
        if k.startswith("draw_")
    }
    images, labels = jax.jit(pipe.apply)(draws, jnp.asarray(golden_support.nhwc(golden["images"])))
    golden.assert_close("out", golden_support.nchw(images), atol=1e-4)
    golden.assert_close(
        "labels", np.asarray(labels), atol=1e-6 * max(1.0, np.abs(golden["labels"]).max(initial=0))
    )
