"""Files of latent models as people have them: recognised, read, equal; others refused by name."""

import json
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from ogdm_jax.interop import diffusers, export, load_pretrained, names_latent
from ogdm_jax.interop.pretrained import from_torch
from ogdm_jax.networks import AutoencoderKL
from tests.support import golden_support, torch_files
from tests.support.families import latent
from tests.support.golden_support import nchw, nhwc

FOLDER = golden_support.FOLDER
TEXT = {"heads": 3}  # of the golden files' encoder, which is none of the published widths


def golden(name):
    return golden_support.load(str(FOLDER / f"{name}.npz"))


def written(path, state):
    save_file({name: np.ascontiguousarray(value) for name, value in state.items()}, path)
    return path


def equal(found, state):
    """The file's network has the numbers of a state dict."""
    back = export.to_torch(found.network, found.variables)
    for name, value in state.items():
        np.testing.assert_array_equal(back[name].reshape(-1), value.reshape(-1), err_msg=name)


@pytest.fixture
def dit():
    file = golden("dit_a")
    state = file.state_dict()
    state["pos_embed"] = file["buffer/pos_embed"]
    return file, state


def test_dit_and_its_denoiser(dit, tmp_path):
    file, state = dit
    found = load_pretrained(written(tmp_path / "dit.safetensors", state), heads=4)
    assert (found.kind, found.precondition, found.schedule) == ("dit", "adm", "linear")
    equal(found, {name: value for name, value in state.items() if name != "pos_embed"})
    x, y = (
        jnp.asarray(nhwc(file["x"])),
        jnp.asarray(file["y"] % file.config["kwargs"]["num_classes"]),
    )
    denoise = found.denoiser()
    sigma = jnp.full(len(x), 1.0)
    assert denoise(x, sigma, y).shape == x.shape  # eps alone: the variance is left out
    assert denoise.variance is not None


def test_a_training_checkpoint_of_dit_is_read_without_running_its_arguments(dit, tmp_path):
    file, state = dit
    book = torch_files.Book()
    tensors = lambda scale: {
        n: book.tensor(scale * v) for n, v in state.items() if n != "pos_embed"
    }
    arguments = torch_files.Call(torch_files.Name("argparse", "Namespace"))
    root = {"model": tensors(2), "ema": tensors(1), "opt": {"state": {}}, "args": arguments}
    (tmp_path / "0400000.pt").write_bytes(torch_files.zip_file(root, book))
    found = load_pretrained(tmp_path / "0400000.pt", heads=4, img_resolution=8)
    equal(found, {name: value for name, value in state.items() if name != "pos_embed"})
    assert "taken: the averaged weights at ema" in found.notes[0]


@pytest.mark.parametrize("stored", [np.float16, jnp.bfloat16, np.float64])
def test_a_table_of_positions_is_rounded_to_the_type_of_the_file(dit, stored):
    file, state = dit
    known = {"heads": 4, "img_resolution": 8}
    low = {name: value.astype(stored) for name, value in state.items()}
    assert from_torch(low, **known)[0] == from_torch(state, **known)[0]
    trained = {"pos_embed": (state["pos_embed"] + 0.01).astype(stored)}
    for table, said in ((trained["pos_embed"], "is not DiT's table"), (low["pos_embed"], None)):
        change = {"pos_embed": table if said else np.full_like(table, np.nan)}
        with pytest.raises(ValueError, match=said or "pos_embed holds numbers that are not"):
            from_torch(low | change, **known)


def test_dit_of_no_published_width_needs_its_heads(dit, tmp_path):
    with pytest.raises(ValueError, match=r"heads: .* none of the published sizes; give it as a"):
        load_pretrained(written(tmp_path / "dit.safetensors", dit[1]))


def test_autoencoder_in_all_layouts(tmp_path):
    file = golden("vae_a")
    state = file.state_dict()
    ldm = latent.ldm_vae(file) | {"loss.logvar": np.zeros(3, np.float32)}
    for i, layout in enumerate((state, ldm, latent.old_vae(file))):
        found = load_pretrained(written(tmp_path / f"{i}.safetensors", layout), groups=8)
        assert found.kind == "autoencoder"
        equal(found, state)
        decoded = found.network.apply(
            found.variables, jnp.asarray(nhwc(file["z"])), method="decode"
        )
        file.assert_close("decoded", nchw(decoded))


