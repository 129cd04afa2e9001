"""Trains DG's discriminator (arXiv 2211.17091) with the loop, plans, checkpoints and logs of every
other training.

    python train.py --config configs/digits_dg.py --workdir runs/digits_dg
    --config.dg.prior=runs/digits

draws samples of the prior (training/fakes.py), trains log p_data - log p_model at log-uniform noise
levels, and keeps
the checkpoint whose guided samples are nearest to the data. Never the one of the lowest loss: on
mixtures the loss reaches its optimum long before the samples do, and an over-fitted discriminator
lowers it while they get worse.

This is not OGDM's discriminator: that one is trained beside the denoiser and needs none of this
(methods/ogdm.py).
"""

import dataclasses
import functools
import os
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from etils import epath

from ogdm_jax import config as configs
from ogdm_jax import parallel, places, randomness
from ogdm_jax.data import Source, augment
from ogdm_jax.discriminator import fakes
from ogdm_jax.discriminator.settings import Settings, check_run
from ogdm_jax.discriminator.settings import of as settings_of
from ogdm_jax.interop import export
from ogdm_jax.interop.pretrained import load_pretrained
from ogdm_jax.methods import contract as slots
from ogdm_jax.methods import dg
from ogdm_jax.models import Model
from ogdm_jax.networks import feature_discriminator
from ogdm_jax.networks.feature_discriminator import FeatureDiscriminator
from ogdm_jax.pixels import to_float
from ogdm_jax.sampling import churn as churning
from ogdm_jax.sampling import generate
from ogdm_jax.sampling.guidance import Guidance
from ogdm_jax.training import checkpoint, evaluate, loop, optim
from ogdm_jax.training import logs as metrics
from ogdm_jax.training import run as runs
from ogdm_jax.training import step as steps
from ogdm_jax.training.state import TrainState
from ogdm_jax.training.workdir import TrainedModel, open_source, open_workdir
from ogdm_jax.typing import Array, LogRatio, PyTree

_DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
_NETWORK = (  # what a discriminator has of config.network
    *("model_channels", "channel_mult", "num_blocks", "attn_resolutions", "head_channels"),
    *("dropout", "remat"),
)


@dataclasses.dataclass(frozen=True)
class DiscriminatorRun(runs.Run):
    """A run whose network is the discriminator; `source` is the real side.

    Attributes:
      prior: the guided model.   kept, held_out: the (real, generated) images that are, and are not,
        trained on.
      frozen_network: params of the extractor, or None.
    """

    prior: TrainedModel = None
    kept: tuple[Source, Source] = ()
    held_out: tuple[Source, Source] = ()
    frozen_network: PyTree = None

    def example_batch(self) -> dict[str, PyTree]:
        batch = super().example_batch()
        return batch | {"real": jnp.zeros_like(batch["index"])}


def _batches(run: DiscriminatorRun) -> fakes.Pairs:
    index, count = jax.process_index(), jax.process_count()
    workers = run.config.data.workers
    return fakes.Pairs(*run.kept, run.config.data.batch, run.config.seed, index, count, workers)


