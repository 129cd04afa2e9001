"""OpenAI's U-Nets from file to folder and back: they fine-tune with OGDM on their discrete process,
and sample.
"""

import shlex
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from ogdm_jax import config as configs
from ogdm_jax import data, parallel
from ogdm_jax.interop import load_pretrained, names_adm, recognise
from ogdm_jax.interop.pretrained import Pretrained
from ogdm_jax.networks import ADMUNet
from ogdm_jax.sampling import generate
from ogdm_jax.training import checkpoint, convert
from ogdm_jax.training import run as runs
from ogdm_jax.training.workdir import open_workdir
from tests.support import golden_support, tiny
from tests.support.commands import inside, ogdm

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture(scope="module")
def openai(tmp_path_factory):
    """An OpenAI U-Net of hash weights for the digits: class labels, new order of channels, learned
    variance.
    """
    folder = tmp_path_factory.mktemp("openai")
    network = ADMUNet(8, 1, 2, 10, 32, (1, 2), num_blocks=1, attn_resolutions=(4,), num_heads=2)
    state = {}
    for rank, entry in enumerate(
        sorted(names_adm.adm_entries(network, "new"), key=lambda e: e.name)
    ):
        shape = entry.torch_shape
        hashed = (
            golden_support.hash_values(int(np.prod(shape)), rank).reshape(shape).astype(np.float32)
        )
        fan = np.prod(shape[1:]) if len(shape) > 1 else 100
        scale = len(shape) == 1 and entry.name.endswith("weight")
        state[entry.name] = (hashed / np.sqrt(fan) + scale).astype(np.float32)
    save_file(state, folder / "model.safetensors")
    hidden = [
        f"--set={text}"
        for text in ("img_resolution=8", "num_heads=2", "qkv_order=new", "schedule=cosine")
    ]
    done = ogdm(folder, "convert", "model.safetensors", "--out", "work", *hidden)
    assert done.returncode == 0, done.stderr
    return folder, network, done.stdout


def test_a_converted_openai_network_is_the_files_and_comes_back(openai):
    folder, network, said = openai
    found = load_pretrained(
        folder / "model.safetensors",
        img_resolution=8,
        num_heads=2,
        qkv_order="new",
        schedule="cosine",
    )
    trained = open_workdir(folder / "work")
    jax.tree.map(np.testing.assert_array_equal, trained.params, found.variables["params"])
    assert trained.model.network == found.network == network and found.precondition == "adm"
    assert (trained.config.noise.distribution, trained.config.precondition.schedule) == (
        "ddpm",
        "cosine",
    )
    assert trained.config.precondition.learned_variance and "--config.network.kind=openai" in said
    x, sigma = jnp.ones((2, 8, 8, 1)), jnp.asarray([0.3, 20.0])
    denoisers = found.denoiser(), trained.model.denoiser(trained.params, trained.buffers)
    both = jax.jit(lambda *args: [denoise.variance(*args) for denoise in denoisers])
    ours, theirs = both(x, sigma, jnp.asarray([1, 2]))
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)

    done = ogdm(folder, "export", "work", "--out", "out.safetensors")
    assert done.returncode == 0, done.stderr
    again = load_pretrained(folder / "out.safetensors")
    assert (again.kind, again.network, again.schedule) == ("adm", network, "cosine")
    jax.tree.map(np.testing.assert_array_equal, again.variables, found.variables)


def test_betas_beside_a_network_are_its_schedule(openai, tmp_path):
    """As training programs keep them; those of latent diffusion (0.0015 to 0.0195) were taken for
    linear ones.
    """
    state = load_file(openai[0] / "model.safetensors")
    t = np.arange(4001) / 4000
    bar = np.cos((t + 0.008) / 1.008 * np.pi / 2) ** 2
    cosine = np.minimum(1 - bar[1:] / bar[:-1], 0.999)
    of_ldm = np.linspace(0.0015**0.5, 0.0195**0.5, 1000) ** 2

    def read(prefix="", given="", **beside):
        arrays = {f"{prefix}{name}": value for name, value in state.items()} | beside
        save_file(arrays, tmp_path / "beside.safetensors")
        told = {"schedule": given} if given else {}
        return load_pretrained(
            tmp_path / "beside.safetensors", img_resolution=8, num_heads=2, weights=False, **told
        )

    for prefix in ("", "net."):
        found = read(prefix, betas=cosine.astype(np.float16))
        assert (found.schedule, found.process) == ("cosine", {"diffusion_steps": 4000})
        assert not any("betas" in note for note in found.notes)
    assert read(betas=np.linspace(1e-4, 0.02, 1000)).schedule == "linear"
    assert "taken as published: precondition adm, schedule linear (--prec" in str(read().notes)
    assert "taken as published: precondition adm (--prec" in str(read(given="cosine").notes)
    with pytest.raises(ValueError, match="betas, 0.0015 to 0.0195 in 1000 steps, are none of"):
        read(betas=of_ldm)
    assert read(betas=of_ldm, given="linear").schedule == "linear"
    latent = {"first_stage_model.decoder.conv_in.weight": np.zeros((8, 4, 3, 3), np.float32)}
    with pytest.raises(ValueError, match="U-Net of a latent diffusion model without texts"):
        read("model.diffusion_model.", **latent)


