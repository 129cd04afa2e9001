"""Checkpoints to networks: every published name list, the authors' own numbers, round trips, and
the command line.
"""

import gzip
import json
import shlex
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from ogdm_jax.interop import (
    UnrecognisedError,
    export,
    from_torch,
    inert,
    load_pretrained,
    names_edm,
    names_inception,
    parts,
    pretrained,
    read_torch,
    recognise,
)
from ogdm_jax.networks import DhariwalUNet
from ogdm_jax.training.workdir import open_workdir
from tests.support import golden_support
from tests.support import torch_files as tf
from tests.support.commands import ogdm, script
from tests.support.families import adm
from tests.support.golden_support import nchw, nhwc
from tests.support.snapshots import published

GOLDEN = Path(__file__).parent / "golden"
# diffusers' DiT has other names and another arithmetic (tests/golden/README.md): not read
LISTS = sorted(
    set(GOLDEN.glob("fullsize/*.json.gz")) - set(GOLDEN.glob("fullsize/dit*-diffusers*"))
)


def load_list(path: Path) -> tuple[dict, dict[str, np.ndarray]]:
    """A published configuration and its state dict, in which every tensor takes the memory of one
    number.
    """
    listed = json.loads(gzip.decompress(path.read_bytes()))
    state = {name: np.broadcast_to(np.float32(0), shape) for name, shape, _ in listed["entries"]}
    for name, value in state.items():
        if (
            name.endswith(".resample_filter") and value.ndim == 4
        ):  # EDM's; constants of the constructor
            taps = np.array({2: [1, 1], 4: [1, 3, 3, 1]}[value.shape[-1]], np.float32)
            state[name] = (np.outer(taps, taps) / taps.sum() ** 2)[None, None]
    return listed, state


def same_adm(seen, told) -> bool:
    """Equal but for dropout, and for heads counted or given by their width."""
    assert [seen.heads(width) for width in seen.widths] == [
        told.heads(width) for width in told.widths
    ]
    plain = {"num_heads": 1, "head_channels": 0, "dropout": 0.0}
    return seen.clone(**plain) == told.clone(**plain)


# wider, deeper or of other images than one that stays
@pytest.mark.slow_cases(
    *("baseline-*", "edm-afhq*", "edm-ffhq*", "edm-*-cond-v?", "stf-*", "*-deep-continuous"),
    *("guided-diffusion-[25]*", "guided-diffusion-128x*", "guided-diffusion-lsun*"),
    *("guided-diffusion-64x64_c*", "dg-extractor-256", "dg-extractor-64", "dg-head-uncond"),
    *("dsg-imagenet256", "dit-[bl]*", "dit-xl2-512", "ogdm-adm-unet-celeba*", "*discriminator-64*"),
    *("sd21-unet-ldm", "sd15-unet-diffusers", "score-sde-celeba64*"),
)
@pytest.mark.parametrize("path", LISTS, ids=lambda path: path.name.removesuffix(".json.gz"))
def test_published_lists_are_recognised_with_nothing_left_over(path):
    listed, state = load_list(path)
    ((_, kind),) = recognise.places(state)
    network = pretrained.match(state).network
    if kind.startswith("adm"):  # against the network that the authors' flags name
        told, _ = adm.published(listed["constructor"]["cls"], listed["constructor"]["kwargs"])
        assert same_adm(network, told)
        return
    wanted = dict(listed["constructor"].get("kwargs", {}))
    for field in (
        "img_resolution",
        "img_channels",
        "label_dim",
        "model_channels",
        "augment_dim",
        "embedding_type",
    ):
        if field in wanted and hasattr(network, field):
            assert getattr(network, field) == wanted[field], field
    for field in ("channel_mult", "resample_filter"):
        if wanted.get(field) and hasattr(network, field):
            assert list(getattr(network, field)) == wanted[field], field


