"""Averages with power-function profiles and the learning rate of EDM2's code."""

import jax.numpy as jnp
import numpy as np

from ogdm_jax.training import optim, power
from tests.support.golden_support import Golden, family


@family("edm2_phema")
def profiles(golden: Golden):
    exponents = [power.exponent(std) for std in golden["stds"]]
    np.testing.assert_allclose(exponents, golden["exponents"], rtol=1e-10)
    times, gammas = golden["ofs"], np.array([power.exponent(std) for std in golden["widths"]])
    wanted = np.array([power.exponent(std) for std in golden["wanted"]])
    found = power.products(times[:, None], gammas[:, None], 128.0, wanted[None])
    np.testing.assert_allclose(found, golden["products"], rtol=1e-10)
    weights, _ = power.coefficients(times, golden["widths"], 128, golden["wanted"])
    np.testing.assert_allclose(weights, golden["coefficients"], atol=1e-8)

    path = jnp.asarray(golden["path"], jnp.float32)
    for std, expected in zip(golden.config["stds"], golden["averages"], strict=True):
        gamma, average = power.exponent(std), path[0]
        for number, params in enumerate(path, 1):
            average = power.update(average, params, gamma, jnp.int32(number))
        np.testing.assert_allclose(average, expected, atol=2e-5)

    ramp = golden.config["rampup_Mimg"] * 1e6 / golden.config["batch"]
    rate = optim.learning_rate(
        golden.config["ref_lr"], round(ramp), golden.config["ref_batches"], "inverse_sqrt"
    )
    rates = [rate(jnp.int32(step)) for step in range(golden.config["steps"])]
    np.testing.assert_allclose(rates, golden["learning_rates"], rtol=1e-6)
