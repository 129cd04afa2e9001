"""JSON that is written is valid and keeps a NaN; JSON that cannot be read is one sentence. Errors of
the operating system are one, too.
"""

import errno
import json
import math

import jax.numpy as jnp
import numpy as np
import pytest

from ogdm_jax import records, startup

pytestmark = pytest.mark.fast


def strict(text: str):
    def refuse(word):
        raise AssertionError(f"{word} is not JSON")

    return json.loads(text, parse_constant=refuse)


def test_what_is_written_is_valid_and_keeps_what_went_wrong():
    value = {"fd": float("nan"), 3: [np.float32(math.inf), np.int64(2)], "of": (np.arange(2), None)}
    found = strict(records.dumps(value))
    assert found == {"fd": "nan", "3": ["inf", 2], "of": [[0, 1], None]}
    assert math.isnan(float(found["fd"]))
    values = jnp.asarray([1.0, jnp.nan], jnp.bfloat16)
    assert strict(records.dumps([values, values[0]])) == [[1.0, "nan"], 1.0]


@pytest.mark.parametrize(
    "content, words",
    [
        (b"", "is no JSON"),
        (b"[1, 2", "is no JSON"),
        (b"[" * 100_000, "is no JSON"),
        (b"\xff\xfe\x00", "is no text"),
        (b"[1]", "holds list; expected an object"),
        (None, "cannot be read (No such file"),
    ],
)
def test_what_cannot_be_read_is_one_sentence(tmp_path, content, words):
    path = tmp_path / "a.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(records.RecordError, match="--out") as caught:
        records.read(path, dict, "--out")
    assert words in str(caught.value) and str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "error, words",
    [
        (OSError(errno.ENOSPC, "No space left on device", "/x/y"), "'/x/y': no space left"),
        (PermissionError(errno.EACCES, "Permission denied", "/x"), "'/x': permission denied"),
        (OSError("boom"), "boom"),
    ],
)
def test_an_error_of_the_system_is_one_sentence(capsys, error, words):
    with pytest.raises(SystemExit) as left, startup.one_sentence():
        raise error
    assert left.value.code == 1
    printed = capsys.readouterr().err
    assert printed.startswith("error: ") and words in printed and printed.count("\n") == 1


def test_the_mark_that_notepad_writes_is_no_part_of_the_text(tmp_path):
    path = tmp_path / "a.json"
    for encoding in ("utf-8-sig", "utf-16"):
        path.write_bytes('{"é": 1}'.encode(encoding))
        assert records.read(path, dict) == {"é": 1}
