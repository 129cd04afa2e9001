"""score_sde's checkpoints as they were released, from the file to samples; the sub-VP and discrete
VE processes.
"""

import numpy as np
import pytest

from ogdm_jax.diffusion import noise, process, score_sde
from ogdm_jax.interop import (
    UnrecognisedError,
    from_torch,
    load_pretrained,
    names_score_sde,
    pretrained,
    read_torch,
)
from ogdm_jax.networks import SongUNet
from ogdm_jax.training.workdir import open_workdir
from tests.support import golden_support
from tests.support import torch_files as tf
from tests.support.commands import arrays, ogdm


def released(path, name, change=lambda ema: ema):
    """A file with the layout of the authors' save_checkpoint: weights times two are the average."""
    golden = golden_support.load(str(golden_support.FOLDER / f"{name}.npz"))
    state, order = golden.state_dict(), golden.json("parameter_order")
    rest = [n for n in state if n not in order]
    state = {n: state[n] for n in (*sorted(rest, key=lambda n: n != "sigmas"), *order)}
    book = tf.Book()
    ema = change([book.tensor(2 * state[n]) for n in order])
    adam = {i: {"step": 5, "exp_avg": book.tensor(state[n])} for i, n in enumerate(order)}
    root = {
        "optimizer": {"state": adam, "param_groups": [{"lr": 2e-4}]},
        "model": {f"module.{n}": book.tensor(value) for n, value in state.items()},
        "ema": {"decay": 0.999, "num_updates": 5, "shadow_params": ema},
        "step": 5,
    }
    path.write_bytes(tf.zip_file(root, book))
    return state, order


@pytest.mark.parametrize("name", ["score_sde_ve_ncsnpp", "score_sde_subvp_ncsnpp"])
def test_the_shadow_list_is_taken_first_and_said(name, tmp_path):
    state, order = released(tmp_path / "x.pth", name)
    found = load_pretrained(tmp_path / "x.pth", img_resolution=16)
    fourier = name == "score_sde_ve_ncsnpp"
    assert found.kind == "score_sde" and found.precondition == ("ve" if fourier else None)
    assert found.notes[0] == (
        "taken: the averaged weights at ema.shadow_params; also there: --entry model.module"
    )
    assert "sigmas" not in " ".join(found.notes)
    last, first = order[-2], "all_modules.1.weight" if fourier else "all_modules.0.weight"
    params = found.variables["params"]
    np.testing.assert_array_equal(params["map_layer0"]["kernel"], 2 * state[first].T)
    kernel = params["dec_16x16_aux_conv"]["kernel"]
    np.testing.assert_array_equal(kernel, 2 * state[last].transpose(2, 3, 1, 0))
    if fourier:  # no parameter of the average
        freqs = found.variables["buffers"]["map_noise"]["freqs"]
        np.testing.assert_array_equal(freqs, state["all_modules.0.W"])
    raw = load_pretrained(tmp_path / "x.pth", entry="model", img_resolution=16)
    np.testing.assert_array_equal(raw.variables["params"]["map_layer0"]["kernel"], state[first].T)


def test_time_steps_need_a_process(tmp_path):
    released(tmp_path / "x.pth", "score_sde_vp_ddpmpp")
    with pytest.raises(ValueError, match="give vp .*subvp.*adm.*smld"):
        load_pretrained(tmp_path / "x.pth", img_resolution=16).denoiser()
    done = ogdm(tmp_path, "convert", "x.pth", "--out", "w", "--set", "img_resolution=16")
    assert done.returncode == 1 and "--precondition vp" in done.stderr, done.stderr
    assert not (tmp_path / "w").exists()


CASES = {
    "score_sde_ve_ncsnpp": ("", "ve", "ve", 100.0),
    "score_sde_subvp_ncsnpp": ("subvp", "subvp", "subvp", 100.0),
    "score_sde_ve_discrete": ("smld", "smld", "ve", 100.0),
    "score_sde_vp_discrete": ("adm", "adm", "ddpm", 100.0),
}


@pytest.mark.slow_cases("score_sde_ve_ncsnpp", "score_sde_subvp_ncsnpp")
@pytest.mark.parametrize("name", CASES)
def test_released_files_are_converted_and_sampled(name, tmp_path):
    word, kind, law, highest = CASES[name]
    released(tmp_path / "checkpoint_26.pth", name)
    told = ["--precondition", word] if word else []
    words = ("--set", "img_resolution=16", *told)
    done = ogdm(tmp_path, "convert", "checkpoint_26.pth", "--out", "w", *words)
    assert done.returncode == 0, done.stderr
    assert "taken: the averaged weights at ema.shadow_params" in done.stdout
    assert "taken as published: the resampling filter" in done.stdout
    run = open_workdir(tmp_path / "w")
    assert run.config.precondition.kind == kind and run.config.noise.distribution == law
    assert run.config.precondition.sigma_max == pytest.approx(highest, rel=1e-6)
    assert run.config.data.augment == 0
    if law == "ve":
        assert run.config.sample.grid == "ve" and run.config.sample.sigma_max > 99
    found = load_pretrained(
        tmp_path / "checkpoint_26.pth",
        img_resolution=16,
        **({"precondition": word} if word else {}),
    )
    x = golden_support.hash_values(2 * 16 * 16 * 3, 1).reshape(2, 16, 16, 3).astype(np.float32)
    ours = run.denoiser
    np.testing.assert_allclose(ours(x, 0.5), found.denoiser()(x, 0.5), rtol=1e-5, atol=1e-5)
    if kind != "ve":
        return
    drawn = []
    for out in ("a", "b"):
        sample = ("--num", "2", "--steps", "2", "--solver", "euler", "--out", f"{out}.npz")
        done = ogdm(tmp_path, "sample", "--workdir", "w", *sample)
        assert done.returncode == 0, done.stderr
        drawn.append(arrays(tmp_path / f"{out}.npz"))
    assert any(value.shape == (2, 16, 16, 3) for value in drawn[0].values())
    for key in drawn[0]:
        np.testing.assert_array_equal(drawn[0][key], drawn[1][key])


