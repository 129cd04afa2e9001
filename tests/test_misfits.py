"""What looks like a known network and is none, settings of wrong types and ranges: one sentence
each, no traceback.
"""

import json

import numpy as np
import pytest
from safetensors.numpy import save_file

from ogdm_jax.interop import from_torch, load_pretrained
from tests.support import hostile, snapshots
from tests.support.commands import ogdm

pytestmark = pytest.mark.fast


@pytest.mark.parametrize("name", hostile.unrecognised())
def test_state_dicts_of_no_network_are_refused_in_one_sentence(name, tmp_path):
    state = hostile.unrecognised()[name]
    with pytest.raises(ValueError) as caught:
        from_torch(
            state,
            **(
                {"img_resolution": 8, "num_heads": 1} if name.startswith(("adm", "encoder")) else {}
            ),
        )
    message = str(caught.value)
    assert message.isprintable() and message.isascii() and len(message) < 600, message
    save_file(state, tmp_path / "x.safetensors")
    done = ogdm(tmp_path, "show", "x.safetensors", "--tensors")
    assert (
        done.returncode == 0 and "network: " in done.stdout or done.stderr.startswith("error: ")
    ), done
    assert all(line.isprintable() for line in (done.stdout + done.stderr).splitlines())


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A small network of EDM's as export writes it: (file, its JSON)."""
    folder = tmp_path_factory.mktemp("exported")
    snapshot = snapshots.published(folder)
    for words in (
        ("convert", snapshot.name, "--out", "work"),
        ("export", "work", "--out", "x.safetensors"),
    ):
        done = ogdm(folder, *words)
        assert done.returncode == 0, done.stderr
    return folder / "x.safetensors", json.loads((folder / "x.json").read_text())


def test_values_of_the_json_file_are_checked(exported):
    path, about = exported
    cases = [
        ({"settings": []}, "settings: [] given; expected a JSON object"),
        ({"kind": ["edm"]}, "kind: ['edm'] given; expected one of"),
        ({"dropout": [1]}, "dropout: [1] given; expected a number from 0"),
        ({"dropout": 7.5}, "dropout: 7.5 given"),
        ({"dropout": True}, "dropout: True given"),
        ({"sigma_data": float("inf")}, "sigma_data: inf given; expected a positive number"),
        ({"sigma_data": float("nan")}, "sigma_data: nan given"),
        ({"sigma_data": 0}, "sigma_data: 0 given"),
        ({"precondition": {}}, "precondition: {} given"),
        ({"schedule": "\x1b[2J"}, "schedule: '"),
    ]
    for change, words in cases:
        path.with_suffix(".json").write_text(json.dumps(about | change))
        with pytest.raises(ValueError) as caught:
            load_pretrained(path)
        assert str(path.with_suffix(".json")) in str(caught.value) and words in str(caught.value)
        assert str(caught.value).isprintable()
    cases = [
        ({"channel_mult": 3}, "channel_mult: 3 given; expected a list"),
        ({"channel_mult": [[1]]}, "channel_mult: [[1]] given"),
        ({"num_blocks": 10**6}, "num_blocks: 1000000 given; expected a whole number from 1 to 64"),
        ({"img_resolution": "8"}, "img_resolution: '8' given; expected a whole number"),
        ({"model_type": ["SongUNet"]}, "settings given"),
        ({"embedding_type": 5}, "embedding_type: 5 given; expected a text"),
        ({"dropout": 1}, "dropout: 1 given"),
    ]
    for change, words in cases:
        path.with_suffix(".json").write_text(
            json.dumps(about | {"settings": about["settings"] | change})
        )
        with pytest.raises(ValueError) as caught:
            load_pretrained(path)
        assert words in str(caught.value)
    for text, words in (
        *((text, "expected an object") for text in ("[]", "3", "null")),
        *((text, '"format": 1') for text in ('{"format": 2}', "{}")),
        ("[" * 100_000, "is no JSON"),
    ):
        path.with_suffix(".json").write_text(text)
        with pytest.raises(ValueError, match=words) as caught:
            load_pretrained(path)
        assert path.with_suffix(".json").name in str(caught.value)
    path.with_suffix(".json").write_text(json.dumps(about))
    assert load_pretrained(path).kind == "edm"


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("img_resolution=abc", "img_resolution: 'abc' given; expected a whole number"),
        ("channel_mult=3", "channel_mult: 3 given; expected a list"),
        ("num_blocks=1.5", "num_blocks: 1.5 given"),
        ("dropout=7.5", "dropout: 7.5 given; expected a number from 0 to below 1"),
        ("sigma_data=Infinity", "sigma_data: inf given"),
        ("attn_resolutions=" + "[" * 50 + "]" * 50, "attn_resolutions: "),
        ("model_type=[1]", "model_type: (1,) given; expected one of SongUNet"),
    ],
)
def test_settings_of_the_command_line_are_checked(exported, setting, words):
    path, _ = exported
    done = ogdm(path.parent, "convert", path.name, "--out", "other", "--set", setting)
    assert done.returncode == 1 and words in done.stderr and done.stderr.startswith("error: "), (
        done.stderr
    )
    assert len(done.stderr.strip().splitlines()) == 1


def test_numpys_numbers_are_settings_too(exported):
    path, _ = exported
    assert (
        load_pretrained(path, dropout=np.float32(0.25), sigma_data=np.float64(0.5)).network.dropout
        == 0.25
    )
