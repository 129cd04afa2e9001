"""Tokenizer files that cannot be used are refused in one sentence."""

import json

import pytest

from ogdm_jax import records
from ogdm_jax.data import tokens

pytestmark = pytest.mark.fast
WORDS = {tokens.START: 0, tokens.END: 1, "a</w>": 2}


@pytest.mark.parametrize(
    "files,said",
    [
        ({}, "has no tokenizer; expected vocab.json and merges.txt"),
        ({"vocab.json": '{"a": 1}', "merges.txt": ""}, "has no token '<|startoftext|>'"),
        ({"vocab.json": "[1]", "merges.txt": ""}, "expected an object"),
        ({"vocab.json": json.dumps(WORDS), "merges.txt": "a b c"}, "none of CLIP's"),
        ({"tokenizer.json": "{}"}, "none of CLIP's"),
        ({"tokenizer.json": json.dumps({"model": {"vocab": WORDS, "merges": 3}})}, "none of CLIP"),
        ({"tokenizer.json": json.dumps({"model": []})}, "none of CLIP's"),
        ({"tokenizer.json": "{"}, "is no JSON"),
    ],
)
def test_refused(files, said, tmp_path):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(
        (tokens.TokenizerError, records.RecordError), match=said.replace("|", r"\|")
    ):
        tokens.open_tokenizer(tmp_path)


def test_merges_that_the_vocabulary_does_not_have(tmp_path):
    pytest.importorskip("tokenizers")
    (tmp_path / "vocab.json").write_text(json.dumps(WORDS))
    (tmp_path / "merges.txt").write_text("#version: 0.2\nq u\n")
    with pytest.raises(tokens.TokenizerError, match="expected CLIP's vocabulary and merges"):
        tokens.open_tokenizer(tmp_path)
