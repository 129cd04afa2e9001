"""Hostile headers of safetensors, JSON files beside weights and in folders; random edits of all kinds."""

import json
import struct
import sys

import numpy as np
import pytest

from ogdm_jax import startup
from ogdm_jax.interop import UnsafeFileError, export, load_pretrained, read_torch
from tests.support import torch_mutants
from tests.support.torch_files import safetensors_file

GOOD = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


def header(**changes) -> bytes:
    return safetensors_file({"a": GOOD | changes})


HEADERS = {
    "no braces": safetensors_file(b'["a"]'),
    "a list inside": safetensors_file({"a": [1, 2]}),
    "a text inside": safetensors_file({"a": "b"}),
    "null": safetensors_file({"a": None}),
    "no dtype": safetensors_file({"a": {"shape": [2], "data_offsets": [0, 8]}}),
    "dtype of a list": header(dtype=["F32"]),
    "dtype of an object": header(dtype={"F32": 1}),
    "unknown dtype": header(dtype="F33"),
    "shape of texts": header(shape=["2"]),
    "shape of floats": header(shape=[2.0]),
    "shape of booleans": header(shape=[True, 2]),
    "shape of nothing": header(shape=None),
    "shape of 1000": header(shape=[1] * 1000 + [2]),
    "huge shape": header(shape=[10**30]),
    "NaN in a shape": safetensors_file(b'{"a":{"dtype":"F32","shape":[NaN],"data_offsets":[0,8]}}'),
    "exponents": safetensors_file(b'{"a":{"dtype":"F32","shape":[2e0],"data_offsets":[0,8]}}'),
    "offsets of one": header(data_offsets=[8]),
    "offsets of three": header(data_offsets=[0, 4, 8]),
    "offsets reversed": header(data_offsets=[8, 0]),
    "negative offsets": header(data_offsets=[-8, 0]),
    "offsets of texts": header(data_offsets=["0", "8"]),
    "offsets inside": header(data_offsets=[0, 7]),
    "digits": safetensors_file(
        b'{"a":{"dtype":"F32","shape":[%b],"data_offsets":[0,8]}}' % (b"9" * 9000)
    ),
    "no UTF-8": safetensors_file(b'{"\xff\xfe":1}'),
    "a name of many letters": safetensors_file({"a" * 5000: GOOD}),
    "metadata only": safetensors_file({"__metadata__": {"a": "b"}}, b""),
    "nothing": safetensors_file({}, b""),
    "cut": safetensors_file({"a": GOOD})[:-4],
    "deep": safetensors_file(b'{"a":' + b'{"b":' * 5000 + b"1" + b"}" * 5001),
    "length of zero": struct.pack("<Q", 0) + b"{}",
}


