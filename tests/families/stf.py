"""Stable targets and the STF loss of the authors' code (golden README section 5)."""

import jax
import jax.numpy as jnp
import numpy as np
from golden_support import Golden, family, nchw, nhwc

from ogdm_jax.methods import stf


@family("stf_")
def targets(golden: Golden):
    x, sigma, references = nhwc(golden["x"]), golden["sigma"], nhwc(golden["ref"])
    for chunk in (None, 1 + len(references) // 3):
        target, ess = jax.jit(stf.stable_target, static_argnames="chunk")(x, sigma, references, chunk=chunk)
        golden.assert_close("target", nchw(target))
        np.testing.assert_allclose(ess, golden["ess"], rtol=2e-4)
    with jax.enable_x64(True):
        wide = [jnp.asarray(a, jnp.float64) for a in (x, sigma, references)]
        target, ess = stf.stable_target(*wide)
        golden.assert_close("target", nchw(target), atol=1e-12)
        np.testing.assert_allclose(ess, golden["ess"], rtol=1e-10)