HIDDEN = {  # what the authors' flags say and shapes do not
    "guided-diffusion-64x64_diffusion": {
        "img_resolution": 64,
        "head_channels": 64,
        "qkv_order": "new",
    },
    "guided-diffusion-128x128_diffusion": {
        "img_resolution": 128,
        "num_heads": 4,
        "qkv_order": "legacy",
    },
    "guided-diffusion-256x256_diffusion": {
        "img_resolution": 256,
        "head_channels": 64,
        "label_dim": 1000,
    },
    "guided-diffusion-512x512_diffusion": {"img_resolution": 512, "attn_resolutions": (32, 16, 8)},
    "guided-diffusion-64_256_upsampler": {"img_resolution": 256, "num_heads": 4, "img_channels": 6},
    "guided-diffusion-128_512_upsampler": {
        "img_resolution": 512,
        "head_channels": 64,
        "attn_resolutions": (32, 16),
    },
    "guided-diffusion-512x512_classifier": {
        "img_resolution": 512,
        "num_blocks": 2,
        "pool": "attention",
    },
    "dsg-ffhq_10m": {
        "img_resolution": 256,
        "attn_resolutions": (16,),
        "num_blocks": 1,
        "out_channels": 6,
    },
    "ogdm-adm-unet-cifar10-32": {
        "img_resolution": 32,
        "num_heads": 1,
        "resblock_updown": False,
        "out_channels": 3,
    },
    "ogdm-adm-unet-celeba-afhq-64": {
        "img_resolution": 64,
        "channel_mult": (1, 2, 3, 4),
        "attn_resolutions": (16, 8),
    },
    "dg-extractor-32": {
        "img_resolution": 32,
        "num_blocks": 4,
        "channel_mult": (1, 2, 4),
        "attn_resolutions": (32, 16, 8),
    },
    "dg-head-cond": {
        "img_resolution": 8,
        "num_blocks": 2,
        "img_channels": 512,
        "label_dim": 1000,
        "out_channels": 1,
    },
    "dg-imagenet-latent-extractor": {
        "img_resolution": 32,
        "img_channels": 4,
        "channel_mult": (1, 2, 3),
    },
}


@pytest.mark.parametrize("name", HIDDEN)
def test_settings_of_openai_models(name):
    _, state = load_list(GOLDEN / "fullsize" / f"{name}.json.gz")
    shapes = {key: value.shape for key, value in state.items()}
    settings = (
        recognise.adm_settings if recognise.kind_of(shapes) == "adm" else recognise.encoder_settings
    )
    found = settings(shapes, {})
    assert {field: found[field] for field in HIDDEN[name]} == HIDDEN[name]
    assert settings(shapes, {"qkv_order": "new", "dropout": 0.3})["dropout"] == 0.3


def golden_case(name: str):
    golden = golden_support.load(str(GOLDEN / f"{name}.npz"))
    return golden, golden.state_dict()


EDM = sorted(
    path.stem for pattern in ("edm_*.npz", "precond_*.npz") for path in GOLDEN.glob(pattern)
)


def snapshot(name: str, folder: Path) -> Path:
    """A golden file's network as the authors save it."""
    golden, state = golden_case(name)
    attributes = {"sigma_data": 0.5} if golden.config["cls"] == "EDMPrecond" else {}
    ema = tf.network(
        state, tf.pickled_tensor, golden.config["cls"], _init_kwargs={"dropout": 0.13}, **attributes
    )
    path = folder / "network-snapshot-000001.pkl"
    path.write_bytes(tf.pickled({"ema": ema, "augment_pipe": None}))
    return path


@pytest.mark.parametrize("name,value", [("beta_d", 10.0), ("M", 4000), ("C_2", 0.01)])
def test_a_process_of_other_constants_is_refused(name, value):
    node = inert.Module("VPPrecond", {"beta_d": 19.9, "beta_min": 0.1, "M": 1000})
    part = parts.Part("", "", "edm", {}, node)
    assert pretrained.describe(part) == {"precondition": "vp"}
    node.state[name] = value
    with pytest.raises(ValueError, match=f"VPPrecond: {name} {value} given; expected"):
        pretrained.describe(part)


