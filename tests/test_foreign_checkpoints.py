"""Checkpoints as other programs leave them: what is taken of them, what is said, what is refused."""

import gzip
import io
import json
import pickle
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from ogdm_jax.interop import UnsafeFileError, from_torch, load_pretrained, read_torch
from ogdm_jax.interop.torch_state import open_torch
from tests.support import snapshots
from tests.support import torch_files as tf

pytestmark = pytest.mark.fast

MADE = Path(__file__).parent / "fixtures" / "torch"


@pytest.fixture(scope="module")
def state(tmp_path_factory) -> dict[str, np.ndarray]:
    """The state dict of a small EDM network; its Fourier-free buffers included."""
    return read_torch(snapshots.published(tmp_path_factory.mktemp("state")))


def averaged(state):
    return {name: value + 1 for name, value in state.items()}


def saved(path: Path, make, write=tf.zip_file) -> Path:
    """A file of make(book's function from a state dict to its pickle value)."""
    book = tf.Book()
    path.write_bytes(
        write(make(lambda s: {name: book.tensor(value) for name, value in s.items()}), book)
    )
    return path


def prefixed(prefix: str, state):
    return {f"{prefix}{name}": value for name, value in state.items()}


def taken(path: Path, state, **options) -> str:
    """Which weights were taken of a file: "raw" or "average"; nothing else may come."""
    found, plain = load_pretrained(path, **options), from_torch(state)[1]
    first, other = (jax.tree.leaves(tree)[0] for tree in (found.variables, plain))
    return {0.0: "raw", 1.0: "average"}[round(float(np.ravel(first - other)[0]), 3)]


AVERAGES = {
    "model_ema": lambda d, e, a: {"model": d(e), "model_ema": d(a)},
    "ema": lambda d, e, a: {"net": d(e), "ema": d(a), "step": 3},
    "ema_state_dict": lambda d, e, a: {"state_dict": d(e), "ema_state_dict": d(a)},
    "state_dict_ema": lambda d, e, a: {"state_dict": d(e), "state_dict_ema": d(a)},
    "averaged_model": lambda d, e, a: {"averaged_model": d(a), "model": d(e)},
    "ema_model": lambda d, e, a: {"ema_model": d(a), "model": d(e), "epoch": 1},
    "ema.module": lambda d, e, a: {"model": d(e), "ema": {"module": d(a), "decay": 0.9}},
    "deep": lambda d, e, a: {"a": {"b": [{"model": d(e), "model_ema": d(a)}]}},
    "shadow": lambda d, e, a: {"model": d(e), "ema": {"shadow": d(a), "decay": 0.9}},
    "shadow_params": lambda d, e, a: {
        "model": d(e),
        "ema": {"decay": 0.9, "shadow_params": [*d(parameters(a)).values()]},
    },
    "shadow_params of the top": lambda d, e, a: {
        "state_dict": d(e),
        "shadow_params": tuple(d(parameters(a)).values()),
        "collected_params": [*d(e).values()],
    },
    "only parameters": lambda d, e, a: {"model": d(e), "ema": d(parameters(a))},
    "swa": lambda d, e, a: {
        "model": d(e),
        "swa_model": d({"n_averaged": np.array(3.0, "f4"), **prefixed("module.", a)}),
    },
    "AveragedModel alone": lambda d, e, a: {
        "model": d(e),
        "other": d({"n_averaged": np.array(3.0, "f4"), **prefixed("module.", a)}),
    },
    "ema_pytorch": lambda d, e, a: {
        "model": d(e),
        "ema": d(
            {"step": np.array(3.0, "f4")} | prefixed("online_model.", e) | prefixed("ema_model.", a)
        ),
    },
    "LitEma": lambda d, e, a: {
        "state_dict": d(
            prefixed("model.diffusion_model.", network_alone(e))
            | {
                "model_ema." + f"diffusion_model.{name}".replace(".", ""): value
                for name, value in parameters(network_alone(a)).items()
            }
        )
    },
    **{
        f"{raw} and {average}": lambda d, e, a, raw=raw, average=average: {
            raw: d(e),
            average: d(a),
        }
        for raw, average in (
            ("params", "params_ema"),
            ("netG", "netG_ema"),
            ("model", "modelEma"),
            ("model", "EMA"),
            ("model", "ema_0.9999"),
            ("weights", "moving_average"),
            ("state_dict", "swa_state_dict"),
            ("net", "polyak"),
            ("net", "averages"),
        )
    },
    "Adam's moments by name": lambda d, e, a: {
        "optimizer": {"exp_avg": d(e), "exp_avg_sq": d(e)},
        "model": d(e),
        "ema": d(a),
    },
}


