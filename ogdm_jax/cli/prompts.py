"""The words of a command about texts and about models of others that take them."""

import argparse
import dataclasses
from collections.abc import Sequence

import numpy as np

from ogdm_jax import places
from ogdm_jax.cli.parsing import whole
from ogdm_jax.config import ConfigError, require
from ogdm_jax.interop import stable_diffusion
from ogdm_jax.training import foreign
from ogdm_jax.training.workdir import TrainedModel, open_workdir

_FOREIGN = ("vae", "tokenizer", "prediction")


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options of texts and of Stable Diffusion's folders and files."""
    group = parser.add_argument_group("text", "Stable Diffusion: --workdir is its folder or file")
    add = group.add_argument
    add("--prompt", action="append", default=[], help="a text; given several times: in turn")
    add(
        "--prompts", default="", help="file of texts, one a line, in turn (default: one image each)"
    )
    add(
        "--negative", default="", help="text that --guidance compares with (default: the empty one)"
    )
    add("--size", type=whole(1), default=0, help="pixels a side (default: what it was made for)")
    add("--vae", default="", help="file or folder of another autoencoder")
    add("--tokenizer", default="", help="folder of the tokenizer, which a single file lacks")
    add("--prediction", default="", choices=("", *stable_diffusion.PREDICTIONS), help="of a file")


def read(args: argparse.Namespace) -> list[str]:
    """The texts of a command, in order; [] where there are none.

    Raises:
      ConfigError: both ways to give them, an empty line or file.
    """
    if not args.prompts:
        return list(args.prompt)
    if args.prompt:
        raise ConfigError("--prompt, --prompts: both given; expected one of them")
    path = places.local(args.prompts, "--prompts")
    if not path.is_file():
        raise ConfigError(f"--prompts: {args.prompts!r} is no file; expected one text a line")
    try:
        text = path.read_text(encoding="utf-8-sig")  # without the mark that Notepad writes
    except UnicodeDecodeError:
        raise ConfigError(f"--prompts: {args.prompts!r} is no text; expected UTF-8") from None
    lines = text.removesuffix("\n").split("\n") if text else []
    empty = [i for i, line in enumerate(lines, 1) if not line.strip()]
    if empty or not lines:
        where = f"line {empty[0]} is empty" if empty else "it is empty"
        raise ConfigError(f"--prompts: {args.prompts!r}: {where}; expected one text a line")
    return lines


def open_model(args: argparse.Namespace, texts: Sequence[str]) -> TrainedModel:
    """The model of a command.

    Raises:
      ConfigError: texts for a model that takes none, or none for one that does; options of another
        kind of model.
    """
    if not stable_diffusion.is_model(args.workdir):
        for name in ("size", *_FOREIGN[1:]):
            value = getattr(args, name)
            folder = "a --workdir of Stable Diffusion with it, a folder with model_index.json"
            require(not value, f"--{name}", value, folder)
        vae = None if args.latents else args.vae
        trained = open_workdir(args.workdir, args.step, args.weights, vae=vae)
        if trained.tokenizer is not None:
            if not texts:
                raise ConfigError(
                    f"--prompt: not given, and the model of '{args.workdir}' makes pictures of "
                    "texts; expected a text, or --prompts FILE"
                )
            _check_negative(args)
            return trained
        given = "--prompt" if texts else "--negative" if args.negative else ""
        if given:
            raise ConfigError(
                f"{given}: given, and the model of '{args.workdir}' has no text encoder; expected "
                "the folder of a Stable Diffusion (model_index.json) or its single file"
            )
        return trained
    if args.latents:
        raise ConfigError("--latents: given with Stable Diffusion; expected a model trained here")
    if not texts:
        raise ConfigError(
            f"--prompt: not given, and '{args.workdir}' is taken for Stable Diffusion; expected a "
            "text, or --prompts FILE (of another program's model: ogdm convert makes a --workdir)"
        )
    if args.step is not None or args.weights != "ema":
        raise ConfigError(
            "--step, --weights: given with a model that no run here trained; leave them out"
        )
    if args.evaluate:
        raise ConfigError(
            "--evaluate: the model's training data are not known; expected ogdm evaluate with them"
        )
    _check_negative(args)
    given = {name: getattr(args, name) for name in _FOREIGN}
    return foreign.open_model(args.workdir, args.size, **given)


def _check_negative(args: argparse.Namespace) -> None:
    """Raises ConfigError for a negative text that nothing compares with."""
    named = {name.strip() for name in args.guidance.split(",")}
    if args.negative and not named & {"cfg", "apg"}:
        raise ConfigError(
            "--negative: given without guidance by cfg or apg, which compare with it; expected one "
            "of them in --guidance"
        )


@dataclasses.dataclass(frozen=True)
class Texts:
    """The conditions of a run: texts in turn, and what guidance compares with."""

    texts: Sequence[str]
    negative: str

    def rows(self, trained: TrainedModel, n: int) -> dict[str, np.ndarray]:
        """Labels of n images."""
        return trained.texts(self.texts, self.negative, n)

    @property
    def origin(self) -> dict[str, object]:
        """For the record of what was drawn."""
        return {"--prompt": list(self.texts), "--negative": self.negative}

    def cut(self, trained: TrainedModel) -> list[str]:
        """Texts whose end no token is left for."""
        tokenizer = trained.tokenizer
        return [self.texts[i] for i in tokenizer.cut(self.texts)] if tokenizer else []
