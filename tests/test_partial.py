"""Fine-tuning onto other labels or another size: what fits is copied, the rest is fresh and listed."""

import shutil

import jax
import numpy as np
import pytest

from ogdm_jax import data, parallel
from ogdm_jax.training import run as runs
from ogdm_jax.training.checkpoint import CheckpointError, Checkpoints, describe, find
from ogdm_jax.training.loop import train
from ogdm_jax.training.partial import fitting_weights
from tests.support import tiny

PLAIN = ("methods=", "data.augment=0", "train.duration=1 steps", tiny.ONE_LEVEL)
PLAIN += ("parallel.devices=1",)


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """A folder of a network for unlabelled digits, and its weights."""
    return saved(tmp_path_factory.mktemp("start"), build("data.conditional=false"))


def saved(folder, run: runs.Run):
    state = run.init()
    with Checkpoints(folder) as checkpoints:
        checkpoints.save(0, state, describe(run.config, run.source.shape, 0), {"step": 0})
    return folder, state


def build(*more: str, size: int = 8, seed: int = 7) -> runs.Run:
    config = tiny.config(*PLAIN, f"seed={seed}", *more)
    source = data.open_source("digits", resolution=size)
    return runs.build(config, source, parallel.make_plan("pmap", 1))


def fitted(folder, run: runs.Run, which: str = "ema"):
    fresh = run.plan.shapes(jax.eval_shape(run.create, run.key))
    return fitting_weights(find(folder), fresh.params, fresh.buffers, which)


@pytest.mark.parametrize("which", ["ema", "params"])
def test_labels_are_fresh_and_all_else_is_copied(start, which):
    folder, state = start
    params, _, said = fitted(folder, build("data.conditional=true"), which)
    missing = [
        jax.tree_util.keystr(path, simple=True, separator="/")
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
        if isinstance(leaf, jax.ShapeDtypeStruct)
    ]
    assert missing == ["map_label/bias", "map_label/kernel"]
    del params["map_label"]
    jax.tree.map(np.testing.assert_array_equal, params, state.params)
    assert (
        "fresh: 2 (params/map_label/bias (8,), params/map_label/kernel (10, " in said
        and "not used" not in said
    )


def test_another_size_goes_by_levels(start):
    folder, state = start
    params, _, said = fitted(folder, build("data.conditional=false", size=16))
    names = {name.replace("16x16", "8x8"): value for name, value in params.items()}
    assert any("16x16" in name for name in params)
    jax.tree.map(np.testing.assert_array_equal, names, state.params)
    assert "fresh" not in said


def test_shapes_that_differ_and_tensors_that_are_left_are_listed(start, tmp_path):
    labelled, _ = saved(tmp_path, build("data.conditional=true"))
    assert "not used: 2 (params/map_label/" in fitted(labelled, build("data.conditional=false"))[2]
    folder, _ = start
    run = build(
        "data.conditional=false", "network.channel_mult=(2,)", "network.attn_resolutions=()"
    )
    _, _, said = fitted(folder, run)
    assert "params/enc_8x8_conv" not in said  # its width is that of the first level's input
    assert "(there " in said
    with pytest.raises(CheckpointError, match="no tensor of checkpoint .* fits"):
        fitted(folder, build("network.kind=openai", "network.model_channels=32"))


def test_a_run_from_another_network_advises_partial_and_then_works(start, tmp_path):
    folder, state = start
    words = (*PLAIN, f"init.workdir={folder}", "data.conditional=true", "seed=3")
    with pytest.raises(CheckpointError) as caught:
        train(tiny.config(*words), tmp_path / "run")
    assert "2 of 72 tensors differ" in str(caught.value)
    assert "--config.init.partial=true, which copies the " in str(caught.value)
    lines: list[str] = []
    slow = ("optim.learning_rate=1e-12", "init.partial=true", "sample.num=1", "sample.steps=1")
    _, end = train(tiny.config(*words, *slow), tmp_path / "run", lines.append)
    assert any("fresh: 2 (params/map_label/" in line for line in lines)
    np.testing.assert_allclose(
        end.params["enc_8x8_conv"]["kernel"], state.params["enc_8x8_conv"]["kernel"], atol=1e-6
    )
    assert np.abs(end.params["map_label"]["kernel"]).max() > 0


def test_weights_as_trained_that_are_damaged_are_refused(start, tmp_path):
    """As `load_weights` refuses them: `find` has compared the average alone."""
    shutil.copytree(start[0], tmp_path / "copy")
    files = (tmp_path / "copy" / "checkpoints" / "0" / "params").rglob("*")
    largest = max((p for p in files if p.is_file()), key=lambda p: p.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)
    run = build("data.conditional=false")
    fitted(tmp_path / "copy", run)
    with pytest.raises(CheckpointError, match="is damaged .*params/.*checksum"):
        fitted(tmp_path / "copy", run, "params")