def parameters(state):
    return {name: value for name, value in state.items() if not name.endswith("freqs")}


def network_alone(state):
    return {name.removeprefix("model."): value for name, value in state.items()}


@pytest.mark.parametrize("name", AVERAGES)
@pytest.mark.default
def test_averages_come_first_and_are_named(name, state, tmp_path):
    path = saved(tmp_path / "x.pt", lambda d: AVERAGES[name](d, state, averaged(state)))
    assert taken(path, state) == "average"
    notes = load_pretrained(path).notes
    assert (
        notes[0].startswith("taken: the averaged weights at ") and "also there: --entry" in notes[0]
    )
    other = notes[0].partition("--entry ")[2].partition(",")[0]
    assert taken(path, state, entry=other) == "raw"


def test_a_list_of_averages_that_fits_nothing_is_said(state, tmp_path):
    make = lambda d: {"model": d(state), "ema": {"shadow_params": [*d(state).values()][:5]}}
    path = saved(tmp_path / "x.pt", make)
    with pytest.raises(
        UnsafeFileError, match="ema.shadow_params is a list that does not fit.* model"
    ):
        load_pretrained(path)
    assert taken(path, state, entry="model") == "raw"


PREFIXES = [
    "_orig_mod.",
    "module.",
    "module.module.",
    "net.",
    "diffusion_model.",
    "ddp._orig_mod.x.",
]


@pytest.mark.parametrize("prefix", [*PREFIXES, "model.", "model.diffusion_model.", "a.b.c."])
@pytest.mark.parametrize("alone", [False, True])
def test_prefixes(prefix, alone, state, tmp_path):
    inner = network_alone(state) if alone else state
    more = {"betas": np.ones(10, "f4"), "best": np.array(1.0, "f4")}
    make = lambda d: {"state_dict": d(prefixed(prefix, inner) | more)}
    path = saved(tmp_path / "x.pt", make)
    assert taken(path, state) == "raw"
    assert any("betas" in note and "ignored: 2" in note for note in load_pretrained(path).notes)


def test_wrappers_inside_of_names(state, tmp_path):
    inner = {
        name.replace(".conv0.", "._checkpoint_wrapped_module.conv0.").replace(
            "model.", "model._orig_mod."
        )
        for name in state
    }
    make = lambda d: d(dict(zip(sorted(inner), (state[n] for n in sorted(state)), strict=True)))
    assert len(inner) == len(state)
    names = read_torch(saved(tmp_path / "x.pt", make))
    assert set(names) == set(state)


def test_several_prefixes_are_listed_with_entries_that_pick_them(state, tmp_path):
    both = prefixed("first.", state) | prefixed("second.", averaged(state))
    path = saved(tmp_path / "x.pt", lambda d: {"state": d(both)})
    with pytest.raises(UnsafeFileError, match=r"--entry.*state\.first, state\.second"):
        load_pretrained(path)
    assert taken(path, state, entry="state.first") == "raw"
    assert taken(path, state, entry="state.second") == "average"
    with pytest.raises(ValueError, match="several prefixes .*first.*second"):
        from_torch(both)


DEEP = {
    "state.model": lambda d, e: {"state": {"model": d(e), "epoch": 5}},
    "0": lambda d, e: [d(e), OPTIMISER(d, e), 5],
    "a.0.b": lambda d, e: {"a": [{"b": d(e)}]},
    "1": lambda d, e: (3, d(e)),
    "x.y.z": lambda d, e: {"x": {"y": {"z": d(e)}, "w": d({"n": np.ones(2, "f4")})}},
    "state_dict": lambda d, e: {"state_dict": d(e), "best_acc1": d({"x": np.ones((), "f4")})["x"]},
}


