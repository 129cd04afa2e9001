"""The model card of an exported folder: README.md as hubs of models show it."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from ogdm_jax import __version__, models, places, records
from ogdm_jax import config as configs
from ogdm_jax.data.labels import class_words
from ogdm_jax.data.pictures import save_png, sheet
from ogdm_jax.report.numbers import nice
from ogdm_jax.report.templates import environment
from ogdm_jax.sampling import generate
from ogdm_jax.training import checkpoint, evaluations
from ogdm_jax.training.evaluate import words_of
from ogdm_jax.training.workdir import TrainedModel

WEIGHTS, CONFIG, PICTURE, PAGE = "model.safetensors", "config.json", "samples.png", "README.md"
FILES = (WEIGHTS, CONFIG, PICTURE, PAGE)  # of the folder
SHOWN = 32  # images of the picture
_COLUMNS = ("features", "solver", "steps", "nfe", "n", "fd", "floor")


def write(
    folder: epath.Path, run: TrainedModel, workdir: str, licence: str, averaged: bool = True
) -> None:
    """Writes README.md and its picture of samples into an exported folder.

    Args:
      folder: with the weights.
      run: what they are of.
      workdir: its training folder: data fingerprint and distances are in there.
      licence: of the weights, an identifier as hubs know them; "unknown" is one.
      averaged: whether they are those of the moving average, whose distances were measured.
    """
    seeds = np.arange(SHOWN)
    labels = generate.labels_for(seeds, run.model.label_dim, None)
    drawn = np.concatenate(list(run.batches(run.settings(), seeds, labels=labels)))
    save_png(folder / PICTURE, sheet(drawn, 8, captions=class_words(labels, run.class_names)))
    snapshot = checkpoint.find(workdir, run.step)
    measured = distances(workdir, run.step) if averaged else []
    with places.written(folder / PAGE) as new:
        new.write_text(text(folder.name, run, snapshot.data_set, measured, licence))


def distances(workdir: str, step: int) -> list[dict[str, Any]]:
    """The distances of a step that training or `ogdm report` measured, those of fewest evaluations
    first.
    """
    found = [evaluations.read(workdir).get(step, {})]
    path = places.place(workdir) / evaluations.MEASURED
    if path.exists():
        found += records.read(path, list)
    kept = [r for r in found if r.get("step") == step and all(name in r for name in _COLUMNS)]
    kept = [r | {"features": ", against ".join(_what(r))} for r in kept]
    unique = {tuple(r[name] for name in _COLUMNS[:5]): r for r in kept}
    return sorted(unique.values(), key=lambda r: r["nfe"])


def _what(report: Mapping[str, Any]) -> list[str]:
    """The features of a distance, and the images where they are not those that were trained on."""
    return [str(report[name]) for name in ("features", "reference") if name in report]


def text(
    name: str,
    run: TrainedModel,
    data: Mapping[str, Any],
    measured: Sequence[Mapping[str, Any]],
    licence: str,
) -> str:
    """The card: front matter, picture, how to load, what it is, data, distances, settings."""
    config, model = run.config, run.model
    classes = class_words(np.arange(model.label_dim), run.class_names)
    label = ", label=jax.numpy.zeros(16, int)" if classes else ""
    count, pre = models.parameter_count(run.params), config.precondition
    nobody = " (nobody has said one)" if licence == "unknown" else ""
    facts = {
        "network": f"{type(model.network).__name__}, {count:,} parameters",
        "preconditioning": f"{pre.kind}, sigma_data {pre.sigma_data}",
        "methods": ", ".join(config.methods) or "none (plain training)",
        "training": f"step {run.step:,} of batches of {config.data.batch}",
        "licence of the weights": licence + nobody,
    }
    known = {n: v for n, v in data.items() if n != "class_names" and v is not None}
    known = {"source": config.data.source} | known
    known |= {"classes": ", ".join(classes)} if classes else {}
    template = environment(keep_trailing_newline=True).get_template("card.md.j2")
    return template.render(
        licence=licence,
        tags=("diffusion", "jax", *config.methods),
        name=name,
        kind="A class-conditional" if classes else "An unconditional",
        size="x".join(map(str, model.picture_shape)),
        shape=", ".join(map(str, model.image_shape)),
        version=__version__,
        picture=PICTURE,
        sampler=words_of(run.settings()),
        label=label,
        coder=model.autoencoder,
        weights=WEIGHTS,
        config=CONFIG,
        facts=facts,
        data=known,
        rows=[[v if isinstance(v := r[c], str) else nice(v) for c in _COLUMNS] for r in measured],
        settings=configs.changed(config),
    )
