"""Stable Diffusion from the command line: a tiny folder as diffusers writes it, prompts, pictures."""

import argparse
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from ogdm_jax.cli import prompts, sample
from ogdm_jax.config import ConfigError
from ogdm_jax.data.pictures import save_png
from ogdm_jax.diffusion.process import betas
from ogdm_jax.interop import (
    diffusers,
    export,
    load_pretrained,
    names_latent,
    stable_diffusion,
)
from ogdm_jax.methods import cfg
from ogdm_jax.networks import AutoencoderKL, CLIPText, UNet2DCondition
from ogdm_jax.sampling.generate import seed_noise
from ogdm_jax.training import foreign
from tests.support import sd_folder, tiny
from tests.support.golden_support import FOLDER, Golden

WORDS = ("--guidance", "cfg", "--cfg.weight", "7.5", "--steps", "3", "--size", "16")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    golden = Golden(FOLDER / "sd_pipeline_v1.npz")
    return sd_folder.write(golden, tmp_path_factory.mktemp("sd"))


def run(folder, out, *words):
    sample.main(["--workdir", str(folder), "--out", str(out), *words])


@pytest.mark.slow
def test_pictures_of_prompts(folder, tmp_path):
    """An image depends on its seed and its text alone; texts and size are in the record."""
    texts = ["a photo of a cat", "the dog"]
    lines = tmp_path / "texts.txt"
    lines.write_text("\n".join(texts) + "\n")
    both = tmp_path / "both.npz"
    run(folder, both, "--prompts", str(lines), "--negative", "red car", *WORDS)
    images = np.load(both)["images"]
    assert images.shape == (2, 16, 16, 3)
    second = tmp_path / "second.npz"
    run(folder, second, "--prompt", texts[1], "--seeds", "1", "--negative", "red car", *WORDS)
    np.testing.assert_allclose(np.load(second)["images"][0], images[1], atol=1)
    record = json.loads((tmp_path / "both.npz.json").read_text())["drawn_with"]
    assert record["--prompt"] == texts and record["--negative"] == "red car"
    assert record["--size"] == 16 and record["--solver"] == "ddim" and record["--end"] == "first"
    other = tmp_path / "other.npz"
    run(folder, other, "--prompt", texts[0], "--seeds", "1", "--negative", "red car", *WORDS)
    assert np.abs(np.load(other)["images"][0].astype(int) - images[1]).max() > 2


def test_a_file_of_prompts_from_windows(tmp_path):
    """Its mark and its line ends are no part of a text; what else Unicode calls a line end is."""
    path = tmp_path / "texts.txt"
    path.write_bytes(b"\xef\xbb\xbf" + "a cat\r\na\u2028dog\r\n".encode())
    args = argparse.Namespace(prompts=str(path), prompt=[])
    assert prompts.read(args) == ["a cat", "a\u2028dog"]


def test_what_a_scheduler_says_further_is_said():
    """Fields that change the numbers and are not followed; not those that hold anyway."""
    told = {"_class_name": "DPMSolverMultistepScheduler", "beta_schedule": "scaled_linear"}
    told |= {"beta_start": 0.00085, "beta_end": 0.012, "solver_order": 2, "thresholding": False}
    assert not stable_diffusion.scheduler_settings(told)[1]
    _, (order, karras) = stable_diffusion.scheduler_settings(
        told | {"use_karras_sigmas": True, "solver_order": 3}
    )
    assert "solver_order 3" in order and "use_karras_sigmas True" in karras
    told["_class_name"] = "PNDMScheduler"
    assert "skip_prk_steps False" in stable_diffusion.scheduler_settings(told)[1][0]
    assert not stable_diffusion.scheduler_settings(told | {"skip_prk_steps": True})[1]