def test_an_export_says_the_order_it_was_written_in(openai, monkeypatch):
    """Also where the table of published networks has one of this size in the other order, as
    64x64_diffusion.pt.
    """
    folder, network, _ = openai
    key = (
        network.model_channels,
        network.channel_mult,
        network.num_blocks,
        (2,),
        network.img_channels,
    )
    hidden = {"img_resolution": 8, "num_heads": 2, "qkv_order": "new"}
    monkeypatch.setitem(recognise._PUBLISHED, key, hidden)
    original = load_pretrained(folder / "model.safetensors")
    assert original.network == network
    done = ogdm(folder, "export", "work", "--out", "ordered.safetensors")
    assert done.returncode == 0, done.stderr
    again = load_pretrained(folder / "ordered.safetensors")
    assert again.network == network
    jax.tree.map(np.testing.assert_array_equal, again.variables, original.variables)


@pytest.mark.slow  # tests/test_pretrained.py walks the same way with an EDM checkpoint
def test_a_converted_openai_network_fine_tunes_and_samples(openai):
    """A step from the printed settings (OGDM: test_discrete_training), and samples with the learned
    variance.
    """
    folder, _, said = openai
    line = next(text for text in said.splitlines() if text.startswith("fine-tune: "))
    printed = [
        word.removeprefix("--config.") for word in shlex.split(line) if word.startswith("--config.")
    ]
    more = ["data.source=digits", "data.batch=8", "train.duration=2 steps", "optim.ramp=0 steps"]
    with inside(folder):
        config = configs.load(tiny.ROOT / "configs" / "base.py", [*printed, *more])
        run = runs.build(config, data.open_source("digits"), parallel.make_plan("pmap", 1))
        start = checkpoint.find(config.init.workdir)
    params, _ = checkpoint.load_weights(
        start, *jax.eval_shape(run.model.init, jax.random.key(0)), "ema"
    )
    state = run.init().replace(params=jax.tree.map(jnp.asarray, params))
    batch = run.plan.place_batch(next(data.batches(run.source, 8, 0)))
    _, metrics = run.compile(state)(state, run.constants(), batch, run.key)
    assert (
        np.isfinite(float(np.asarray(metrics["loss"])))
        and float(np.asarray(metrics["grad_norm"])) > 0
    )

    trained = open_workdir(folder / "work")
    settings = trained.settings(solver="ancestral", steps=2)
    images = generate.sampler(trained.model, settings, jax.devices()[:1])
    pictures = generate.generate(
        images, trained.params, trained.buffers, np.arange(2), np.zeros(2, np.int32), 2
    )
    assert np.isfinite(next(pictures)).all()


def test_upsamplers_are_refused_by_what_they_need():
    """64_256_upsampler.pt and 128_512_upsampler.pt (test_pretrained.py recognises them)."""
    for side in (256, 512):
        found = Pretrained("adm", ADMUNet(side, 6, 6, 1000, num_heads=4), {}, "adm")
        with pytest.raises(
            ValueError, match=r"an upsampler, whose input is .* \(low_res\)"
        ) as error:
            convert.check_denoiser(found, "upsampler.pt")
        assert "\n" not in str(error.value)


def test_networks_that_no_configuration_describes_are_refused(tmp_path):
    state = golden_support.load(str(GOLDEN / "gd_classifier_b.npz")).state_dict()
    save_file(state, tmp_path / "classifier.safetensors")
    for words, sentence in (
        (("classifier.safetensors", "--set", "qkv_order=old"), "expected 'legacy' or 'new'"),
        (("classifier.safetensors",), "holds a network of kind adm_encoder; expected a denoiser"),
    ):
        done = ogdm(tmp_path, "convert", *words, "--out", "work")
        assert done.returncode == 1 and sentence in done.stderr, done.stderr
