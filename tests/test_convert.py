"""`ogdm convert` and `ogdm show`: what they print was taken of a file, and commands that run."""

import shlex

import numpy as np
import pytest

from ogdm_jax.interop import read_torch
from ogdm_jax.training.workdir import open_workdir
from tests.support import snapshots
from tests.support import torch_files as tf
from tests.support.commands import ogdm

SHORT = (
    "data.batch=8",
    "parallel.devices=1",
    "train.duration=1 steps",
    "log.tensorboard=false",
    "sample.num=1",
)
SHORT = [f"--config.{text}" for text in (*SHORT, "sample.steps=1", "evaluate.features=")]


def printed(said: str, what: str) -> list[str]:
    """The words behind `ogdm` of a printed command."""
    (line,) = [line for line in said.splitlines() if line.startswith(what)]
    return shlex.split(line.partition("ogdm ")[2])


@pytest.mark.slow_cases("10")
@pytest.mark.parametrize("labels", [0, 10])
def test_the_printed_commands_run_as_they_are(labels, tmp_path):
    """Of an 8x8 grey model, into a folder whose name has a space; only the run is shortened."""
    source = snapshots.published(tmp_path, labels=labels)
    done = ogdm(tmp_path, "convert", source.name, "--out", "my work")
    assert done.returncode == 0, done.stderr
    assert "--config.data.source=digits" in done.stdout
    done_training = ogdm(tmp_path, *printed(done.stdout, "fine-tune:"), *SHORT)
    assert done_training.returncode == 0, done_training.stderr
    assert open_workdir(tmp_path / "my work-tuned").step == 1
    sampled = ogdm(tmp_path, *printed(done.stdout, "sample:"), "--num", "1", "--steps", "1")
    assert sampled.returncode == 0, sampled.stderr


@pytest.mark.slow
def test_images_that_no_shipped_set_has(tmp_path):
    """A folder stands for them, with the size and channels that the network wants."""
    source = snapshots.published(tmp_path, side=16, labels=3, channels=3)
    done = ogdm(tmp_path, "convert", source.name, "--out", "w", "--config.optim.ramp=0 steps")
    words = printed(done.stdout, "fine-tune:")
    wanted = ("source=folder:DIR", "resolution=16", "channels=3", "conditional=True")
    assert all(f"--config.data.{word}" in words for word in wanted)
    assert "--config.optim.ramp=0 steps" in words
    assert "in place of DIR (a sub-folder for each of 3 classes)" in done.stdout
    rng = np.random.default_rng(0)
    np.savez(
        tmp_path / "own.npz",
        image=rng.integers(0, 255, (30, 16, 16, 3), dtype=np.uint8),
        label=np.arange(30) % 3,
    )
    words = [word.replace("folder:DIR", "npz:own.npz") for word in words]
    done = ogdm(tmp_path, *words, *SHORT)
    assert done.returncode == 0, done.stderr
    typed = ("--config.data.source=npz:own.npz",)
    done = ogdm(tmp_path, "convert", source.name, "--out", "v", *typed)
    assert typed[0] in printed(done.stdout, "fine-tune:") and "DIR" not in done.stdout


def both(tmp_path):
    """A file with weights and their average, an optimiser and settings."""
    state, book = read_torch(snapshots.published(tmp_path)), tf.Book()
    raw, average = (
        {name: book.tensor(value + shift) for name, value in state.items()} for shift in (0, 1)
    )
    namespace = tf.Call(tf.Name("argparse", "Namespace"), (), {"lr": 1}, new=True)
    raw["total_ops"] = book.tensor(np.ones(1))
    root = {"model": raw, "model_ema": average, "args": namespace, "step": 3}
    (tmp_path / "both.pt").write_bytes(tf.zip_file(root, book))
    return state


def test_show_and_convert_say_what_was_taken(tmp_path):
    state = both(tmp_path)
    line = "taken: the averaged weights at model_ema; also there: --entry model"
    for words in (("show", "both.pt"), ("convert", "both.pt", "--out", "w")):
        done = ogdm(tmp_path, *words)
        assert done.returncode == 0 and line in done.stdout.splitlines(), done.stderr
    done = ogdm(tmp_path, "convert", "both.pt", "--out", "raw", "--entry", "model")
    assert "taken: the weights at model; also" in done.stdout.replace("; ignored", "; also") or (
        "taken: the weights at model" in done.stdout
    )
    assert "ignored: 1 tensors (total_ops)" in done.stdout
    kernels = [
        open_workdir(tmp_path / name).params["enc_8x8_conv"]["kernel"] for name in ("w", "raw")
    ]
    theirs = state["model.enc.8x8_conv.weight"].transpose(2, 3, 1, 0)
    np.testing.assert_array_equal(kernels[1], theirs)
    np.testing.assert_array_equal(kernels[0], theirs + np.float32(1))


def test_weights_that_are_not_finite_need_a_word(tmp_path):
    state, book = read_torch(snapshots.published(tmp_path)), tf.Book()
    name = "model.out_conv.weight" if "model.out_conv.weight" in state else sorted(state)[0]
    state[name] = np.full_like(state[name], np.nan)
    root = {key: book.tensor(value) for key, value in state.items()}
    (tmp_path / "nan.pt").write_bytes(tf.zip_file(root, book))
    done = ogdm(tmp_path, "convert", "nan.pt", "--out", "w")
    assert done.returncode == 1 and f"{name} holds numbers that are not finite" in done.stderr
    assert not (tmp_path / "w").exists()
    done = ogdm(tmp_path, "convert", "nan.pt", "--out", "w", "--allow-nan")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", ["pointer.pt", "missing.pt", "folder", "empty"])
def test_refusals_are_one_sentence(name, tmp_path):
    (tmp_path / "pointer.pt").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    (tmp_path / "empty").mkdir()
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "model_index.json").write_text("{}")
    for words in (("show", name), ("convert", name, "--out", "w")):
        done = ogdm(tmp_path, *words)
        assert done.returncode == 1 and done.stderr.startswith(f"error: {name}: ")
        assert done.stderr.count("\n") == 1 and not (tmp_path / "w").exists()