@pytest.mark.slow_cases("edm_*_b", "precond_*")
@pytest.mark.parametrize("name", EDM)
def test_snapshots_of_the_authors_are_recognised(name, tmp_path):
    """The pickle alone gives the network that the authors' arguments give, with the same variables,
    bit for bit.
    """
    golden, state = golden_case(name)
    found = load_pretrained(snapshot(name, tmp_path))
    assert found.kind == "edm" and found.dropout == 0.13 and found.network.dropout == 0.0
    assert (
        found.precondition == pretrained._CLASSES[golden.config["cls"]] and found.sigma_data == 0.5
    )
    told = names_edm.edm_network(golden.config["kwargs"], golden.config["cls"])
    seen, wanted = (export.network_settings(network) for network in (found.network, told))
    for settings in (seen, wanted):
        settings["out_channels"] = settings["out_channels"] or settings["img_channels"]
        settings.pop("dropout")
        if isinstance(
            told, DhariwalUNet
        ):  # heads have 64 channels: narrower levels do not attend, whatever is asked
            narrow = [told.model_channels * mult < 64 for mult in told.channel_mult]
            wide = [
                told.img_resolution >> level for level, skipped in enumerate(narrow) if not skipped
            ]
            settings["attn_resolutions"] = [
                side for side in settings["attn_resolutions"] if side in wide
            ]
    assert seen == wanted
    network, variables = found
    assert network is found.network
    jax.tree.map(np.testing.assert_array_equal, variables, names_edm.edm_to_flax(state, told))


@pytest.mark.parametrize("name", EDM[-1:])
def test_snapshots_of_the_authors_give_their_numbers(name, tmp_path):
    golden, _ = golden_case(name)
    found = load_pretrained(snapshot(name, tmp_path))

    def optional(key):
        value = golden[key] if key in golden else None
        return None if value is None or value.shape[-1] == 0 else jnp.asarray(value)

    x, sigma = jnp.asarray(nhwc(golden["x"])), jnp.asarray(golden["sigma"]).reshape(-1)
    denoise = jax.jit(found.denoiser(optional("augment_labels")))
    denoised = denoise(x, sigma, optional("class_labels"))
    golden.assert_close("D_x", nchw(denoised))


def test_inception_in_both_layouts():
    _, state = load_list(GOLDEN / "fullsize" / "inception-fid-2015-12-05.json.gz")
    network = pretrained.match(state).network
    assert network.num_classes == 1008
    wrapped = {}
    for i, block in enumerate(names_inception._BLOCKS):
        for j, module in enumerate(block):
            wrapped |= {
                f"blocks.{i}.{j}.{n.partition('.')[2]}": v
                for n, v in state.items()
                if n.startswith(f"{module}.")
            }
    assert len(wrapped) == len(state) - 2 and pretrained.match(wrapped).network == network
    with pytest.raises(ValueError, match=r"1 missing \(Mixed_7c"):
        pretrained.match({n: v for n, v in state.items() if n != "Mixed_7c.branch1x1.bn.weight"})


