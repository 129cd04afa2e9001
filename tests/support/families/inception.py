"""inception_*: FID's InceptionV3 on hash weights, both uint8 routes, and the resized images
themselves.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from ogdm_jax.interop.names_inception import inception_to_flax
from ogdm_jax.networks.inception import InceptionV3, prepare, resize
from tests.support import golden_support
from tests.support.golden_support import Golden, nchw, nhwc


@golden_support.family("inception_")
def check_inception(golden: Golden):
    state = golden.state_dict()
    network = InceptionV3(num_classes=len(state["fc.bias"]))
    variables = inception_to_flax(state, network)
    run = jax.jit(functools.partial(network.apply, method="features"))

    out = run(variables, nhwc(golden["x"]))
    golden.assert_close("pool3", out["pool3"])
    loose = 20 * golden.config["f32_vs_f64"]["pool3"]["max_abs_diff"]
    names = {"block0_mean": "64", "block1_mean": "192", "block2_mean": "768", "logits": "logits"}
    for name, ours in (names | {"logits_unbiased": "logits_unbiased"}).items():
        golden.assert_close(name, out[ours], atol=max(loose, 2e-6 * np.abs(golden[name]).max()))

    images = jnp.asarray(nhwc(golden["x_uint8"]))
    tf, half = (
        jax.jit(prepare)(images),
        jax.jit(functools.partial(prepare, route="pytorch_fid"))(images),
    )
    out = run(
        variables, jnp.concatenate([tf, half])
    )  # one batch of both routes: one compilation at this size
    out = jax.tree.map(np.asarray, out)
    n = len(images)
    golden.assert_close("tf_pool3", out["pool3"][:n])
    loose = max(golden.tolerance("tf_pool3"), loose)
    for name, ours in {f"tf_{k}": k for k in ("64", "192", "768", "logits_unbiased")}.items():
        golden.assert_close(name, out[ours][:n], atol=max(loose, 2e-6 * np.abs(golden[name]).max()))
    golden.assert_close("pytorch_fid_pool3_of_uint8", out["pool3"][n:], atol=loose)

    resized = nchw(resize(images))
    golden.assert_close(
        "tf_resize_stride13", resized[:1, :, ::13, ::13], atol=5e-4
    )  # positions in float32 there
    np.testing.assert_allclose(
        resized.sum((2, 3), dtype=np.float64), golden["tf_resize_sum"], rtol=1e-6
    )
    halfpixel = nchw(resize(images / jnp.float32(255), half_pixel=True))
    golden.assert_close("halfpixel_resize_stride13", halfpixel[:1, :, ::13, ::13], atol=2e-6)