def test_an_export_keeps_the_highest_level(tmp_path):
    released(tmp_path / "x.pth", "score_sde_ve_discrete")
    told = ("--set", "img_resolution=16", "--precondition", "smld", "--set", "sigma_max=180")
    assert ogdm(tmp_path, "convert", "x.pth", "--out", "w", *told).returncode == 0
    assert ogdm(tmp_path, "export", "w", "--out", "x.safetensors").returncode == 0
    found = load_pretrained(tmp_path / "x.safetensors")
    assert found.precondition == "smld" and found.process["sigma_max"] == 180
    assert found.denoiser().sigma_max == 180


def test_other_variants_are_named(tmp_path):
    state, _ = released(tmp_path / "x.pth", "score_sde_ve_ncsnpp")
    state = read_torch(tmp_path / "x.pth", entry="model.module")
    renamed = {n.replace("Conv2d_0", "Conv_0"): value for n, value in state.items()}
    with pytest.raises(UnrecognisedError, match=r"all_modules.\d+ .*not offered"):
        from_torch(renamed, img_resolution=16)
    cut = {n: value for n, value in state.items() if n != "all_modules.4.Conv_1.bias"}
    with pytest.raises(ValueError, match="1 missing .all_modules.4.Conv_1.bias"):
        from_torch(cut, img_resolution=16)
    assert from_torch(state)[0].img_resolution == 32  # as published: 16 pixels attend


def test_sizes_are_read_from_the_shapes_and_asked_for_where_they_hide():
    more = {"img_resolution": 32, "model_channels": 8, "dropout": 0.0, "embedding_type": "fourier"}
    more |= {"channel_mult_noise": 2, "encoder_type": "residual", "resample_filter": (1, 3, 3, 1)}
    more |= {"out_channels": 3}
    for levels, depth, attend in (((1, 2, 4), 2, (16, 8)), ((1, 1), 3, (16,)), ((2,), 1, ())):
        network = SongUNet(**more, channel_mult=levels, num_blocks=depth, attn_resolutions=attend)
        if len(levels) == 1:
            network = network.clone(encoder_type="standard", resample_filter=(1, 1))
        shapes = names_score_sde.score_sde_shapes(network)
        state = {name: np.broadcast_to(np.float32(0), shape) for name, shape in shapes.items()}
        assert pretrained.match(state, img_resolution=32).network == network
        if len(attend) != 1:
            with pytest.raises(UnrecognisedError, match="img_resolution: the tensors of this"):
                pretrained.match(state)


def test_sub_vp_is_its_definition():
    """alpha and std of 2011.13456 eq. 29, float64."""
    clock, t = process.SubVP(), np.geomspace(1e-4, 1, 40)
    alpha = np.exp(-0.25 * 19.9 * t**2 - 0.05 * t)
    np.testing.assert_allclose(clock.sigma(t), (1 - alpha**2) / alpha, rtol=1e-8)
    np.testing.assert_allclose(clock.time(clock.sigma(t)), t, rtol=1e-12)
    step = 1e-6 * t
    slope = (clock.sigma(t + step) - clock.sigma(t - step)) / (2 * step)
    np.testing.assert_allclose(clock.sigma_derivative(t), slope, rtol=1e-7)
    np.testing.assert_allclose(clock.scale(t), alpha, rtol=1e-12)
    seen = {}
    denoise = score_sde.subvp(lambda x, c, label=None: seen.update(x=x, c=c) or 0 * x)
    sigma = np.asarray(clock.sigma(t), np.float32)
    denoise(np.ones((40, 1, 1, 3), np.float32), sigma)
    np.testing.assert_allclose(seen["x"][:, 0, 0, 0], alpha, rtol=1e-4)
    np.testing.assert_allclose(seen["c"], 999 * t, rtol=1e-4)
    levels = noise.subvp()
    np.testing.assert_allclose(levels.sigma(np.float64(0)), clock.sigma(1.0))
    np.testing.assert_allclose(levels.weight(np.float32(2)), 0.25)


def test_smld_counts_levels_from_the_highest():
    levels = 180.0 * (0.02 / 180) ** (np.arange(1000) / 999)
    seen = {}
    network = lambda x, c, label=None: seen.update(c=c) or x
    denoise = score_sde.smld(network, sigma_max=180.0)
    denoise(np.ones((1000, 1, 1, 3), np.float32), levels.astype(np.float32))
    np.testing.assert_array_equal(seen["c"], np.arange(1000))
    between = np.sqrt(levels[:-1] * levels[1:]) * 1.0005
    rounded = denoise.round_sigma(between.astype(np.float32))
    np.testing.assert_allclose(rounded, levels[:-1], rtol=1e-4)
    assert float(denoise.sigma_max) == 180 and float(denoise.round_sigma(np.float32(1e9))) == 180
