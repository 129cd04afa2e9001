"""Tokenizer files that cannot be used are refused in one sentence."""

import json

import pytest

from ogdm_jax import records
from ogdm_jax.data import tokens
from ogdm_jax.interop import stable_diffusion

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


@pytest.mark.parametrize(
    "config,special,pad",
    [
        ({"pad_token": tokens.END}, {"pad_token": "!"}, "!"),  # Stable Diffusion 2.1
        ({"pad_token": tokens.END}, {"bos_token": tokens.START}, tokens.END),
        ({}, {"pad_token": {"content": "!", "lstrip": False}}, "!"),
        ({"pad_token": "!", "added_tokens_decoder": {}}, {"pad_token": tokens.END}, "!"),
        ({}, {}, "!"),
    ],
)
def test_the_token_that_fills_rows_is_that_of_transformers(config, special, pad, tmp_path):
    """Of a text encoder of Stable Diffusion 2 whose folder's two files disagree, or are silent."""
    pytest.importorskip("tokenizers")
    files = {"vocab.json": WORDS | {"!": 3}, "tokenizer_config.json": config}
    for name, content in (files | {"special_tokens_map.json": special}).items():
        (tmp_path / name).write_text(json.dumps(content))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    words = stable_diffusion.open_words(tmp_path, 5, 1024)
    assert words.pad == files["vocab.json"][pad]
