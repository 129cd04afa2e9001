"""A trained discriminator as guidance of a sampler."""

import dataclasses
import os
from collections.abc import Callable, Mapping
from typing import Any, TypedDict, Unpack

import jax
import numpy as np

from ogdm_jax.config import Config, ConfigError, Sample, choose
from ogdm_jax.discriminator import generated
from ogdm_jax.discriminator.network import open_network, ratio_of
from ogdm_jax.discriminator.settings import Settings
from ogdm_jax.discriminator.settings import of as settings_of
from ogdm_jax.latents import difference
from ogdm_jax.methods import dg
from ogdm_jax.networks.feature_discriminator import FeatureDiscriminator
from ogdm_jax.sampling import churn as churning
from ogdm_jax.sampling import generate
from ogdm_jax.sampling.churn import Churn
from ogdm_jax.sampling.guidance import Guidance
from ogdm_jax.training import checkpoint, evaluations, steps
from ogdm_jax.training.workdir import TrainedModel
from ogdm_jax.typing import PyTree


class Words(TypedDict, total=False):
    """Settings of guidance that a caller replaces, see `dg.Settings`; None leaves them."""

    weight: float | None
    corrector_weight: float | None
    time_min: float | None
    time_max: float | None
    boost: bool | None
    boost_churn: float | None
    rule: str | None


@dataclasses.dataclass(frozen=True)
class Use:
    """What a discriminator is about to guide.

    Attributes:
      model: the model.
      sampling: config.sample of the run.
      churn: of the run, where no method brings it.
      cfg: weight of classifier-free guidance, 1 without; None if it has a window.
    """

    model: TrainedModel
    sampling: Sample
    churn: Churn | None = None
    cfg: float | None = 1.0


def open_guidance(
    workdir: str | os.PathLike,
    step: int | str | None = None,
    *,
    use: Use | None = None,
    preset: str = "",
    labels: np.ndarray | None = None,
    log: Callable[[str], None] = print,
    **words: Unpack[Words],
) -> Guidance:
    """The guidance of a training folder: `model.sample(..., guidance=open_guidance(DIR))`.

    The weight is that of `words`, else of the preset, else the one that the checkpoint's evaluation
    found best, else config.dg.weight, else the solver's default. Published and evaluated weights
    are those of their solver (`dg.weight_under`); where another one acts, `log` says so.

    Args:
      workdir: what training wrote.
      step: its checkpoint; None takes the best of its evaluations, else the newest.
      use: what will be guided. If it differs from what the discriminator was trained on, `log` gets
        one line that says in what.
      preset: a name of dg.PRESETS.
      labels: [n] classes of the images to come, or None.
      log: see use.
      words: settings to replace.

    Raises:
      CheckpointError: no discriminator there.
      ConfigError: an unknown preset, or a discriminator of other images than the model's.
      ValueError: a conditional discriminator and images without a class.
    """
    if step is None and evaluations.ranked(evaluations.read(workdir), steps.complete(workdir)):
        step = "best"
    snapshot = checkpoint.find(workdir, step, "--dg.discriminator")
    config = snapshot.config
    if config.task != "discriminator":
        raise checkpoint.CheckpointError(
            f"--dg.discriminator: {str(workdir)!r} holds no discriminator; expected a folder of "
            "configs/*_dg.py"
        )
    _check_fits(workdir, snapshot, use, labels)
    network, extractor = open_network(config, snapshot.image_shape, snapshot.num_classes, workdir)
    params, _ = checkpoint.load_weights(snapshot, *jax.eval_shape(network.init, jax.random.key(0)))
    own, given = settings_of(config), {name: v for name, v in words.items() if v is not None}
    solver = config.sample.solver if use is None else use.sampling.solver
    report = evaluations.read(workdir).get(snapshot.step, {})
    chosen = _chosen(config, report, preset, given, solver, log)
    boost_churn, rule = chosen.pop("boost_churn", dg.Boost.churn), chosen.pop("rule", "score")
    settings = dataclasses.replace(own, **chosen)
    settings = dataclasses.replace(settings, weight=settings.weight_with(solver))
    if "boost_churn" in given and not settings.boost:
        raise ConfigError(
            f"--dg.boost_churn: {boost_churn:g} given without boosting; expected --dg.boost true"
        )
    if use is not None:
        _check_reach(settings, generate.noise_levels(use.model.model, use.sampling)[:-1])
    params, extractor = jax.tree.map(np.asarray, (params, extractor))
    method = guidance_of(settings, network, params, extractor, boost_churn, rule)
    path = settings_of(config).samples_path(workdir)
    if use is not None and path.is_file():
        differences = _differences(generated.read_origin(path), use, method)
        if differences:
            log(
                f"note: the discriminator of {workdir} was trained on samples that differ in "
                f"{', '.join(differences)}"
            )
    return method


