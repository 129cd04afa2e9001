"""read_torch against files made by torch itself and against files assembled byte by byte from known
arrays.
"""

import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from ogdm_jax.interop import UnsafeFileError, export, read_torch
from ogdm_jax.interop.torch_state import open_torch
from tests.support import torch_files as tf

pytestmark = pytest.mark.fast

MADE = Path(__file__).parent / "fixtures" / "torch"
TYPES = "float64 float32 float16 bfloat16 int64 int32 int16 int8 uint8 uint16 bool complex64 float8_e4m3fn".split()


def expected_types() -> dict[str, np.ndarray]:
    named = {"bfloat16": ml_dtypes.bfloat16, "float8_e4m3fn": ml_dtypes.float8_e4m3fn}
    state = {name: np.arange(6).reshape(2, 3).astype(named.get(name, name)) for name in TYPES}
    base = np.arange(100, dtype=np.float32).reshape(10, 10)
    state |= {
        "window": base[2:5, 1::2],
        "column": base[:, 3],
        "transposed": base.T,
        "tied": base,
        "same": base,
    }
    scalar, expanded = np.array(3.5, np.float32), np.full((3, 2), 7, np.float32)
    return state | {"scalar": scalar, "empty": np.zeros((0, 4), np.float32), "expanded": expanded}


def expected_network() -> dict[str, np.ndarray]:
    norm = {
        "weight": (4,),
        "bias": (4,),
        "running_mean": (4,),
        "running_var": (4,),
        "num_batches_tracked": (),
    }
    shapes = {"0.weight": (4, 3, 3, 3), "0.bias": (4,)} | {
        f"1.{name}": shape for name, shape in norm.items()
    }
    shapes |= {"2.x.weight": (2, 4), "2.x.bias": (2,)}
    state = {}
    for i, (name, shape) in enumerate(shapes.items()):
        value = np.arange(np.prod(shape, dtype=int)).reshape(shape) + 100 * i
        state[name] = value.astype(np.int64 if name.endswith("tracked") else np.float32)
    return state


def assert_same(actual: dict[str, np.ndarray], expected: dict[str, np.ndarray]):
    assert list(actual) == list(expected)
    for name, value in expected.items():
        assert actual[name].dtype == value.dtype, name
        assert actual[name].flags.c_contiguous, name
        np.testing.assert_array_equal(actual[name], value, err_msg=name)


@pytest.mark.parametrize("name", ["types.pt", "types_legacy.pth", "types.pkl"])
def test_all_types_and_views_made_by_torch(name):
    state = read_torch(MADE / name)
    assert_same(state, expected_types())
    assert state["tied"] is state["same"]


@pytest.mark.parametrize("name", ["state.pt", "training_state.pt", "snapshot.pkl"])
def test_networks_saved_as_state_or_as_objects(name):
    assert_same(read_torch(MADE / name), expected_network())


def small_state() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    shapes = {
        "model.enc.a.weight": (3, 2, 3, 3),
        "model.enc.a.bias": (3,),
        "model.out.weight": (2, 3),
        "u": (4,),
    }
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("write", [tf.zip_file, tf.legacy_file])
def test_byte_orders(tmp_path, write, order):
    book, state = tf.Book(order), small_state()
    (tmp_path / "x.pt").write_bytes(
        write({name: book.tensor(value) for name, value in state.items()}, book)
    )
    assert_same(read_torch(tmp_path / "x.pt"), state)


def by_modules(state):  # a module yields its own tensors before its children's
    return dict(sorted(state.items(), key=lambda item: "." in item[0]))


def test_edm_snapshot_is_read_and_its_source_is_not_executed(tmp_path):
    state, proof = small_state(), tmp_path / "executed"
    ema = tf.network(state, tf.pickled_tensor, _init_kwargs={"img_resolution": 8}, sigma_data=0.5)
    loss = tf.persistent("EDMLoss", {"P_mean": -1.2}, f"open({str(proof)!r}, 'w')")
    (tmp_path / "network-snapshot-1.pkl").write_bytes(
        tf.pickled({"ema": ema, "loss_fn": loss, "dataset_kwargs": {}})
    )
    assert_same(read_torch(tmp_path / "network-snapshot-1.pkl"), by_modules(state))
    root = open_torch(tmp_path / "network-snapshot-1.pkl").root
    assert root["ema"].name == "EDMPrecond" and root["ema"].state["_init_kwargs"] == {
        "img_resolution": 8
    }
    assert root["loss_fn"].state == {"P_mean": -1.2}
    assert not proof.exists()


@pytest.mark.parametrize("write", [tf.zip_file, tf.legacy_file])
def test_edm_training_state(tmp_path, write):
    book, state = tf.Book(), small_state()
    moments = {
        "state": {0: {"step": 3, "exp_avg": book.tensor(np.ones(3, np.float32))}},
        "param_groups": [{"lr": 1e-3}],
    }
    parts = {"net": tf.network(state, book.tensor), "optimizer_state": moments}
    parts["disc"] = tf.network(
        {"b4.out.weight": np.ones((1, 2), np.float32)}, book.tensor, "Discriminator"
    )
    (tmp_path / "training-state-1.pt").write_bytes(write(parts, book))
    assert_same(read_torch(tmp_path / "training-state-1.pt"), by_modules(state))
    assert list(read_torch(tmp_path / "training-state-1.pt", entry="disc")) == ["b4.out.weight"]