@pytest.mark.fast
@pytest.mark.parametrize("name", HEADERS)
def test_headers_of_safetensors(name, tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(HEADERS[name])
    with pytest.raises(UnsafeFileError) as caught:
        read_torch(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    assert len(str(caught.value)) < len(str(path)) + 300


FORMAT = {"format": export.FORMAT}
BESIDE = {
    "empty": b"",
    "cut": b'{"format": 1, ',
    "a list": b"[]",
    "null": b"null",
    "binary": bytes(range(256)),
    "Latin-1": b'{"format": 1, "kind": "\xe9"}',
    "deep": b"[" * 100_000,
    "no format": {},
    "another format": {"format": 2},
    "format of a text": {"format": "1"},
    "format of a list": {"format": [1]},
    "many digits": b'{"format": 1, "sigma_data": %b}' % (b"9" * 9000),
    "unknown kind": FORMAT | {"kind": "sdxl"},
    "kind of a list": FORMAT | {"kind": ["edm"]},
    "settings of a list": FORMAT | {"settings": [1]},
    "unknown setting": FORMAT | {"settings": {"width": 3}},
    "a setting of flax": FORMAT | {"settings": {"parent": 3}},
    "no width": FORMAT | {"settings": {"model_channels": 0}},
    "huge width": FORMAT | {"settings": {"model_channels": 2**40}},
    "negative blocks": FORMAT | {"settings": {"num_blocks": -1}},
    "many blocks": FORMAT | {"settings": {"num_blocks": 10**6}},
    "many levels": FORMAT | {"settings": {"channel_mult": [1] * 100}},
    "levels of texts": FORMAT | {"settings": {"channel_mult": ["1"]}},
    "sides of lists": FORMAT | {"settings": {"attn_resolutions": [[4]]}},
    "no side": FORMAT | {"settings": {"img_resolution": 0}},
    "another side": FORMAT | {"settings": {"img_resolution": 2**19}},
    "more labels": FORMAT | {"settings": {"label_dim": 1000}},
    "dropout of 2": FORMAT | {"settings": {"dropout": 2}},
    "precondition of an object": FORMAT | {"precondition": {"edm": 1}},
    "sigma_data of NaN": b'{"format": 1, "sigma_data": NaN}',
    "negative sigma_data": FORMAT | {"sigma_data": -0.5},
    "infinite sigma_data": b'{"format": 1, "sigma_data": 1e999}',
    "schedule": FORMAT | {"schedule": 3},
    "dropout": FORMAT | {"dropout": "0.1"},
}


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights")
    export.write(folder / "x.safetensors", torch_mutants.small(), {})
    return folder / "x.safetensors"


@pytest.mark.fast
@pytest.mark.parametrize("name", BESIDE)
def test_json_beside_weights(name, weights):
    said = BESIDE[name]
    about = weights.with_suffix(".json")
    about.write_bytes(said if isinstance(said, bytes) else json.dumps(said).encode())
    with pytest.raises(ValueError) as caught:
        load_pretrained(weights)
    assert startup.raised_here(caught.value) and "\n" not in str(caught.value)
    assert len(str(caught.value)) < len(str(about)) + 700
    about.write_text(json.dumps(FORMAT))
    assert load_pretrained(weights).kind == "edm"


CONFIGS = [
    *(
        b"",
        b"{",
        b"[]",
        b"null",
        b"3",
        b'"a"',
        bytes(range(256)),
        b"[" * 100_000,
        b"\xef\xbb\xbf{}",
    ),
    *('{"_class_name": 1}'.encode("utf-16"), b'{"_class_name": %b}' % (b"9" * 9000)),
    *(b'{"_class_name": NaN}', b'{"_class_name": null}', b'{"_class_name": []}'),
    *(b'{"_class_name": [[]]}', b'{"_class_name": {"a": 1}}', b'{"architectures": "x"}'),
    *(
        b'{"architectures": [1]}',
        b'{"model_type": "a\\nb\\u001b[2J"}',
        b'{"_class_name": "%b"}' % (b"a" * 9999),
    ),
    *(b'{"a": 1, "a": 2}', b'{"__class__": "os.system"}'),
]


@pytest.mark.fast
@pytest.mark.parametrize("case", range(len(CONFIGS)))
def test_config_json_of_a_folder(case, tmp_path):
    """Whatever it says: the folder is named for what it is, in one short line."""
    (tmp_path / "config.json").write_bytes(CONFIGS[case])
    for index in (False, True):
        if index:
            (tmp_path / "model.safetensors.index.json").write_bytes(CONFIGS[case])
        with pytest.raises(UnsafeFileError) as caught:
            read_torch(tmp_path)
        said = str(caught.value)
        assert "\n" not in said and "\x1b" not in said and len(said) < len(str(tmp_path)) + 400


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="a peak of memory is read as Linux gives it")
@pytest.mark.parametrize("kind", ["read", "load"])
def test_fuzz_of_checkpoints_3000_mutants(kind):
    """The reader of torch's, numpy's and safetensors' files, and load_pretrained: read or refused in
    one sentence, under 5 s and 300 MB each, and nothing runs.
    """
    done = torch_mutants.apart(kind, 3000, seed=int(np.frombuffer(kind.encode(), "u1").sum()))
    assert done["failed"] == [] and done["acted"] == []
    assert done["read"] > 100 and done["refused"] > 100 and done["read"] + done["refused"] == 3000
    assert done["seconds"] < 5 and done["megabytes"] < 300