def OPTIMISER(d, e):
    first = {i: {"exp_avg": value} for i, value in enumerate(d(e).values())}
    return {"state": first, "param_groups": [{"lr": 0.1, "params": [*first]}]}


@pytest.mark.parametrize("entry", DEEP)
def test_depth_and_lists(entry, state, tmp_path):
    path = saved(tmp_path / "x.pt", lambda d: DEEP[entry](d, state))
    assert taken(path, state) == taken(path, state, entry=entry) == "raw"
    assert any(f"taken: the weights at {entry}" in note for note in load_pretrained(path).notes)


def test_lists_without_names_ask_for_an_entry(state, tmp_path):
    make = lambda d: [d(state), OPTIMISER(d, state), 3, 4, d(averaged(state))]
    path = saved(tmp_path / "x.pt", make)
    with pytest.raises(UnsafeFileError, match="--entry.*0, 4"):
        load_pretrained(path)
    assert taken(path, state, entry="0") == "raw" and taken(path, state, entry="4") == "average"
    with pytest.raises(UnsafeFileError, match="no part 7 with tensors .*0, 4"):
        load_pretrained(path, entry="7")


def test_extra_scalars_are_ignored_and_listed(state, tmp_path):
    extra = {
        "total_ops": np.ones(1),
        "model.enc.total_params": np.ones(()),
        "model.global_step": np.array(5),
        "model.x.num_batches_tracked": np.array(5),
        "model.betas": np.ones(1000, "f4"),
        "model.alphas_cumprod": np.ones(1000, "f4"),
        "model.sqrt_one_minus_alphas_cumprod": np.full(1000, np.nan, "f4"),
    }
    path = saved(tmp_path / "x.pt", lambda d: d(state | extra))
    assert taken(path, state) == "raw"
    (note,) = load_pretrained(path).notes
    assert note.startswith("ignored: 7 tensors") and "model.betas" in note
    with pytest.raises(ValueError, match="1 unexpected .model.enc.extra.weight"):
        load_pretrained(
            saved(
                tmp_path / "y.pt", lambda d: d(state | {"model.enc.extra.weight": np.ones(4, "f4")})
            )
        )


SMALL = {"a.weight": np.arange(6, dtype="f4").reshape(2, 3), "a.bias": np.arange(2, dtype="f4")}


def same_small(path: Path, **options):
    read = read_torch(path, **options)
    assert set(read) == set(SMALL)
    for name, value in SMALL.items():
        np.testing.assert_array_equal(read[name], value)


def test_objects_that_torch_saved_beside_weights_are_inert():
    """Thirty kinds of objects: paths, settings, enums, dates, random states, layers, functions."""
    same_small(MADE / "objects.pt")
    root = open_torch(MADE / "objects.pt").root
    assert root["args"].name == "Namespace" and root["args"].state["rate"] == 1
    assert root["path"].name == "PosixPath" and root["path"].items == ["/", "x", "y"]
    assert root["settings"].state["rate"] == 1.0 and root["defaults"] == {1: [2]}
    assert root["named"].state == {"a": 1} and root["listed"].items == [1, 2]
    assert list(root["keys"].values()) == [2, 3, 4]


@pytest.mark.parametrize("protocol", range(6))
def test_every_protocol_of_pickle(protocol):
    same_small(MADE / f"objects_{protocol}.pkl")
    if protocol > 2:
        same_small(MADE / f"legacy_{protocol}.pth")


def test_a_torchscript_archive_is_named():
    assert open_torch(MADE / "script.pt").layout == "TorchScript"
    assert open_torch(MADE / "objects.pt").layout == "zip"


def test_a_subclass_of_a_parameter_is_its_numbers():
    same_small(MADE / "subclass.pt")


ODD = {
    "sparse": "is sparse; save its to_dense",
    "csr": "is sparse; save its to_dense",
    "quantised": "is quantised",
    "meta": "is on the meta device, without numbers",
    "nested": "is a nested tensor",
    "dtensor": r"is a part of one process \(DTensor\)",
    "sharded": r"is a part of one process \(ShardedTensor\)",
}