def single_file():
    """A whole LDM checkpoint: U-Net, autoencoder, text encoder, tables of the schedule."""
    unet, vae, text = (golden(n) for n in ("sd_unet_v1_a", "vae_a", "clip_text_sd1"))
    numbers, names = unet.state_dict(), unet.json("ldm_map")
    state = {f"model.diffusion_model.{names[name]}": numbers[name] for name in names}
    state |= {f"first_stage_model.{name}": value for name, value in latent.ldm_vae(vae).items()}
    state |= {f"cond_stage_model.transformer.{n}": v for n, v in text.state_dict().items()}
    return state | {"betas": np.linspace(0, 1, 8).astype(np.float32)}


@pytest.mark.parametrize(
    "kind,name,settings",
    [
        ("sd_unet", "sd_unet_v1_a", {"groups": 8, "heads": (4, 4, 4), "precondition": "adm"}),
        ("autoencoder", "vae_a", {"groups": 8}),
        ("clip_text", "clip_text_sd1", TEXT),
    ],
)
def test_the_networks_of_a_single_file(kind, name, settings, tmp_path):
    path = written(tmp_path / "model.safetensors", single_file())
    found = load_pretrained(path, kind=kind, **settings)
    assert found.kind == kind
    equal(found, golden(name).state_dict())


@pytest.mark.parametrize("prefix", ["", "cond_stage_model.transformer."])
def test_what_a_text_encoder_does_not_compute_with_is_left_out(prefix, tmp_path):
    """sd-v1-4.ckpt and its folder hold the positions' numbers as whole numbers."""
    ids = "text_model.embeddings.position_ids"
    state = golden("clip_text_sd1").state_dict()
    kept = {f"{prefix}{n}": v for n, v in (state | {ids: np.arange(77)[None]}).items()}
    path = written(tmp_path / "text.safetensors", kept)
    found = load_pretrained(path, "clip_text", **TEXT)
    equal(found, state)
    assert f"ignored: 1 tensors ({ids})" in found.notes and "int64" not in str(found.notes)
    assert load_pretrained(path, "clip_text", weights=False, **TEXT).network == found.network


def test_open_clips_mask_and_left_out_layers_may_be_infinite():
    """Older files of it keep the mask, and Stable Diffusion 2 leaves out the last layer."""
    state = latent.open_clip(golden("clip_text_sd2"))
    bias = "transformer.resblocks.{}.ln_1.bias".format
    infinite = {name: np.full_like(state[name], np.inf) for name in (bias(2), bias(3))}
    aside = {"attn_mask": np.full((77, 77), -np.inf, np.float32), bias(3): infinite[bias(3)]}
    from_torch(state | aside, depth=3, heads=4)
    with pytest.raises(ValueError, match=f"{bias(2)} holds numbers that are not finite"):
        from_torch(state | infinite, depth=3, heads=4)


def test_stable_diffusion_2_must_say_what_it_predicts(tmp_path):
    file = golden("sd_unet_v2_a")
    path = written(tmp_path / "unet.safetensors", file.state_dict())
    settings = {"groups": 8, "heads": tuple(file.config["kwargs"]["attention_head_dim"])}
    found = load_pretrained(path, **settings)
    with pytest.raises(ValueError, match="precondition: .* give adm .* or v "):
        found.denoiser()
    told = load_pretrained(path, precondition="v", **settings)
    assert told.schedule == "scaled_linear"
    x = jnp.asarray(nhwc(file["sample"]))
    context = jnp.asarray(file["encoder_hidden_states"])
    found = jax.eval_shape(told.denoiser(), x, jnp.full(len(x), 2.0), context)
    assert found.shape == x.shape


@pytest.mark.parametrize(
    "change,said",
    [
        ({"conv_in.weight": np.zeros((16, 9, 3, 3), np.float32)}, "an inpainting U-Net"),
        ({"conv_in.weight": np.zeros((16, 5, 3, 3), np.float32)}, "a depth-to-image U-Net"),
        ({"add_embedding.linear_1.weight": np.zeros((4, 4), np.float32)}, "Stable Diffusion XL"),
    ],
)
def test_others_of_the_family_are_refused_by_name(change, said):
    state = golden("sd_unet_v1_a").state_dict() | change
    with pytest.raises(ValueError, match=said):
        from_torch(state)