def _check_reach(settings: Settings, levels: np.ndarray) -> None:
    """Raises ConfigError for a window of times in which no step of the grid lies."""
    times = dg.vp_time(levels)
    if not ((times >= settings.time_min) & (times <= settings.time_max)).any():
        raise ConfigError(
            f"--dg.time_min, --dg.time_max: {settings.time_min:g} and {settings.time_max:g} given, "
            f"where no step lies; expected times between {times[-1]:.4g} and {times[0]:.4g}"
        )


def _check_fits(
    workdir: str | os.PathLike,
    snapshot: checkpoint.Snapshot,
    use: Use | None,
    labels: np.ndarray | None,
) -> None:
    """Raises ValueError for a discriminator of other images than those that it is to guide."""
    conditional, classes = snapshot.config.data.conditional, snapshot.num_classes
    if use is not None and use.model.model.text is not None:
        raise ConfigError(
            "--guidance: dg given for a model of texts, which DG's discriminator does not see; "
            "expected a model of classes, or of no condition"
        )
    if labels is not None and (labels < 0).any() and conditional:
        raise ValueError(  # its head knows no "no class"
            "--label: no class given, but the discriminator is conditional; expected the images' "
            "class"
        )
    if use is None:
        return
    model, differs = use.model.model, ""
    if snapshot.image_shape != model.image_shape:
        differs = f"images {snapshot.image_shape}, the model's are {model.image_shape}"
    elif conditional and classes != model.label_dim and (model.label_dim or labels is None):
        differs = f"{classes} classes, the model has {model.label_dim}"
    elif snapshot.data_set and (other := difference(snapshot.latents, model.latents)):
        differs = f"other numbers than the model's ({other})"
    if differs:
        raise ConfigError(
            f"--dg.discriminator: {str(workdir)!r} is for {differs}; expected a "
            "discriminator of the model's images"
        )


def _chosen(
    config: Config,
    report: Mapping[str, Any],
    preset: str,
    given: dict[str, Any],
    solver: str,
    log: Callable[[str], None],
) -> dict[str, Any]:
    """What replaces the settings of a discriminator's run: those of the preset, or the weight that
    its evaluation (report) found, made to act alike under the solver; and what is given.
    """
    own, was, chosen = settings_of(config), config.sample.solver, dict[str, Any]()
    if preset:
        chosen, was = dict(choose("dg.preset", preset, dg.PRESETS).settings), "heun"
    elif (own.weight is None or own.weights) and "weight" in report:
        chosen = {"weight": report["weight"]}
    elif own.weight is not None and "weight" not in given and (was == "heun") != (solver == "heun"):
        log(
            f"note: config.dg.weight {own.weight:g} was given for {was!r}; with {solver!r} it is "
            "taken as it stands"
        )
    if "weight" not in chosen or "weight" in given:
        return chosen | given
    weight, second = chosen["weight"], chosen.get("corrector_weight", own.corrector_weight)
    if was != "heun":  # the second weight is that of the steps to come
        second = given.get("corrector_weight", second)
    found = dg.weight_under(weight, second, was, solver)
    if found != weight:
        log(
            f"note: the discriminator's weight {weight:g} is for {was!r}; with {solver!r} it is "
            f"{found:g}, which acts alike"
        )
    return chosen | {"weight": found} | given


def guidance_of(
    settings: Settings,
    network: FeatureDiscriminator,
    params: PyTree,
    extractor: PyTree,
    boost_churn: float = dg.Boost.churn,
    rule: str = "score",
) -> Guidance:
    """The guidance by a discriminator.

    Args:
      settings: weights, window of times and boosting.
      network: the discriminator.
      params: of its head.
      extractor: params of its extractor, or None.
      boost_churn: S_churn of boosted images, see `dg.Boost`.
      rule: of `dg.guidance`.
    """
    times = settings.time_min, settings.time_max
    low, high = (float(dg.vp_sigma(np.float64(time))) for time in times)
    boost = None
    if settings.boost:
        boost = dg.Boost(settings.sampler_churn() or Churn(), boost_churn)
    return dg.guidance(
        ratio_of(network, settings.clock),
        settings.weight_with("heun"),
        low,
        high,
        settings.corrector_weight,
        params={"params": params, "extractor": extractor},
        boost=boost,
        rule=rule,
    )


def _differences(origin: Mapping[str, Any], use: Use, method: Guidance) -> list[str]:
    """In what the discriminator's samples differ from what it is about to guide."""
    origin = {**origin, "churn": churning.parse(origin.get("churn") or "")}
    here: dict[str, Any] = {"weights": generated.digest(use.model)}
    here |= {name: getattr(use.sampling, name) for name in generated.SAMPLER}
    if method.churn is None:  # boosting churns by design, and over the folder's own churn
        here["churn"] = use.churn
    here["cfg"] = use.cfg
    return [name for name, value in here.items() if value != origin.get(name)]
