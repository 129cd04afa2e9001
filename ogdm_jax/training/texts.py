"""What a run on captions needs: a tokenizer, its captions as tokens, and the weights of a Stable
Diffusion's folder (arXiv 2112.10752) to start from.
"""

import dataclasses
import os
from collections.abc import Sequence
from typing import Any, cast

import jax
import numpy as np

from ogdm_jax import places
from ogdm_jax.config import Config, ConfigError, flatten, require
from ogdm_jax.data import Source
from ogdm_jax.data.tokens import Tokenizer, is_whole
from ogdm_jax.interop import stable_diffusion
from ogdm_jax.models import TEXT
from ogdm_jax.training.state import TrainState
from ogdm_jax.typing import PyTree

LENGTH = 77  # tokens of a caption
_FIELD = "config.init.workdir"
_PART = 4096  # captions that are encoded at a time


def is_folder(path: str | os.PathLike) -> bool:
    """Whether a path is a folder of diffusers with a whole model."""
    return bool(path) and (places.place(path) / stable_diffusion.INDEX).is_file()


def open_words(config: Config, workdir: str | os.PathLike = "") -> Tokenizer:
    """The tokenizer that a run's folder keeps, else that of config.init.workdir, which is a run's
    folder or one of diffusers.

    Raises:
      ConfigError: there is neither.
      TokenizerError: its files cannot be used.
    """
    cut = None
    for folder in (workdir, config.init.workdir):
        inside = places.place(folder) / stable_diffusion.TOKENIZER if folder else None
        if inside is not None and is_whole(inside):
            return stable_diffusion.open_words(inside, LENGTH, config.network.context)
        if inside is not None and inside.is_dir():
            cut = cut or inside
    if cut is not None:  # says what it lacks
        return stable_diffusion.open_words(cut, LENGTH, config.network.context)
    raise ConfigError(
        f"{_FIELD}: {config.init.workdir!r} given; expected a folder of diffusers, or of a run on "
        "captions, whose text encoder and tokenizer are taken (init.weights=text: these alone)"
    )


def keep(config: Config, workdir: str | os.PathLike) -> None:
    """Copies the tokenizer of a fresh run into its folder, which needs no other then."""
    if not is_whole(places.place(workdir) / stable_diffusion.TOKENIZER):
        stable_diffusion.copy_words(config.init.workdir, workdir)


def check_source(source: Source, field: str = "data.source") -> None:
    """Raises ConfigError, naming the setting `field`, for a source without captions."""
    if not source.captions:
        raise ConfigError(
            f"config.{field}: {source.name!r} given with network.kind=sd; expected latents with "
            "captions, as ogdm data encode 'folder:DIR?caption=txt' writes them"
        )


def tokenised(source: Source, tokenizer: Tokenizer) -> Source:
    """A source whose labels are the tokens int32 [N,M] of its captions: 308 bytes an image. What
    its fingerprint knows are the captions themselves.

    Args:
      source: of latents with captions (`check_source`).
      tokenizer: of the run.
    """
    rows = np.empty((len(source), tokenizer.length), np.int32)
    cut: list[int] = []
    for start in range(0, len(source), _PART):
        part, long = tokenizer.rows(source.captions[start : start + _PART])
        rows[start : start + _PART] = part
        cut += [start + i for i in long]
    notes = source.notes
    if cut:
        notes += (
            f"{len(cut)} of {len(rows)} captions are longer than {tokenizer.length} tokens and "
            f"lose their ends (caption {cut[0]} first)",
        )
    return dataclasses.replace(source, labels=rows, empty=tokenizer([""])[0], notes=notes)


def of_rows(source: Source, seeds: Sequence[int] | np.ndarray) -> dict[str, np.ndarray]:
    """Conditions of samples [n] (`models.Model.text`): seed i has image i's caption, in turn."""
    assert source.labels is not None and source.empty is not None, "a tokenised source"
    rows = np.asarray(seeds) % len(source)
    return {"prompt": source.labels[rows], "none": np.repeat(source.empty[None], len(rows), 0)}


def open_folder(
    path: str | os.PathLike,
    config: Config,
    wanted: Sequence[str] = ("unet", "text_encoder"),
    field: str = _FIELD,
    partial: bool = False,
) -> tuple[PyTree, PyTree, tuple[str, ...]]:
    """(parameters of the U-Net, variables of the text encoder, notes) of a folder of diffusers, on
    the host; {} of a part that is not wanted.

    Args:
      path: of the folder.
      config: of the run that they are for.
      wanted: the parts that are read.
      field: the setting that names the folder, for messages.
      partial: whether the run's process may be another one than the folder's scheduler says.

    Raises:
      ConfigError: a network or a process that is not the configuration's; the sentence has the
        words that make it so.
    """
    found = stable_diffusion.open_model(path, field=field, wanted=wanted)
    here, groups = flatten(config), ("network",) if partial else ("network", "precondition")
    told = {k: v for k, v in found.settings.items() if k.partition(".")[0] in groups}
    words = [f"--config.{key}={value}" for key, value in told.items() if here[key] != value]
    if words:
        other = "" if partial else ", or init.partial=true for another process than its scheduler's"
        raise ConfigError(
            f"{field}: {str(path)!r} has other settings than this configuration; expected "
            f"{' '.join(words).replace(', ', ',')}{other}"
        )
    text: Any = found.text.network
    require(text.positions == LENGTH, "init.workdir", path, f"texts of {LENGTH} tokens")
    return cast(dict, found.unet.variables).get("params", {}), found.text.variables, found.notes


def initial(config: Config, placed: TrainState) -> tuple[PyTree, PyTree, str]:
    """(params, buffers, what to say of them) of a fresh run, from a folder of diffusers.

    Args:
      config: of the run.
      placed: shapes of its state, each with its place; params are as here with init.weights=text.
    """
    init = config.init
    whole = init.weights in ("ema", "text") and init.step < 0
    need = "ema or text, and no init.step, with a folder of diffusers"
    require(whole, "init.weights", init.weights, need)
    wanted = ("text_encoder",) if init.weights == "text" else ("unet", "text_encoder")
    params, text, notes = open_folder(init.workdir, config, wanted, partial=init.partial)
    read = lambda like, value: jax.make_array_from_callback(
        like.shape, like.sharding, lambda index: np.asarray(value[index], like.dtype)
    )
    buffers = {**placed.buffers, TEXT: jax.tree.map(read, placed.buffers[TEXT], text)}
    if init.weights == "text":
        return placed.params, buffers, f"the text encoder is that of {init.workdir}"
    said = "; ".join((f"fine-tuning the U-Net of {init.workdir}, with its text encoder", *notes))
    return jax.tree.map(read, placed.params, params), buffers, said