def test_a_unet_without_texts_is_refused_by_name():
    names = ("time_embedding.linear_1.weight", "down_blocks.0.resnets.0.norm1.weight")
    with pytest.raises(ValueError, match="a U-Net of diffusers without texts .UNet2DModel."):
        from_torch(dict.fromkeys((*names, "conv_in.weight"), np.zeros((8, 3, 3, 3), np.float32)))


def test_a_missing_tensor_is_named():
    state = golden("vae_a").state_dict()
    del state["decoder.conv_out.bias"]
    with pytest.raises(ValueError, match="1 missing \\(decoder.conv_out.bias\\)"):
        from_torch(state, groups=8)


def test_open_clip_keeps_the_layers_asked_for():
    file = golden("clip_text_sd2")
    network, variables = from_torch(latent.open_clip(file), depth=3, heads=4)
    out = network.apply(variables, jnp.asarray(file["input_ids"].astype(np.int32)))
    file.assert_close("penultimate_final_ln", out)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(variables))


def test_diffusers_folder_of_an_autoencoder(tmp_path):
    file = golden("vae_a")
    found = load_pretrained(written(tmp_path / "vae.safetensors", file.state_dict()), groups=8)
    network = cast(AutoencoderKL, found.network).clone(scale=0.7, shift=0.1)
    state = export.to_torch(network, found.variables)
    diffusers.write(tmp_path / "vae", network, state, sample_size=32)
    for place in ("vae", f"vae/{diffusers.WEIGHTS}"):
        back = load_pretrained(tmp_path / place)
        assert back.network == network  # nothing had to be told
        equal(back, state)
    config = tmp_path / "vae" / diffusers.CONFIG
    said = json.loads(config.read_text())
    config.write_text(json.dumps(said | {"scaling_factor": None}))
    assert load_pretrained(tmp_path / "vae").network.scale == 0.18215  # as of Stable Diffusion 1
    config.write_text(json.dumps(said | {"latents_mean": [0.0], "latents_std": [1.0]}))
    with pytest.raises(ValueError, match=r"latents_mean .*; expected one scaling_factor"):
        load_pretrained(tmp_path / "vae")


def as_diffusers(file, state):
    """A DiT's state dict under diffusers' names, by the golden file's own map."""
    rows = lambda name, cut: state[name][slice(*cut)] if cut else state[name]
    return {theirs: rows(ours, cut) for theirs, (ours, *cut) in file.json("diffusers_map").items()}


def test_dit_in_diffusers_names_is_the_authors(dit, tmp_path):
    file, state = dit
    theirs = as_diffusers(file, state)
    path = written(tmp_path / "dit.safetensors", theirs)
    found = load_pretrained(path, heads=4, img_resolution=8)
    assert (found.kind, found.precondition) == ("dit", "adm")
    assert "taken as published: precondition adm, schedule linear" in found.notes[-1]
    equal(found, {name: value for name, value in state.items() if name != "pos_embed"})
    back = names_latent.dit_to_diffusers(state, found.network.depth)
    assert back.keys() == theirs.keys()
    assert all(np.array_equal(back[name], value) for name, value in theirs.items())
    twin = "transformer_blocks.1.norm1.emb.timestep_embedder.linear_1.bias"
    with pytest.raises(ValueError, match="t_embedder.mlp.0.bias differs among the blocks"):
        from_torch(theirs | {twin: theirs[twin] + 1}, heads=4, img_resolution=8)
    del theirs["transformer_blocks.1.attn1.to_k.bias"]
    with pytest.raises(ValueError, match=r"1 missing \(transformer_blocks.1.attn1.to_k.bias\)"):
        from_torch(theirs, heads=4, img_resolution=8)


