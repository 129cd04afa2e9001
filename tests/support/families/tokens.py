"""CLIP's tokenizer, row for row."""

import json
import tempfile
from pathlib import Path

import numpy as np
import pytest

from ogdm_jax.data import tokens
from tests.support.golden_support import Golden, family


@family("clip_tokenizer")
def check_tokenizer(golden: Golden):
    pytest.importorskip("tokenizers")
    texts, vocabulary = golden.json("texts"), json.loads(str(golden["vocab_json"]))
    merges = str(golden["merges_txt"])
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
        (folder / "merges.txt").write_text(merges, encoding="utf-8")
        check(golden, folder, texts)
    pairs = [line for line in merges.splitlines() if line and not line.startswith("#version")]
    for form in (pairs, [pair.split() for pair in pairs]):  # before and from transformers 4.45 on
        with tempfile.TemporaryDirectory() as name:
            whole = {"model": {"type": "BPE", "vocab": vocabulary, "merges": form}}
            (Path(name) / "tokenizer.json").write_text(json.dumps(whole), encoding="utf-8")
            check(golden, Path(name), texts)


def check(golden: Golden, folder: Path, texts: list[str]):
    length = golden.config["max_length"]
    first = tokens.open_tokenizer(folder, length)
    np.testing.assert_array_equal(first(texts), golden["ids"])
    np.testing.assert_array_equal(
        tokens.open_tokenizer(folder, length, "!")(texts), golden["ids_pad0"]
    )
    longer = np.flatnonzero(golden["untruncated"] > length)
    assert first.cut(texts) == longer.tolist()