def test_inception_in_nvidias_layout():
    """Spot checks of names and shapes of the TensorFlow graph, then all 378 tensors, with nothing
    left over.
    """
    _, state = load_list(GOLDEN / "fullsize" / "inception-fid-2015-12-05.json.gz")
    theirs = {}
    back = {f"{block}.{ours}": f"{name}.{layer}" for name, block, layer, ours in nvidia_layers()}
    tensors = {value: name for name, value in names_inception._TENSORS.items()}
    for name, value in state.items():
        module, _, tensor = name.rpartition(".")
        module, _, kind = module.rpartition(".")
        if name.startswith("fc."):
            theirs[f"output.{tensor}"] = value
        elif f"{kind}.{tensor}" in tensors and f"{kind}.{tensor}" != "bn.weight":
            theirs[
                f"layers.{back.get(module) or NVIDIA_STEM[module]}.{tensors[f'{kind}.{tensor}']}"
            ] = value
    for name, shape in {
        "layers.conv.weight": (32, 3, 3, 3),
        "layers.conv_4.beta": (192,),
        "layers.mixed.tower.conv_1.weight": (64, 48, 5, 5),
        "layers.mixed_3.conv.weight": (384, 288, 3, 3),
        "layers.mixed_4.tower_1.conv_4.weight": (192, 128, 1, 7),
        "layers.mixed_8.tower_1.conv_2.var": (192,),
        "layers.mixed_9.tower.mixed.conv_1.weight": (384, 384, 3, 1),
        "layers.mixed_10.tower_2.conv.mean": (192,),
        "output.weight": (1008, 2048),
    }.items():
        assert theirs[name].shape == shape, name
    assert len(theirs) == 94 * 4 + 2
    assert recognise.kind_of({name: value.shape for name, value in theirs.items()}) == "inception"
    network = pretrained.match(theirs).network
    assert network.num_classes == 1008
    theirs["layers.mixed.tower.conv_1.weight"] = np.zeros((64, 48, 3, 3))
    with pytest.raises(ValueError, match="1 misshapen .layers.mixed.tower.conv_1.weight"):
        pretrained.match(theirs)


NVIDIA_STEM = {
    "Conv2d_1a_3x3": "conv",
    "Conv2d_2a_3x3": "conv_1",
    "Conv2d_2b_3x3": "conv_2",
    "Conv2d_3b_1x1": "conv_3",
    "Conv2d_4a_3x3": "conv_4",
}


def nvidia_layers():
    """(their block, our block, their layer, our layer) of every convolution in a block."""
    for name, block in names_inception._MIXED.items():
        for layer, ours in names_inception._LAYERS[name].items():
            yield name, block, layer, ours


def test_nvidias_norms_have_scale_one():
    leaves = {"conv.weight": (4, 3, 1, 1), "beta": 4, "mean": 4, "var": 4}
    state = {
        f"layers.conv.{name.removeprefix('conv.')}": np.full(shape, 2.0)
        for name, shape in leaves.items()
    }
    raw = {names_inception.raw_name(name) for name in state}
    assert raw == {
        f"Conv2d_1a_3x3.{n}"
        for n in ("conv.weight", "bn.bias", "bn.running_mean", "bn.running_var")
    }
    assert names_inception.scales_left_out(raw) == ["Conv2d_1a_3x3.bn.weight"]
    assert names_inception.scales_left_out(raw | {"Conv2d_1a_3x3.bn.weight"}) == []


def small() -> dict[str, np.ndarray]:
    return golden_case("edm_ddpmpp_b")[1]


def test_prefixes_are_understood():
    state = small()
    _, plain = from_torch(state)
    for prefixed in (
        {f"module.{name}": value for name, value in state.items()},
        {name.removeprefix("model."): value for name, value in state.items()},
    ):
        network, variables = from_torch(prefixed, "edm", dropout=0.2)
        assert network.dropout == 0.2
        jax.tree.map(np.testing.assert_array_equal, variables, plain)


def test_half_precision_becomes_float32():
    state = {name: value.astype(np.float16) for name, value in small().items()}
    assert {leaf.dtype for leaf in jax.tree.leaves(from_torch(state)[1])} == {np.dtype("f4")}