def build(
    config: configs.Config,
    plan: parallel.Plan,
    workdir: epath.Path,
    say: Callable[[str], None] = print,
) -> DiscriminatorRun:
    """Opens the prior, draws or reads its samples, and builds the run.

    Raises:
      ConfigError, CheckpointError, SourceError: bad settings, prior, samples or data.
    """
    settings, batch = check_run(config), config.data.batch
    parallel.check_batch(batch // 2, config.optim.accumulate, len(plan.devices))
    prior = open_prior(config)
    generate.check_settings(config.sample, prior.model)
    source = open_source(config if config.data.source else prior.config)
    if source.shape != prior.model.image_shape:
        raise configs.ConfigError(
            f"config.data.source: images of {source.shape}; expected the prior's "
            f"{prior.model.image_shape}"
        )
    network, frozen = open_network(config, source.shape, source.num_classes, workdir)
    if network.label_dim and not prior.model.label_dim:
        raise configs.ConfigError(
            "config.data.conditional: True given; expected a prior with classes for it"
        )
    _keep_extractor(network, frozen, workdir)
    path = samples_of(settings, workdir)
    drawn = fakes.obtain(config, prior, settings.num or len(source), path, plan.local_devices, say)
    (real, real_out), (fake, fake_out) = (
        fakes.split(s, settings.held_out) for s in (source, drawn)
    )
    for side, images in (("real", real), ("generated", fake)):
        configs.require(
            len(images) > 0, "dg.held_out", settings.held_out, f"a share that leaves {side} images"
        )
    fixed = _assemble(config, plan, source, network, frozen, prior.config.data.xflip)
    return DiscriminatorRun(
        *fixed, prior=prior, kept=(real, fake), held_out=(real_out, fake_out), frozen_network=frozen
    )


def planned(config: configs.Config, source: Source, plan: parallel.Plan) -> DiscriminatorRun:
    """The run without its prior, samples and data, for whoever only compiles: nothing but an
    extractor is read.
    """
    network, frozen = open_network(config, source.shape, source.num_classes, "")
    return DiscriminatorRun(
        *_assemble(config, plan, source, network, frozen, xflip=False), frozen_network=frozen
    )


def _assemble(
    config: configs.Config,
    plan: parallel.Plan,
    source: Source,
    network: FeatureDiscriminator,
    frozen: PyTree,
    xflip: bool,
) -> tuple[Any, ...]:
    """What every run has, as runs.Run lists it."""
    batch = config.data.batch
    rate = optim.learning_rate(
        config.optim.learning_rate,
        configs.duration(config.optim.ramp, batch, "config.optim.ramp"),
        configs.duration(config.optim.decay, batch, "config.optim.decay"),
    )
    # L2 coupled to the gradient, as in PyTorch's Adam(weight_decay=...), not AdamW.
    tx = optim.adam(rate, tuple(config.optim.betas), config.optim.eps)
    tx = optax.chain(optax.add_decayed_weights(config.optim.weight_decay), tx)
    filled = slots.combine([slots.Slots("dg", frozen=lambda: {"extractor": frozen})])
    loss = training_loss(config, network, xflip)
    pure = steps.make_step(config, network, None, filled, tx, rate, **plan.words, loss=loss)
    duration = configs.duration(config.train.duration, batch, "config.train.duration")
    return config, source, network, None, filled, tx, plan, pure, duration, {}


def samples_of(settings: Settings, workdir: str | os.PathLike) -> epath.Path:
    """The file of the prior's samples: that of config.dg.samples, or the training folder's own."""
    if settings.samples:
        return places.place(settings.samples, "config.dg.samples")
    return places.place(workdir) / "samples.npz"


def open_prior(config: configs.Config) -> TrainedModel:
    """The model to guide. Raises CheckpointError where the folder holds none."""
    settings = settings_of(config)
    step = (
        int(settings.prior_step) if settings.prior_step.isdigit() else settings.prior_step or None
    )
    return open_workdir(settings.prior, step, settings.prior_weights, "config.dg.prior")


def open_network(
    config: configs.Config,
    image_shape: tuple[int, int, int],
    num_classes: int,
    workdir: str | os.PathLike,
) -> tuple[FeatureDiscriminator, PyTree]:
    """(network, params of its extractor or None) of a configuration; the training folder's own copy
    comes first.

    Raises:
      ConfigError: settings that do not fit.   ValueError: an extractor file that is none, or for
      other images.
    """
    extractor = params = None
    if settings_of(config).extractor:
        copy = places.place(workdir) / "extractor.safetensors"
        kept = (copy, export.about_path(copy)) if copy.is_file() else ()
        with places.fetched(*kept) as files:
            path = (
                files[0]
                if files
                else places.local(settings_of(config).extractor, "config.dg.extractor")
            )
            found = load_pretrained(path, "adm_encoder")
        extractor, params = found.network, found.variables["params"]
    conditional = config.data.conditional
    configs.require(
        not conditional or num_classes > 0,
        "data.conditional",
        conditional,
        "a source with class labels",
    )
    classes = settings_of(config).classes or num_classes
    configs.require(
        classes >= num_classes, "dg.classes", classes, f"at least the source's {num_classes}"
    )
    settings = {name: getattr(config.network, name) for name in _NETWORK}
    settings["dtype"] = _DTYPES[config.network.dtype]
    labels = classes if conditional else 0
    return feature_discriminator.build(
        image_shape[0], image_shape[2], labels, extractor, **settings
    ), params


def _keep_extractor(network: FeatureDiscriminator, params: PyTree, workdir: epath.Path) -> None:
    """Copies the extractor into the training folder, once: sampling must not depend on a file
    elsewhere.
    """
    path = places.place(workdir) / "extractor.safetensors"
    if network.extractor is None or path.is_file() or jax.process_index() != 0:
        return
    about = {"kind": "adm_encoder", "settings": export.network_settings(network.extractor)}
    export.write(path, export.to_torch(network.extractor, {"params": params}), about)


def training_loss(
    config: configs.Config, network: FeatureDiscriminator, xflip: bool
) -> Callable[..., Any]:
    """loss(params, state, frozen, batch, key) -> (mean loss, sums of metrics): binary cross entropy
    of the logits.

    arXiv 2211.17091, equation of L_phi with lambda(t) = g^2 / s^2 as the density of noise levels.

    Args:
      xflip: the prior was trained on mirrored images, too: then the real side is mirrored at
        random.
    """

    def loss(params: PyTree, state: Any, frozen: PyTree, batch: steps.Batch, key: Array):
        keys = lambda purpose: randomness.example_keys(key, purpose, batch["index"])
        image = to_float(batch["image"])
        if xflip:
            mirrored = augment.xflip(keys("xflip"), image)
            image = jnp.where((batch["real"] == 1)[:, None, None, None], mirrored, image)
        ratio = ratio_of(network, settings_of(config).clock, 0.0, keys("dropout"))
        ratio = ratio({"params": params, "extractor": frozen["dg"]["extractor"]})
        value, right = _judge(config, ratio, image, batch, key)
        return jnp.mean(value), steps.sums({"loss": value, "accuracy": right})

    return loss


def _judge(
    config: configs.Config, ratio: LogRatio, image: Array, batch: steps.Batch, key: Array
) -> tuple[Array, Array]:
    """`cross_entropy` of a log ratio at x = image + sigma eps, both drawn from the key, each
    example for itself.
    """
    keys = lambda purpose: randomness.example_keys(key, purpose, batch["index"])
    sigma = dg.training_sigma(
        randomness.uniform(keys("sigma")), settings_of(config).t_min, settings_of(config).importance
    )
    x = image + sigma[:, None, None, None] * randomness.normal(keys("noise"), image.shape[1:])
    return cross_entropy(ratio(x, sigma, batch["label"]), batch["real"])


def cross_entropy(logit: Array, real: Array) -> tuple[Array, Array]:
    """(-log d where real is 1, -log(1 - d) where it is 0, and whether the logit's sign is right),
    [b] each.
    """
    value = optax.sigmoid_binary_cross_entropy(logit, real.astype(logit.dtype))
    return value, ((logit > 0) == (real == 1)).astype(logit.dtype)


class HeldOut:
    """Loss and accuracy of the moving average on images that were not trained on, at the same noise
    every time.
    """

    def __init__(self, run: DiscriminatorRun, batch: int = 256):
        self._run, self._batch = run, batch

    def __call__(self, params: PyTree) -> dict[str, float]:
        run, totals = self._run, []
        count = min(map(len, run.held_out))
        for start in range(0, count, self._batch):
            rows = np.resize(np.arange(start, min(start + self._batch, count)), self._batch)
            real, fake = (source.take(rows) for source in run.held_out)
            index = (start + np.arange(self._batch)).astype(np.int32)
            pair = fakes.paired(real | {"index": index}, fake | {"index": index})
            values = self._values(params, run.frozen_network, pair)
            totals.append([np.asarray(v)[: 2 * min(self._batch, count - start)] for v in values])
        loss, right = (np.concatenate(parts).mean() for parts in zip(*totals, strict=True))
        return {"held_out/loss": float(loss), "held_out/accuracy": float(right)}

    @functools.cached_property
    def _values(self):
        run = self._run

        def values(params, extractor, batch):
            ratio = ratio_of(run.model, settings_of(run.config).clock, 0.0)(
                {"params": params, "extractor": extractor}
            )
            return _judge(run.config, ratio, to_float(batch["image"]), batch, jax.random.key(0))

        return jax.jit(values)


class Evaluator(evaluate.Evaluator):
    """Distance of the guided prior's samples to the data at config.dg.weight and .weights; the best
    counts.
    """

    def __init__(self, run: DiscriminatorRun, workdir: epath.Path):
        super().__init__(run, workdir)
        self._weight, self._unguided = settings_of(run.config).weight, None

    def __call__(self, state: TrainState) -> dict[str, Any]:
        """The report of the best weight, with "weight" and "unguided", the distance without
        guidance.

        Only that report and its images are written.
        """
        if self._unguided is None:
            self._unguided = self._at(state, 0.0)[0]["fd"]
        ours = settings_of(self.run.config)
        weights = dict.fromkeys((ours.weight, *ours.weights))
        tried = [self._at(state, weight) for weight in weights]
        report, images = min(tried, key=lambda found: found[0]["fd"])
        return self._write(report | {"unguided": self._unguided}, images)

    def _at(self, state: TrainState, weight: float) -> tuple[dict[str, Any], np.ndarray]:
        self._weight = weight  # an array of the compiled sampler: no weight compiles anything
        report, images = self._measure(state)
        return report | {"weight": weight}, images

    @property
    def _model(self) -> Model:
        return self.run.prior.model

    @property
    def _churn(self) -> Any:
        settings = settings_of(self.run.config)
        return None if settings.boost else churning.parse(settings.churn, "config.dg.churn")

    def _weights(self, state: TrainState) -> tuple[PyTree, PyTree]:
        return self.run.prior.params, self.run.prior.buffers

    def _guidance(self, state: TrainState) -> tuple[Guidance, ...]:
        run, weight = self.run, self._weight
        method = guidance_of(
            run.config, run.model, run.plan.local_copy(state.ema), run.frozen_network
        )
        constants = method.constants | {"weight": np.float32(weight)}
        if weight == 0:
            constants |= {"corrector_weight": np.float32(0)}
        return *fakes.base_guidance(run.config), dataclasses.replace(method, constants=constants)


def _watch(
    run: DiscriminatorRun, workdir: epath.Path, writer: metrics.Writer
) -> Callable[[int, TrainState], None]:
    """Writes held-out loss and accuracy of the moving average."""
    held_out = HeldOut(run) if all(map(len, run.held_out)) else None

    def write(step: int, state: TrainState) -> None:
        params = run.plan.local_copy(state.ema)
        if held_out is not None and jax.process_index() == 0:
            writer.write(step, held_out(params))

    return write


TASK = loop.Task(build=build, batches=_batches, watch=_watch, evaluator=Evaluator)


def train(
    config: configs.Config,
    workdir: str | os.PathLike,
    say: Callable[[str], None] = print,
    profile: tuple[int, int] | None = None,
):
    """As loop.train, which says what is returned and raised, for a configuration with a group
    dg.
    """
    return loop.train(config, workdir, say, TASK, profile)


def ratio_of(
    network: FeatureDiscriminator, clock: str, clip: float = 1e-5, dropout: Array | None = None
) -> Callable[[PyTree], LogRatio]:
    """{"params", "extractor"} -> log_ratio(x, sigma, label) in x = x0 + sigma eps: what is trained
    is what guides.

    Args:
      clock, clip: of dg.log_ratio; training does not clip.   dropout: keys [B], while training.
    """

    def make(frozen: PyTree) -> LogRatio:
        def logit(x_vp: Array, time: Array, label: Array | None) -> Array:
            return network.logit(frozen["params"], frozen["extractor"], x_vp, time, label, dropout)

        return dg.log_ratio(logit, clip, clock)

    return make


def guidance_of(
    config: configs.Config,
    network: FeatureDiscriminator,
    params: PyTree,
    extractor: PyTree,
    **settings: Any,
):
    """The `Guidance` of a discriminator; settings replace those of config.dg (see
    dg.guidance).
    """
    names = ("weight", "corrector_weight", "time_min", "time_max", "boost")
    ours = settings_of(config)
    chosen = {name: getattr(ours, name) for name in names} | {
        k: v for k, v in settings.items() if v is not None
    }
    times = chosen["time_min"], chosen["time_max"]
    if not 0 <= times[0] < times[1]:
        raise ValueError(
            f"time_min={times[0]}, time_max={times[1]}; expected 0 <= time_min < time_max"
        )
    low, high = (float(dg.vp_sigma(np.float64(time))) for time in times)
    boost = None
    if chosen["boost"]:
        base = churning.parse(ours.churn, "config.dg.churn") or churning.Churn()
        boost = dg.Boost(base, chosen.get("boost_churn", dg.Boost.churn))
    return dg.guidance(
        ratio_of(network, ours.clock),
        chosen["weight"],
        low,
        high,
        chosen["corrector_weight"],
        params={"params": params, "extractor": extractor},
        boost=boost,
    )


def open_guidance(
    workdir: str | os.PathLike,
    step: int | str | None = None,
    run: TrainedModel | None = None,
    settings: configs.Sample | None = None,
    preset: str = "",
    warn: Callable[[str], None] = print,
    around: Mapping[str, Any] | None = None,
    labels: np.ndarray | None = None,
    **overrides: Any,
) -> Guidance:
    """A trained discriminator as a sampling method: `generate.sampler(...,
    guidance=(open_guidance(DIR),))`.

    Args:
      workdir: what training wrote.   step: its checkpoint; None = the best of its evaluations, else
        the newest.
      run, settings: the model that will be guided and its sampler; a discriminator of another one
        is told to `warn`.
      preset: a name of dg.PRESETS.
      around: "churn" (or its text) and "cfg" (weight) of the sampling to come, where they are to be
        compared, too.
      labels: [n] classes of the images to come, or None.
      overrides: of config.dg, those that are not None: weight, corrector_weight, time_min,
        time_max, boost; and boost_churn (see `dg.Settings`). The default weight is the one that the
        checkpoint's evaluation found best, else config.dg.weight.

    Raises:
      CheckpointError: no discriminator there.   ConfigError: an unknown preset.   ValueError: see
      dg.guidance.
    """
    if step is None and checkpoint.evaluations(workdir):
        step = "best"
    snapshot = checkpoint.find(workdir, step, "--dg.discriminator")
    config = snapshot.config
    if config.task != "discriminator":
        raise checkpoint.CheckpointError(
            f"--dg.discriminator: {str(workdir)!r} holds no discriminator; expected a folder of "
            "configs/*_dg.py"
        )
    if labels is not None and (labels < 0).any() and config.data.conditional:
        raise ValueError(  # its head knows no "no class"
            "--label: no class given, but the discriminator is conditional; expected the images' "
            "class"
        )
    network, extractor = open_network(config, snapshot.image_shape, snapshot.num_classes, workdir)
    params, _ = checkpoint.load_weights(snapshot, *jax.eval_shape(network.init, jax.random.key(0)))
    found = checkpoint.evaluations(workdir).get(snapshot.step, {})
    chosen = {"weight": found["weight"]} if "weight" in found else {}
    if preset:
        chosen = configs.choose("dg.preset", preset, dg.PRESETS).settings
    host = jax.tree.map(np.asarray, (params, extractor))
    method = guidance_of(
        config, network, *host, **chosen | {k: v for k, v in overrides.items() if v is not None}
    )
    path = samples_of(settings_of(config), workdir)
    if run is not None and path.is_file():
        sampler = ({k: getattr(settings, k) for k in fakes.SAMPLER} if settings else {}) | dict(
            around or {}
        )
        if method.churn:
            sampler.pop("churn", None)  # boosting churns by design, and over the folder's own churn
        _compare(fakes.about(path), {"weights": fakes.digest(run)} | sampler, workdir, warn)
    return method


def _compare(there: Mapping[str, Any], here: Mapping[str, Any], workdir, warn) -> None:
    """Says where the discriminator's samples differ from what it is about to guide."""

    def value(about: Mapping[str, Any], key: str) -> Any:
        found = about.get(key)
        if key == "churn" and not isinstance(found, churning.Churn):
            return churning.parse(found or "")
        return found

    differ = [k for k in here if value(here, k) != value(there, k)]
    if differ:
        warn(
            f"note: the discriminator of {workdir} was trained on samples that differ in "
            f"{', '.join(differ)}"
        )