@pytest.mark.parametrize("name", ODD)
def test_tensors_without_plain_numbers_are_named(name):
    with pytest.raises(UnsafeFileError, match=f"its tensor a.weight {ODD[name]}"):
        read_torch(MADE / f"odd_{name}.pt")


def test_what_would_act_is_refused_also_beside_weights(tmp_path):
    for module, name in (
        ("os", "system"),
        ("builtins", "eval"),
        ("shutil", "rmtree"),
        ("sys", "exit"),
    ):
        call = tf.Call(tf.Name(module, name), ("x",))
        path = saved(tmp_path / "x.pt", lambda d, call=call: {"model": d(SMALL), "args": call})
        with pytest.raises(UnsafeFileError, match=f"it names {module}.{name},"):
            read_torch(path)


def test_types_are_said(state, tmp_path):
    for dtype, word in (("f2", "float16"), ("f8", "float64")):
        path = saved(
            tmp_path / "x.pt", lambda d, t=dtype: d({n: v.astype(t) for n, v in state.items()})
        )
        assert load_pretrained(path).notes == (f"stored as {word}; computed with float32",)
    half = {n: v.astype(ml_dtypes.bfloat16) for n, v in state.items()}
    save_file(half, tmp_path / "x.safetensors")
    found = load_pretrained(tmp_path / "x.safetensors")
    assert found.notes == ("stored as bfloat16; computed with float32",)
    assert {leaf.dtype for leaf in jax.tree.leaves(found.variables)} == {np.dtype("f4")}
    path = saved(
        tmp_path / "x.pt", lambda d: d({n: (9 * v).astype("i8") for n, v in state.items()})
    )
    with pytest.raises(ValueError, match="is int64, no floating-point numbers .quantised"):
        load_pretrained(path)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_weights_that_are_not_finite(bad, state, tmp_path):
    name = sorted(state)[5]
    broken = state[name].copy()
    broken.flat[0] = bad
    path = saved(tmp_path / "x.pt", lambda d: d(state | {name: broken}))
    with pytest.raises(ValueError, match=f"{name} holds numbers that are not finite.*--allow-nan"):
        load_pretrained(path)
    assert taken(path, state, allow_nan=True) == "raw"


# containers