def test_mismatches_are_listed_in_one_sentence():
    state = small()
    first, second, third = [name for name in state if name.endswith("block0.norm1.weight")][:3]
    del state[first]
    state[second] = state[second][:-1]
    state["model.enc.extra.weight"] = state[third]
    with pytest.raises(ValueError) as caught:
        from_torch(state)
    message = str(caught.value)
    assert f"1 missing ({first})" in message and "1 unexpected (model.enc.extra.weight)" in message
    assert f"1 misshapen ({second} (" in message and "\n" not in message
    cases = [
        (lambda s: from_torch(s, "sdxl"), "kind: 'sdxl' given; expected one of edm"),
        (lambda s: from_torch(s, "edm", width=3), "unknown setting 'width'"),
        (
            lambda s: from_torch({"a": np.ones(3), "b": np.ones(2)}),
            r"2 tensors \(a, b, \.\.\.\) of no known network",
        ),
        (lambda s: from_torch({}), "0 tensors"),
    ]
    for call, words in cases:
        with pytest.raises(ValueError, match=words):
            call(small())


ADM = sorted(
    path.stem
    for pattern in ("gd_unet_*.npz", "gd_classifier_*.npz")
    for path in GOLDEN.glob(pattern)
)


@pytest.mark.parametrize("name", ADM)
def test_openai_models_are_recognised(name):
    """With what shapes hide given, the tensors give the network of the authors' arguments, and go
    back bit for bit.
    """
    golden, state = golden_case(name)
    arguments = golden.config["kwargs"]
    told = adm.encoder(arguments) if "pool" in arguments else adm.unet(arguments)
    heads: dict[str, Any] = (
        {"head_channels": told.head_channels}
        if told.head_channels
        else {"num_heads": told.num_heads}
    )
    order = adm.order(arguments)
    network, variables = from_torch(
        state, img_resolution=told.img_resolution, qkv_order=order, **heads, dropout=told.dropout
    )
    assert same_adm(network, told)
    if order == "legacy":
        back = export.to_torch(network, variables)
        assert set(back) == set(state)
        for tensor, value in state.items():
            np.testing.assert_array_equal(back[tensor], value)


@pytest.mark.parametrize("name", sorted(path.stem for path in GOLDEN.glob("dg_disc_*.npz")))
def test_discriminator_guidance(name):
    golden = golden_support.load(str(GOLDEN / f"{name}.npz"))
    for part in ("extractor", "head"):
        told, _ = adm.published("create_classifier", golden.config[f"{part}_kwargs"])
        network, _ = from_torch(golden.state_dict(f"{part}_"))
        assert same_adm(network, told)


def test_unpublished_openai_models_need_what_shapes_hide():
    golden, state = golden_case("gd_unet_a")
    shapes = {name: value.shape for name, value in state.items()}
    with pytest.raises(UnrecognisedError, match="img_resolution: the tensors do not show it"):
        recognise.adm_settings(shapes, {})
    with pytest.raises(UnrecognisedError, match=r"head_channels \(or num_heads\)"):
        recognise.adm_settings(shapes, {"img_resolution": 16})
    found = recognise.adm_settings(shapes, {"img_resolution": 16, "head_channels": 16})
    assert (
        found["attn_resolutions"] == (8,)
        and found["label_dim"] == 10
        and found["out_channels"] == 6
    )


@pytest.mark.parametrize("name", ["ogdm_disc_r8", "ogdm_disc_r16", "ogdm_disc_r8_labels"])
def test_discriminators(name):
    golden, state = golden_case(name)
    network, variables = from_torch(state)
    assert network.img_resolution == golden["x"].shape[-1] if "x" in golden else True
    assert network.label_dim == golden.config.get("kwargs", {}).get("label_dim", network.label_dim)
    assert jax.tree.leaves(variables)


# the command line


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("interop")
    source = published(folder)
    done = ogdm(folder, "convert", source.name, "--out", "work")
    assert done.returncode == 0, done.stderr
    return folder, source, done.stdout


def test_converted_weights_are_the_files(converted):
    folder, source, _ = converted
    found, trained = load_pretrained(source), open_workdir(folder / "work")
    jax.tree.map(np.testing.assert_array_equal, trained.params, found.variables["params"])
    assert trained.model.network.clone(dropout=0.0) == found.network and trained.step == 0
    assert trained.config.network.dropout == 0.1 and trained.config.data.conditional


