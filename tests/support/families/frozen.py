"""frozen_*: the networks that measure style, faces and regions, on hash weights; frozen_own_*: on
those of their packages, where these are installed.
"""

import json

import jax
import numpy as np
import pytest

from ogdm_jax.interop import litert, perceptual
from ogdm_jax.networks import faces, lite_graph, vgg
from tests.support import golden_support
from tests.support.golden_support import Golden, formula_images, hash_values, nchw


def _close(actual, truth: np.ndarray, share: float):
    """To a share of the largest number."""
    np.testing.assert_allclose(actual, truth, rtol=0, atol=share * np.abs(truth).max())


def _images(*shape: int) -> np.ndarray:
    return formula_images(*shape) / 127.5 - 1


def _own(package: perceptual.Package) -> None:
    if perceptual.installed(package) is None:
        pytest.skip(f"{package.title} is not installed")


@golden_support.family("frozen_vgg")
def check_vgg(golden: Golden):
    state = {f"features.{name}": v for name, v in golden.state_dict().items()}
    params = perceptual.torchvision_vgg(state | {"classifier.0.weight": np.zeros((2, 2))})
    layers, side = golden.config["layers"], golden.config["size"]
    found = jax.jit(lambda p, x: vgg.features(p, x, layers))(params, _images(2, side, side))
    for name, value in zip(layers, found, strict=True):
        golden.assert_close(name, nchw(value)[:, :: golden.config["channels"]])


@golden_support.family("frozen_irse50")
def check_irse50(golden: Golden):
    variables = perceptual.ir_se50(golden.state_dict())
    golden.assert_close("out", jax.jit(faces.IRSE50().apply)(variables, _images(2, 112, 112)))
    stride = golden.config["crop_stride"]
    crop = nchw(faces.crop_face(_images(2, 256, 256)))
    golden.assert_close("crop", crop[:, :, ::stride, ::stride])


@golden_support.family("frozen_face_api")
def check_face_api(golden: Golden):
    content = b""
    for p, entry in enumerate(json.loads(golden.config["manifest"])[0]["weights"]):
        values = hash_values(int(np.prod(entry["shape"])), p) / 3**0.5
        content += np.round((values + 1) * 127.5).astype(np.uint8).tobytes()
    weights = perceptual.read_tfjs(golden.config["manifest"].encode(), content)
    _close(jax.jit(faces.face_api)(weights, _images(2, 150, 150)), golden["out"], 1e-5)


@golden_support.family("frozen_litert")
def check_litert(golden: Golden):
    """Every operation that is known here, in one small graph."""
    graph, weights = litert.read_litert(golden["graph"].tobytes())
    assert {op.kind for op in graph.ops} == set(lite_graph.OPERATIONS)
    x = formula_images(2, *golden.config["size"]) / 255
    _close(jax.jit(lambda w, x: lite_graph.run(graph, w, x))(weights, x), golden["out"], 1e-5)


@golden_support.family("frozen_own_face_api")
def check_own_face(golden: Golden):
    _own(perceptual.FACE_API)
    network = perceptual.face_network("")
    found = jax.jit(network.forward)(network.weights, _images(2, 150, 150))
    _close(found, golden["out"], 1e-5)


@golden_support.family("frozen_own_selfie")
def check_own_selfie(golden: Golden):
    _own(perceptual.SELFIE)
    network, stride = perceptual.segmentation_network(""), golden.config["stride"]
    found = jax.jit(network.forward)(network.weights, _images(2, 256, 256))
    np.testing.assert_allclose(found[:, ::stride, ::stride], golden["out"], atol=5e-5)
    folder = perceptual.installed(perceptual.SELFIE)
    network = perceptual.segmentation_network(str(folder / "selfie_segmentation_landscape.tflite"))
    found = jax.jit(network.forward)(network.weights, _images(2, 144, 256))
    np.testing.assert_allclose(found[:, ::stride, ::stride], golden["out_landscape"], atol=5e-5)


@golden_support.family("frozen_own_hed")
def check_own_hed(golden: Golden):
    _own(perceptual.HED)
    pytest.importorskip("h5py")
    side, layers = golden.config["size"], ("relu1_2", "relu2_2", "relu3_3", "relu4_3", "relu5_3")
    network = perceptual.style_network("", layers, side)
    found = jax.jit(network.forward)(network.weights, _images(2, side, side))
    for block, value in enumerate(found, 1):
        channels = golden.config["channels"]
        _close(value[..., ::channels], golden[f"block{block}"], 1e-5)