def test_shards(state, tmp_path):
    names = sorted(state)
    halves = {"m-1-of-2.safetensors": names[:70], "m-2-of-2.safetensors": names[70:]}
    for shard, own in halves.items():
        save_file({name: np.ascontiguousarray(state[name]) for name in own}, tmp_path / shard)
    index = {name: shard for shard, own in halves.items() for name in own}
    listed = tmp_path / "model.safetensors.index.json"
    listed.write_text(json.dumps({"metadata": {}, "weight_map": index}))
    assert taken(tmp_path, state) == taken(listed, state) == "raw"

    (tmp_path / "m-2-of-2.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(UnsafeFileError, match="m-2-of-2.*a Git LFS pointer"):
        read_torch(tmp_path)
    (tmp_path / "m-2-of-2.safetensors").unlink()
    with pytest.raises(UnsafeFileError, match="1 of its 2 shards are missing .m-2-of-2"):
        read_torch(tmp_path)
    for broken, said in (
        ({"weight_map": {"a": "../x.safetensors"}}, "points outside the folder"),
        ({"weight_map": {"a": "/etc/passwd"}}, "points outside the folder"),
        ({"weight_map": {"a": 3}}, "points outside the folder"),
        ({"weight_map": {"a": "model.safetensors.index.json"}}, "points outside the folder"),
        ({"weight_map": {"a": "m-1-of-2.safetensors"}}, "lacks a, which the index"),
        ({"weight_map": {}}, "no weight_map"),
        ({}, "no weight_map"),
        ([], "expected an object"),
    ):
        listed.write_text(json.dumps(broken))
        with pytest.raises(UnsafeFileError, match=said):
            read_torch(tmp_path)
    listed.write_text("{")
    with pytest.raises(UnsafeFileError, match="no JSON"):
        read_torch(tmp_path)


def test_numpys_files(state, tmp_path):
    plain: dict[str, Any] = dict(state)
    np.savez(tmp_path / "a.npz", **plain)
    np.savez_compressed(tmp_path / "b.npz", **plain)
    np.savez(tmp_path / "c.npz", model=np.array(state, dtype=object), step=np.array(3))
    np.save(tmp_path / "d.npy", np.array({"ema": state}, dtype=object))
    big: dict[str, Any] = {n: np.asfortranarray(v).astype(">f4") for n, v in state.items()}
    np.savez(tmp_path / "e.npz", **big)
    for name in ("a.npz", "b.npz", "c.npz", "d.npy", "e.npz"):
        read = read_torch(tmp_path / name)
        for key, value in state.items():
            np.testing.assert_array_equal(read[key], value)
        assert taken(tmp_path / name, state) == "raw"
    np.save(tmp_path / "f.npy", np.ones(3))
    with pytest.raises(UnsafeFileError, match="one Tensor without a name"):
        read_torch(tmp_path / "f.npy")


def zipped(**members: bytes) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return out.getvalue()


def tarred() -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for name in ("sys_info", "pickle", "storages", "tensors"):
            archive.addfile(tarfile.TarInfo(name), io.BytesIO())
    return out.getvalue()


STRANGERS = {
    "pointer.pt": (b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\n", "git lfs pull"),
    "page.pt": (b"\n<!doctype HTML>\n<html>", "a saved web page"),
    "page.pkl": (b"<html lang=en>", "a saved web page"),
    "denied.pt": (b'<?xml version="1.0"?><Error>', "XML"),
    "x.pt.gz": (gzip.compress(b"x"), "gzip-compressed; unpack"),
    "x.tar": (tarred(), "a tar archive .torch's own before 0.1.10"),
    "pictures.zip": (zipped(**{"a/1.png": b"", "a/2.jpg": b""}), "zip archive of 2 pictures"),
    "weights.zip": (zipped(**{"readme.md": b"", "m/net.pth": b""}), "with m/net.pth in it"),
    "other.zip": (zipped(**{"a.txt": b""}), "a zip archive of other files .a.txt"),
    "empty.pt": (b"", "it is empty"),
    "x.h5": (b"\x89HDF\r\n\x1a\n" + bytes(90), "an HDF5 file"),
    "x.gguf": (b"GGUF\3\0\0\0" + bytes(90), "a GGUF file"),
    "x.png": (b"\x89PNG\r\n\x1a\n", "a picture"),
    "x.pdf": (b"%PDF-1.4", "a PDF"),
    "config.json": (b'{"a": 1}', "JSON text"),
    "model.ckpt.index": (bytes(90) + bytes.fromhex("57fb808b247547db"), "TensorFlow checkpoint"),
    "model.ckpt.data-00000-of-00001": (bytes(range(90)), "TensorFlow checkpoint"),
    "checkpoint": (b'model_checkpoint_path: "x"', "TensorFlow's note"),
    "flax_model.msgpack": (b"\x81\xa6params" + bytes(9), "flax's msgpack"),
    "notes.pt": (b"not found", "a text, not a checkpoint"),
    "noise.pt": (bytes(range(255, 0, -1)), "of an unknown kind"),
}


@pytest.mark.parametrize("name", STRANGERS)
def test_files_of_other_kinds_are_named(name, tmp_path):
    data, said = STRANGERS[name]
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UnsafeFileError, match=said) as caught:
        read_torch(tmp_path / name)
    assert "\n" not in str(caught.value)


FOLDERS = {
    "diffusers": (
        {"config.json": '{"_class_name": "VQModel"}', "m.safetensors": ""},
        "a model VQModel of diffusers .*give a file in it, such as m.safetensors",
    ),
    "textless": (
        {"config.json": '{"_class_name": "UNet2DModel"}', "m.safetensors": ""},
        "a U-Net of diffusers without texts, which is not offered",
    ),
    "pipeline": ({"model_index.json": "{}"}, "a pipeline of diffusers"),
    "transformers": ({"config.json": '{"architectures": ["X"]}'}, "a model X of diffusers or"),
    "broken": ({"config.json": "{"}, "folder of a model of diffusers"),
    "orbax": ({"_METADATA": "", "manifest.ocdbt": ""}, "a checkpoint of orbax"),
    "dcp": ({".metadata": "", "__0_0.distcp": ""}, "dcp_to_torch_save"),
    "deepspeed": ({"zero_to_fp32.py": "", "latest": ""}, "a checkpoint of DeepSpeed"),
    "tf": ({"checkpoint": "", "m.index": ""}, "a folder of TensorFlow checkpoints"),
    "saved": ({"saved_model.pb": ""}, "SavedModel"),
    "unpacked": ({"data.pkl": "", "version": "3"}, "an unpacked torch file; pack"),
    "training": ({"checkpoints": None, "config.json": "{}"}, "a training folder of ours"),
    "plain": ({"a.pt": "", "b.txt": ""}, "it is a folder; give a file in it, such as a.pt"),
    "nothing": ({"b.txt": ""}, "a folder without a checkpoint"),
}


@pytest.mark.parametrize("name", FOLDERS)
def test_folders_of_other_kinds_are_named(name, tmp_path):
    files, said = FOLDERS[name]
    for file, text in files.items():
        (tmp_path / file).mkdir() if text is None else (tmp_path / file).write_text(text)
    with pytest.raises(UnsafeFileError, match=said):
        read_torch(tmp_path)


def test_big_endian_and_shared_storage(state, tmp_path):
    for order in "<>":
        book = tf.Book(order)
        flat = book.storage(np.arange(8, dtype="f4"))
        root = {
            "model": {
                "a.weight": tf.view(flat, 0, (2, 3), (3, 1)),
                "a.bias": tf.view(flat, 0, (2,), (1,)),
            }
        }
        for write in (tf.zip_file, tf.legacy_file):
            (tmp_path / "x.pt").write_bytes(write(root, book))
            same_small(tmp_path / "x.pt")


def test_plain_pickles_of_arrays(tmp_path):
    for protocol in range(6):
        (tmp_path / "x.pkl").write_bytes(pickle.dumps({"params": SMALL, "lr": 1}, protocol))
        same_small(tmp_path / "x.pkl")


@pytest.mark.default
def test_an_optimiser_under_a_name_of_its_own_is_not_taken(state, tmp_path):
    """Many small sets of tensors beside the network, which no word tells from weights."""
    one = np.ones((), "f4")
    moments = {str(i): {"a": one, "b": one} for i in range(2000)}
    make = lambda d: {"mine": {k: d(v) for k, v in moments.items()}, "x": {"y": d(state)}}
    path = saved(tmp_path / "x.pt", make)
    assert taken(path, state) == "raw"
    assert set(read_torch(path, entry="mine.1777")) == {"a", "b"}
    make = lambda d: {
        "mine": {k: d(v) for k, v in moments.items()},
        "x": {"y": d(SMALL | {f"c.{i}": one for i in range(9)})},
    }
    assert "a.weight" in read_torch(saved(tmp_path / "y.pt", make))


def test_words_that_look_like_an_optimisers(state, tmp_path):
    for name in ("optimized_model", "schedule_free_model", "momentum_encoder"):
        path = saved(tmp_path / "x.pt", lambda d, name=name: {name: d(state), "lr": 0.1})
        assert taken(path, state) == "raw"
    path = saved(tmp_path / "x.pt", lambda d: {"optimizer": d(state)})
    with pytest.raises(UnsafeFileError, match="no dictionary of tensors .there is: optimizer"):
        read_torch(path)
    assert taken(path, state, entry="optimizer") == "raw"


def test_several_indexes_of_shards(tmp_path):
    for name in ("model", "model.fp16"):
        (tmp_path / f"{name}.safetensors.index.json").write_text("{}")
    with pytest.raises(UnsafeFileError, match="several indexes of shards; give one: model.fp16"):
        read_torch(tmp_path)
