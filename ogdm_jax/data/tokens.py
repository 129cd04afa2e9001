"""Prompts as tokens: CLIP's byte-level byte-pair encoding, from the files that a text encoder comes
with.

The encoding is the library `tokenizers`' (the extra `text`), set up here as CLIP's: Unicode NFC,
one space for runs of white space, lower case; special tokens, 's 't 're 've 'm 'll 'd, runs of
letters, single digits and runs of anything else become symbols whose last one ends in `</w>`.
OpenAI's own program also repairs text with `ftfy`, which today's programs leave out.
"""

import dataclasses
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
from etils import epath

from ogdm_jax import places, records

START, END = "<|startoftext|>", "<|endoftext|>"
_PIECES = (
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
)
FILES = "vocab.json and merges.txt, or tokenizer.json"


def is_whole(folder: epath.Path) -> bool:
    """Whether a folder has all files of a tokenizer, and not what was left of a copy."""
    here = lambda *names: all((folder / name).is_file() for name in names)
    return here("tokenizer.json") or here("vocab.json", "merges.txt")


class TokenizerError(ValueError):
    """A tokenizer's files cannot be used; one sentence names the file and what was expected."""


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """Texts -> int32 [B,length]: start, at most length - 2 tokens, end, padding.

    Attributes:
      encoder: of the library.
      length: tokens of a row.
      end: number of the token behind a text.
      pad: number of the token that fills a row: `end` for Stable Diffusion 1, 0 ("!") for 2.
    """

    encoder: Any
    length: int
    end: int
    pad: int

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        """See the class. A longer text loses its end, as everywhere; `cut` says which."""
        return self.rows(texts)[0]

    def cut(self, texts: Sequence[str]) -> list[int]:
        """The texts, by number, that are longer than a row."""
        return self.rows(texts)[1]

    def rows(self, texts: Sequence[str]) -> tuple[np.ndarray, list[int]]:
        """(rows, what `cut` says) of texts."""
        rows = np.full((len(texts), self.length), self.pad, np.int32)
        found = [one.ids for one in self.encoder.encode_batch(list(texts))]
        for row, ids in zip(rows, found, strict=True):
            kept = [*ids[: self.length - 1], self.end] if len(ids) > self.length else ids
            row[: len(kept)] = kept
        return rows, [i for i, ids in enumerate(found) if len(ids) > self.length]


def open_tokenizer(
    folder: str | os.PathLike, length: int = 77, pad: str | None = None
) -> Tokenizer:
    """The tokenizer of a folder with vocab.json and merges.txt, or tokenizer.json.

    Args:
      folder: such as `tokenizer` of a diffusers folder.
      length: tokens of a row.
      pad: the token that fills rows; None: the end token, as Stable Diffusion 1 has it (2 has "!").

    Raises:
      TokenizerError: files that are missing or none of CLIP's; no library.
    """
    vocabulary, merges = _table(places.place(folder, "tokenizer"))
    for token in (START, END, pad or END):
        if token not in vocabulary:
            raise TokenizerError(f"{folder}: has no token {token!r}; expected CLIP's vocabulary")
    end, encoder = vocabulary[END], _encoder(vocabulary, merges)
    # As in transformers, the token that fills rows is one wherever a text has it: with "!" for it,
    # "wow!" ends in 0, where open_clip has the token "!</w>".
    encoder.add_special_tokens([START, END, pad or END])
    return Tokenizer(encoder, length, end, vocabulary[pad or END])


def _table(folder: Any) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """(token -> number, pairs in the order in which they merge)."""
    whole, vocab, merges = (folder / n for n in ("tokenizer.json", "vocab.json", "merges.txt"))
    if vocab.is_file() and merges.is_file():
        found, lines = records.read(vocab, dict, "tokenizer"), merges.read_text(encoding="utf-8")
        split = (line.split() for line in lines.splitlines())
        pairs: Any = [pair for pair in split if pair and pair[0] != "#version:"]
    elif whole.is_file():
        model = records.read(whole, dict, "tokenizer").get("model")
        model = model if isinstance(model, dict) else {}
        found, pairs = model.get("vocab"), model.get("merges")
        cut = lambda pair: pair.split() if isinstance(pair, str) else pair
        pairs = [cut(pair) for pair in pairs] if isinstance(pairs, list) else None
    else:
        raise TokenizerError(f"{folder}: has no tokenizer; expected {FILES} in it")
    found = found if isinstance(found, dict) else {}
    good = found and all(isinstance(n, int) for n in found.values())
    two = lambda pair: len(pair) == 2 and all(isinstance(half, str) for half in pair)
    if not good or pairs is None or not all(map(two, pairs)):
        raise TokenizerError(f"{folder}: its tokenizer is none of CLIP's; expected {FILES}")
    return found, [(a, b) for a, b in pairs]


def _encoder(vocabulary: dict[str, int], merges: list[tuple[str, str]]) -> Any:
    try:
        import tokenizers
    except ModuleNotFoundError as error:
        raise TokenizerError(
            "tokenizers: is not installed, and prompts need it; expected pip install "
            "'ogdm_jax[text]'"
        ) from error
    from tokenizers import models, normalizers, pre_tokenizers, processors

    try:
        model = models.BPE(
            vocab=vocabulary,
            merges=merges,
            unk_token=END,
            continuing_subword_prefix="",
            end_of_word_suffix="</w>",
            fuse_unk=False,
        )
    except Exception as error:  # the library's own errors have no common class
        raise TokenizerError(
            f"tokenizer: {error}; expected CLIP's vocabulary and merges"
        ) from error
    encoder = tokenizers.Tokenizer(model)
    spaces = normalizers.Replace(tokenizers.Regex(r"\s+"), " ")
    encoder.normalizer = normalizers.Sequence(  # pyright: ignore[reportAttributeAccessIssue]
        [normalizers.NFC(), spaces, normalizers.Lowercase()]
    )
    pieces = pre_tokenizers.Split(tokenizers.Regex(_PIECES), behavior="removed", invert=True)
    encoder.pre_tokenizer = pre_tokenizers.Sequence(  # pyright: ignore[reportAttributeAccessIssue]
        [pieces, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    ends = [(token, vocabulary[token]) for token in (END, START)]
    encoder.post_processor = processors.RobertaProcessing(  # pyright: ignore[reportAttributeAccessIssue]
        *ends, trim_offsets=False, add_prefix_space=False
    )
    return encoder