@pytest.mark.parametrize(
    "kind,field,value",
    [
        ("UNet2DConditionModel", "center_input_sample", True),
        ("UNet2DConditionModel", "norm_eps", 1e-6),
        ("UNet2DConditionModel", "only_cross_attention", True),
        ("UNet2DConditionModel", "resnet_skip_time_act", True),
        ("UNet2DConditionModel", "time_embedding_type", "fourier"),
        ("DiTTransformer2DModel", "activation_fn", "gelu"),
        ("CLIPTextModel", "layer_norm_eps", 1e-6),
    ],
)
def test_a_field_that_changes_the_arithmetic_is_refused(kind, field, value, tmp_path):
    config, file = tmp_path / diffusers.CONFIG, tmp_path / diffusers.WEIGHTS
    config.write_text(json.dumps({"_class_name": kind}))
    assert diffusers.read_about(file)
    config.write_text(json.dumps({"_class_name": kind, field: value}))
    with pytest.raises(ValueError, match=f"{field} {value!r} given; expected"):
        diffusers.read_about(file)
    config.write_text(json.dumps({"_class_name": "DiTTransformer2DModel", "norm_eps": 1e-6}))
    assert diffusers.read_about(file)  # the authors' own


def test_a_text_encoder_has_the_layers_that_its_folder_says(tmp_path):
    """Fewer than its file has, as people leave out the last ones (transformers does likewise)."""
    network, variables = from_torch(golden("clip_text_sd2").state_dict(), heads=4, quick=False)
    state = export.to_torch(network, variables)
    diffusers.write(tmp_path, network, state, num_hidden_layers=network.depth - 1)
    found = load_pretrained(tmp_path)
    assert found.network == network.clone(depth=network.depth - 1)
    behind = f"encoder.layers.{network.depth - 1}."
    equal(found, {name: value for name, value in state.items() if behind not in name})
    diffusers.write(tmp_path, network, state, num_hidden_layers=network.depth + 1)
    with pytest.raises(ValueError, match=f"missing .*encoder.layers.{network.depth}"):
        load_pretrained(tmp_path)


@pytest.mark.parametrize(
    "name", ["dit_a", "sd_unet_v1_a", "sd_unet_v2_a", "vae_a", "clip_text_sd2"]
)
def test_what_is_written_as_diffusers_has_it_is_read_back(name, tmp_path):
    file = golden(name)
    settings = {
        "dit_a": {"heads": 4, "img_resolution": 8},
        "vae_a": {"groups": 8, "scale": 0.5},
        "clip_text_sd2": {"heads": 4, "quick": False},
    }.get(name, {"groups": 8, "img_resolution": 16})
    if name.startswith("sd_unet"):
        heads = file.config["kwargs"]["attention_head_dim"]
        settings["heads"] = tuple(heads) if isinstance(heads, list) else (heads,) * 3
    network, variables = from_torch(file.state_dict(), **settings)
    diffusers.write(tmp_path / "folder", network, export.to_torch(network, variables))
    found = load_pretrained(tmp_path / "folder")
    assert found.network == network
    assert all(map(np.array_equal, *map(jax.tree.leaves, (found.variables, variables))))
    alone = load_pretrained(tmp_path / "folder", weights=False)
    assert alone.network == network and not alone.variables


def test_averages_of_a_single_file_are_taken_and_said(tmp_path):
    """LDM names them without dots: model_ema.diffusion_modelinput_blocks00weight."""
    state, at = single_file(), "model.diffusion_model."
    unet = {n: v for n, v in state.items() if n.startswith(at)}
    average = lambda name: f"model_ema.{name.removeprefix('model.').replace('.', '')}"
    state |= {average(name): 2 * value for name, value in unet.items()}
    state |= {"model_ema.decay": np.float32(0.9999), "model_ema.num_updates": np.int32(7)}
    path = written(tmp_path / "full.safetensors", {n: np.asarray(v) for n, v in state.items()})
    settings = {"kind": "sd_unet", "groups": 8, "heads": (4, 4, 4)}
    found = load_pretrained(path, **settings)
    double = {name: 2 * value for name, value in golden("sd_unet_v1_a").state_dict().items()}
    equal(found, double)
    assert found.notes[0].startswith("taken: the averaged weights at model_ema; also there: ")
    trained = load_pretrained(path, entry=at[:-1], **settings)
    equal(trained, golden("sd_unet_v1_a").state_dict())


def test_a_torch_file_is_written_without_torch(dit, tmp_path):
    state = dit[1]
    about = {"kind": "dit", "settings": {"heads": 4}}
    path = export.write(tmp_path / "dit.pt", state, about)
    found = load_pretrained(path)  # heads from the JSON beside it
    equal(found, {name: value for name, value in state.items() if name != "pos_embed"})
    export.about_path(path).write_text("[1]")  # somebody's own
    assert load_pretrained(path, heads=4).network == found.network