def test_export_and_back_is_bit_equal(converted):
    folder, source, _ = converted
    for words in (
        ("export", "work", "--out", "one.safetensors"),
        ("convert", "one.safetensors", "--out", "again"),
        ("export", "again", "--out", "two.safetensors"),
    ):
        done = ogdm(folder, *words)
        assert done.returncode == 0, done.stderr
    assert (folder / "one.safetensors").read_bytes() == (folder / "two.safetensors").read_bytes()
    assert (folder / "one.json").read_bytes() == (folder / "two.json").read_bytes()
    original, exported = read_torch(source), load_file(folder / "one.safetensors")
    for name, value in original.items():
        np.testing.assert_array_equal(exported[name], value)
    assert all(name.endswith(".resample_filter") for name in set(exported) - set(original))
    assert load_pretrained(folder / "one.safetensors").precondition == "edm"


@pytest.mark.slow
def test_a_converted_checkpoint_fine_tunes_with_ogdm_and_samples(converted):
    """The documented commands: ten OGDM steps from the converted weights, then a grid."""
    folder, _, said = converted
    line = next(text for text in said.splitlines() if text.startswith("fine-tune: "))
    flags = shlex.split(line.partition(" train ")[2])
    assert "--config.data.source=digits" in flags and flags[-2:] == ["--workdir", "work-tuned"]
    more = "methods=ogdm data.batch=16 train.duration=10,steps log.every=5,steps "
    more += "sample.every=0,steps log.tensorboard=false ogdm.channel_base=64 ogdm.channel_max=8 sample.num=4 sample.steps=3"
    extra = [f"--config.{text.replace(',', ' ')}" for text in more.split()]
    done = script(folder, "train.py", *flags, *extra)
    assert done.returncode == 0, done.stderr
    assert "fine-tuning the ema weights" in done.stdout
    lines = [
        json.loads(text)
        for text in (folder / "work-tuned" / "metrics.jsonl").read_text().splitlines()
    ]
    assert lines[-1]["step"] == 10 and np.isfinite(lines[-1]["loss"])
    done = script(
        folder,
        "sample.py",
        "--workdir",
        "work-tuned",
        "--num",
        "4",
        "--steps",
        "3",
        "--out",
        "tuned.npz",
    )
    assert done.returncode == 0, done.stderr
    with np.load(folder / "tuned.npz") as saved:
        assert any(value.shape == (4, 8, 8, 1) for value in saved.values())


def test_show_and_refusals_on_the_command_line(converted, tmp_path):
    folder, source, _ = converted
    done = ogdm(folder, "show", source.name, "--tensors")
    assert (
        done.returncode == 0
        and "edm, SongUNet" in done.stdout
        and "model.map_layer0.weight" in done.stdout
    )
    assert "precondition: edm" in done.stdout
    evil = tf.pickled(tf.Call(tf.Name("os", "system"), ("touch executed",)))
    (tmp_path / "evil.pkl").write_bytes(evil)
    for words, sentence in (
        (("show", "evil.pkl"), "it names os.system"),
        (("show", "missing.pt"), "there is no such file"),
        (("convert", str(source), "--out", str(folder / "work")), "already holds checkpoints"),
        (("show", str(source), "--entry", "disc"), "no part disc"),
        (("export", str(folder / "work"), "--out", "x.bin"), "ends in .safetensors"),
        (("show", str(source), "--set", "dropout"), "expected NAME=VALUE"),
    ):
        done = ogdm(tmp_path, *words)
        assert done.returncode == 1 and sentence in done.stderr, (words, done.stderr)
        assert len(done.stderr.strip().splitlines()) == 1 and done.stderr.startswith("error: ")
    assert not (tmp_path / "executed").exists()