def test_modules_of_the_old_layout_carry_their_source_which_is_dropped(tmp_path):
    book = tf.Book()
    cls = tf.Reference(
        ("module", tf.Name("torch.nn.modules.linear", "Linear"), "/linear.py", "raise SystemExit")
    )
    weight = np.arange(6, dtype=np.float32).reshape(2, 3)
    made = tf.Call(
        cls,
        (),
        tf.module_state({"weight": tf.parameter(book.tensor(weight)), "bias": None}, {}, {}),
        new=True,
    )
    (tmp_path / "m.pth").write_bytes(tf.legacy_file(made, book))
    assert_same(read_torch(tmp_path / "m.pth"), {"weight": weight})


def test_storage_views_of_the_old_layout(tmp_path):
    flat, book = np.arange(20, dtype=np.float32), tf.Book()
    key = book.storage(flat).value
    part = tf.Reference((*key, ("part", 5, 6)))
    (tmp_path / "v.pth").write_bytes(tf.legacy_file({"x": tf.view(part, 1, (2, 2), (3, 1))}, book))
    np.testing.assert_array_equal(read_torch(tmp_path / "v.pth")["x"], [[6, 7], [9, 10]])


def test_weights_of_a_torchscript_archive():
    """Its compressed program is not opened; the module classes it names are only names."""
    state = read_torch(MADE / "script.pt")
    shapes = {
        "0.weight": (2, 2, 3, 1),
        "0.mean": (2,),
        "1.0.weight": (2, 2, 3, 1),
        "1.0.mean": (2,),
    }
    shapes |= {"1.1.weight": (2, 2, 1, 1), "1.1.bias": (2,)}
    assert {name: value.shape for name, value in state.items()} == shapes
    for i, value in enumerate(state.values()):
        np.testing.assert_array_equal(value.ravel(), np.arange(value.size) + 100 * i)


def test_buffers_that_do_not_persist_are_left_out(tmp_path):
    one = tf.pickled_tensor(np.ones(2, np.float32))
    state = tf.module_state({}, {"kept": one, "gone": one}, {})
    state["_non_persistent_buffers_set"] = {"gone"}
    (tmp_path / "b.pkl").write_bytes(tf.pickled(tf.persistent("Net", state)))
    assert list(read_torch(tmp_path / "b.pkl")) == ["kept"]


def test_random_strided_views_equal_numpys(tmp_path):
    rng = np.random.default_rng(1)
    flat, book = rng.normal(size=360).astype(np.float32), tf.Book()
    storage, expected, root = book.storage(flat), {}, {}
    for i in range(60):
        base = flat.reshape(rng.permutation([3, 4, 5, 6]))
        picks = tuple(slice(rng.integers(0, 2), None, rng.integers(1, 3)) for _ in range(4))
        value = base[picks].transpose(rng.permutation(4))
        offset = (value.__array_interface__["data"][0] - flat.__array_interface__["data"][0]) // 4
        root[str(i)] = tf.view(storage, offset, value.shape, tuple(s // 4 for s in value.strides))
        expected[str(i)] = value
    (tmp_path / "views.pt").write_bytes(tf.zip_file(root, book))
    assert_same(read_torch(tmp_path / "views.pt"), expected)


def test_safetensors_written_by_their_library(tmp_path):
    state = {
        name: value
        for name, value in sorted(expected_types().items())
        if name not in ("complex64", "float8_e4m3fn")
    }
    state = {
        name: np.ascontiguousarray(value).reshape(value.shape) for name, value in state.items()
    }
    save_file(state, tmp_path / "x.safetensors", metadata={"note": "ignored"})
    read = read_torch(tmp_path / "x.safetensors")
    assert_same({name: read[name] for name in state}, state)
    assert set(read) == set(state)


def test_safetensors_whose_header_length_begins_as_a_pickle_does(tmp_path):
    """The first byte of a header of 128, 384, ... bytes is a pickle's, 0x80."""
    path, seen = tmp_path / "x.safetensors", set()
    for length in range(60, 80):
        for write in (save_file, lambda state, path: export.write(path, state, {})):
            write({"a" * length: np.ones(2, np.float32)}, path)
            seen.add(path.read_bytes()[0])
            assert_same(read_torch(path), {"a" * length: np.ones(2, np.float32)})
    assert 0x80 in seen


def test_several_parts(tmp_path):
    book = tf.Book()
    one, two = ({"w": book.tensor(np.full(3, i, np.float32))} for i in (1, 2))
    path = tmp_path / "x.pt"
    path.write_bytes(tf.zip_file({"model": one, "ema": two, "step": 5}, book))
    assert read_torch(path)["w"][0] == 2 and read_torch(path, entry="model")["w"][0] == 1
    path.write_bytes(tf.zip_file({"a": one, "b": two}, book))
    with pytest.raises(UnsafeFileError, match="choose one with entry=.*a, b"):
        read_torch(path)
    with pytest.raises(UnsafeFileError, match="no part c .*a, b"):
        read_torch(path, entry="c")


def test_numpy_values_inside(tmp_path):
    """EDM's networks keep numpy scalars among their attributes; reference statistics are arrays."""
    import pickle

    mu, order = np.linspace(0, 1, 7), np.asfortranarray(np.arange(6.0).reshape(2, 3))
    for protocol in (2, 4, 5):
        data = {"mu": mu, "sigma": order, "skip_scale": np.sqrt(0.5), "n": np.int64(3)}
        (tmp_path / "s.pkl").write_bytes(pickle.dumps(data, protocol=protocol))
        read = read_torch(tmp_path / "s.pkl")
        np.testing.assert_array_equal(read["mu"], mu)
        np.testing.assert_array_equal(read["sigma"], order)
        assert open_torch(tmp_path / "s.pkl").root["skip_scale"] == np.sqrt(0.5)


def test_reading_needs_no_torch():
    code = f"import sys; from ogdm_jax.interop import read_torch; read_torch({str(MADE / 'types.pt')!r}); "
    code += "sys.exit(any(m in sys.modules for m in ('torch', 'tensorflow')))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