def test_every_field_of_a_scheduler_is_followed_or_said():
    """Fields that solvers here have are followed (once compared with diffusers 0.42 to 6e-6, but
    for bh1, NaN there), the rest and the unknown named; what no model can do is refused.
    """
    told = {"_class_name": "DPMSolverMultistepScheduler", "beta_schedule": "scaled_linear"}
    told |= {"beta_start": 0.00085, "beta_end": 0.012, "lambda_min_clipped": -np.inf}
    settings, left = stable_diffusion.scheduler_settings(
        told | {"algorithm_type": "sde-dpmsolver++", "steps_offset": 1, "_diffusers_version": "1"}
    )
    assert not left and settings["sample.solver"] == "dpmpp_2m_sde" and settings["sample.eta"] == 1
    unipc = told | {"_class_name": "UniPCMultistepScheduler", "solver_order": 3}
    settings, left = stable_diffusion.scheduler_settings(unipc | {"solver_type": "bh1"})
    assert not left and (settings["sample.order"], settings["sample.bh"]) == (3, "bh1")
    odd = {"thresholding": True, "steps_offset": 0, "sigma_min": 0.1, "of_tomorrow": 7}
    _, left = stable_diffusion.scheduler_settings(told | odd | {"use_lu_lambdas": True})
    assert len(left) == 5 and all(any(name in said for said in left) for name in odd)
    assert "of_tomorrow 7 of the scheduler, which is not known" in "".join(left)
    for change, said in (
        ({"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr true with prediction_type"),
        ({"timestep_spacing": "cosine"}, "timestep_spacing 'cosine' given; expected one of"),
        ({"prediction_type": "sample"}, "prediction_type 'sample' given"),
        ({"prediction_type": ["epsilon"]}, r"prediction_type \['epsilon'\] given"),
        ({"timestep_spacing": {}}, r"timestep_spacing \{\} given"),
        ({"beta_schedule": ["linear"]}, r"betas \['linear'\] from"),
        ({"num_train_timesteps": "1000"}, "of 1000 steps given"),
    ):
        with pytest.raises(ConfigError, match=said):
            stable_diffusion.scheduler_settings(told | change)


@pytest.mark.parametrize("name", ["linear", "scaled_linear"])
def test_betas_of_other_numbers_of_steps_are_those_of_the_file(name):
    """Ours are times 1000 / T, as guided-diffusion's; diffusers' ends hold whatever T is."""
    power, (first, last) = {"linear": (1, (1e-4, 0.02)), "scaled_linear": (2, (85e-5, 0.012))}[name]
    told = {"beta_schedule": name, "num_train_timesteps": 500}
    ends = {"beta_start": 2 * first, "beta_end": 2 * last}
    settings, _ = stable_diffusion.scheduler_settings(told | ends)
    theirs = np.linspace((2 * first) ** (1 / power), (2 * last) ** (1 / power), 500) ** power
    found = betas(*(settings[f"precondition.{key}"] for key in ("schedule", "diffusion_steps")))
    np.testing.assert_allclose(found, theirs, rtol=1e-12)
    for steps in (500, 0):  # those of 1,000 steps
        with pytest.raises(ConfigError, match=f"of {steps} steps given; expected scaled_linear"):
            told |= {"beta_start": first, "beta_end": last, "num_train_timesteps": steps}
            stable_diffusion.scheduler_settings(told)
    words = ("precondition.kind=adm", f"precondition.schedule={name}")
    config = tiny.config("network.kind=openai", *words, "precondition.diffusion_steps=500")
    written = stable_diffusion.scheduler_config(config)
    assert (written["beta_start"], written["beta_end"]) == tuple(ends.values())


def test_half_precision_variants_are_found_and_named(folder, tmp_path):
    """model.fp16.safetensors, and the list of its shards, where the plain file is absent."""
    half = tmp_path / "half"
    shutil.copytree(folder, half)
    plain = half / "unet" / "diffusion_pytorch_model.safetensors"
    plain.rename(plain.with_suffix(".fp16.safetensors"))
    text = load_file(half / "text_encoder" / "model.safetensors")
    shards = {f"model.fp16-0000{i + 1}-of-00002.safetensors": [*text][i::2] for i in range(2)}
    for name, own in shards.items():
        save_file({key: text[key] for key in own}, half / "text_encoder" / name)
    listed = {"weight_map": {key: name for name, own in shards.items() for key in own}}
    (half / "text_encoder" / "model.safetensors.index.fp16.json").write_text(json.dumps(listed))
    (half / "text_encoder" / "model.safetensors").unlink()
    vae = half / "vae" / "diffusion_pytorch_model.safetensors"
    shutil.copy(vae, vae.with_suffix(".fp16.safetensors"))
    found, plainly = (stable_diffusion.open_model(place) for place in (half, folder))
    for name in ("unet", "vae", "text"):
        ours, theirs = getattr(found, name), getattr(plainly, name)
        assert ours.network == theirs.network
        jax.tree.map(np.testing.assert_array_equal, ours.variables, theirs.variables)
    assert [note for note in found.notes if "taken" in note] == [
        "unet: taken: diffusion_pytorch_model.fp16.safetensors",
        "vae: taken: diffusion_pytorch_model.safetensors; also there: "
        "diffusion_pytorch_model.fp16.safetensors",
        "text_encoder: taken: model.safetensors.index.fp16.json",
    ]
    assert not any("taken" in note for note in plainly.notes)


@pytest.mark.slow
def test_a_style_is_followed_through_the_decoder(folder, tmp_path):
    """DSG's loss sees decoded pictures: they come nearer to the example than without it."""
    picture, network = tmp_path / "style.png", tmp_path / "network.py"
    save_png(picture, np.full((16, 16, 3), 1.0))
    network.write_text("def mean(x):\n    return x.mean((1, 2))\n")
    words = ("--prompt", "a cat", "--eta", "1", "--solver", "ddim", "--steps", "8", "--size", "16")
    plain, guided = tmp_path / "plain.npz", tmp_path / "guided.npz"
    run(folder, plain, *words)
    task = ("--task", "embedding", "--task.network", f"{network}:mean", "--input", str(picture))
    run(folder, guided, *words, "--guidance", "cfg,dsg", "--dsg.rate", "0.5", *task)
    with np.load(guided) as found:  # floats, as of every task
        name = next(n for n in found.files if found[n].ndim == 4 and n != "inputs")
        near = found[name].mean()
    assert near > np.load(plain)["images"].mean() / 127.5 - 1 + 0.1


@pytest.mark.parametrize(
    "words,said",
    [
        ((), "--prompt: not given"),
        (("--prompt", "a", "--prompts", "f"), "--prompt, --prompts: both given"),
        (("--prompt", "a", "--size", "10"), "--size: 10 given; expected a multiple of 8"),
        (("--prompt", "a", "--negative", "b"), "--negative: given without guidance"),
        (
            ("--prompt", "a", "--negative", "b", "--guidance", "autoguidance"),
            "--negative: given without guidance",
        ),
        (("--prompt", "a", "--prediction", "v_prediction"), "--prediction: v_prediction given"),
        (("--prompt", "a", "--label", "3"), "--label: 3 given, but the model is unconditional"),
        (("--prompt", "a", "--evaluate"), "--evaluate: the model's training data"),
    ],
)
def test_what_cannot_be_is_refused(folder, tmp_path, words, said):
    args = sample.parser().parse_args(
        ["--workdir", str(folder), "--out", str(tmp_path / "x.png"), *words]
    )
    with pytest.raises(ConfigError, match=said):
        sample.read(args)


@pytest.mark.slow
def test_a_single_file(folder, tmp_path):
    """The same parts in one file of LDM's prefixes, with its names of the U-Net; what such a file
    lacks is asked for.
    """
    unet = UNet2DCondition(
        img_resolution=8,
        widths=(32, 64),
        attends=(True, False),
        heads=(8, 8),
        context_dim=768,
        num_blocks=1,
    )
    vae = AutoencoderKL(widths=(32, 32), num_blocks=1)
    text = CLIPText(vocabulary=604, depth=1, hidden=32)
    key, tokens = jax.random.key(0), jnp.zeros((1, 77), jnp.int32)
    variables = (
        unet.init(key, jnp.zeros((1, 8, 8, 4)), jnp.zeros(1), jnp.zeros((1, 1, 768))),
        vae.init(key, jnp.zeros((1, 16, 16, 3))),
        text.init(key, tokens),
    )
    states = [export.to_torch(n, v) for n, v in zip((unet, vae, text), variables)]
    names = {ours: theirs for theirs, ours in names_latent.ldm_unet_names(unet).items()}
    states[0] = {names[name]: value for name, value in states[0].items()}
    prefixes = "model.diffusion_model.", "first_stage_model.", "cond_stage_model.transformer."
    state = {
        p + name: np.ascontiguousarray(v) for p, s in zip(prefixes, states) for name, v in s.items()
    }
    file = tmp_path / "sd.safetensors"
    save_file(state, file)
    with pytest.raises(ConfigError, match="--tokenizer: not given, and a single file"):
        foreign.open_model(file)
    found = foreign.open_model(file, tokenizer=str(folder / "tokenizer"))
    kept = (found.buffers["vae"], found.buffers["text"], {"params": found.params})
    for ours, theirs in zip(kept, (*variables[1:], variables[0]), strict=True):
        jax.tree.map(np.testing.assert_array_equal, ours, jax.device_get(theirs))
    assert found.config.sample.solver == "plms" and found.config.sample.grid == "leading"


def test_an_autoencoder_of_other_latents_is_refused(folder, tmp_path):
    network, _ = load_pretrained(folder / "vae")
    zeros = lambda leaf: np.zeros(leaf.shape, np.float32)
    other = network.clone(latent_channels=8)
    image = jax.ShapeDtypeStruct((1, 16, 16, 3), jnp.float32)
    shapes = jax.eval_shape(other.init, jax.eval_shape(lambda: jax.random.key(0)), image)
    state = export.to_torch(other, jax.tree.map(zeros, shapes))
    diffusers.write(tmp_path / "vae", other, state)
    with pytest.raises(ConfigError, match="--vae: .* expected an autoencoder of 4 latent channels"):
        foreign.open_model(folder, size=16, vae=str(tmp_path / "vae"))
    with pytest.raises(ValueError, match="holds a network of kind clip_text; expected autoencoder"):
        foreign.open_model(folder, size=16, vae=str(folder / "text_encoder"))


def test_samples_in_python(folder):
    """TrainedModel.sample takes texts, and gives the pictures of the golden pipeline's parts."""
    trained = foreign.open_model(folder, size=16)
    guidance = cfg.guidance(5.0)
    pictures = trained.sample(2, prompt="a cat", negative="the dog", guidance=guidance, steps=2)
    assert pictures.shape == (2, 16, 16, 3) and np.isfinite(pictures).all()
    with pytest.raises(ConfigError, match="prompt"):
        trained.sample(1)
    with pytest.raises(ConfigError, match="prompt"):
        trained.path([0])
    latents, _ = seed_noise(jnp.arange(2, dtype=jnp.uint32), trained.model.image_shape)
    assert latents.shape == (2, 4, 4, 4) and jax.tree.leaves(trained.buffers)
