"""Stable targets and the STF loss of the authors' code (golden README section 5)."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from ogdm_jax.diffusion import noise
from ogdm_jax.methods import stf
from tests.support.families.edm import model, norms
from tests.support.golden_support import Golden, family, nchw, nhwc


@family("stf_")
def targets(golden: Golden):
    x, sigma, references = nhwc(golden["x"]), golden["sigma"], nhwc(golden["ref"])
    for chunk in (None, 1 + len(references) // 3):
        target, ess = jax.jit(stf.stable_target, static_argnames="chunk")(
            x, sigma, references, chunk=chunk
        )
        golden.assert_close("target", nchw(target))
        np.testing.assert_allclose(ess, golden["ess"], rtol=2e-4)
    with jax.enable_x64(True):
        wide = [jnp.asarray(a, jnp.float64) for a in (x, sigma, references)]
        target, ess = stf.stable_target(*wide)
        golden.assert_close("target", nchw(target), atol=1e-12)
        np.testing.assert_allclose(ess, golden["ess"], rtol=1e-10)


@family("loss_edm_stf")
def loss(golden: Golden):
    """EDM's loss with the stable target; the first entries of ref_images are the images; nothing is
    augmented.
    """
    network, variables, wrap = model(str(golden.path), golden.config["precond"])
    law = noise.edm()
    sigma = law.sigma(jnp.asarray(golden["rnd_normal"].reshape(-1)))
    np.testing.assert_allclose(sigma, golden.truth("sigma").reshape(-1), rtol=2e-6)
    x = nhwc(golden["images"]) + nhwc(golden["noise_unit"]) * sigma[:, None, None, None]
    references = jnp.asarray(nhwc(golden["ref_images"]))
    np.testing.assert_array_equal(references[: len(x)], nhwc(golden["images"]))

    def objective(params):
        fn = functools.partial(network.apply, {**variables, "params": params})
        target, _ = stf.stable_target(x, sigma, references)
        each = law.weight(sigma)[:, None, None, None] * jnp.square(wrap(fn)(x, sigma) - target)
        return jnp.sum(each) / len(x), (each, target)

    (total, (each, target)), grads = jax.jit(jax.value_and_grad(objective, has_aux=True))(
        variables["params"]
    )
    golden.assert_close("target", nchw(target), atol=5e-6)
    golden.assert_close("loss", nchw(each))
    np.testing.assert_allclose(total, golden["loss_sum_over_B"], rtol=1e-5)
    golden.assert_norms("grad_norms", norms(grads, network))
