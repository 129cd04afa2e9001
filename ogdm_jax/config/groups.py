"""Every setting of a training run with its default, its meaning and its limits: EDM's recipe for
CIFAR-10 (2206.00364, configuration F) on one set of names.

Durations are "N steps", "N images", "N kimg" or "N Mimg"; images are counted over all devices.
A method's settings are declared in its own file, and lie in `Config.others` until it is built.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, TypeVar

from ogdm_jax.config.fields import ConfigError, check, duration, require, setting, suggestion

# What `sampling.sampler` and `sampling.generate` have under these names.
SOLVERS = ("euler", "heun", "ddim", "ancestral", "spndm", "fpndm", "dpmpp_2m")
GRIDS = ("edm", "vp", "ve", "iddpm", "respaced", "ddim", "quad", "trailing", "pndm")
Settings = TypeVar("Settings")
_free = functools.partial(setting, free=True)  # may differ when a run is resumed
_decided = functools.partial(setting, decided=True)  # may differ then with --override


class _Checked:
    """A group: its fields are checked when it is made, and what concerns several of them after."""

    def __post_init__(self) -> None:
        check(self, type(self).__name__.lower())
        self._check_together()

    def _check_together(self) -> None:
        """Checks what concerns several fields of the group."""


@dataclasses.dataclass(frozen=True)
class Data(_Checked):
    """Where images come from and how they are batched and augmented."""

    source: str = _decided(
        "tfds:cifar10/train",
        "digits, mnist5k, tfds:NAME/SPLIT, folder:DIR, zip:FILE, npz:FILE, cifar10:FILE",
    )
    data_dir: str = _free("", "where prepared tfds sets lie; '' = tfds's own default")
    batch: int = _decided(
        512, "images per step over all devices", least=1, expected="a positive number of images"
    )
    conditional: bool = setting(False, "the network sees class labels")
    label_dropout: float = _decided(
        0.0,
        "share of labels hidden in training (for classifier-free guidance)",
        least=0,
        most=1,
        expected="a probability",
    )
    xflip: bool = _decided(
        False, "unlabelled horizontal flips; they become part of the data distribution"
    )
    augment: float = _decided(
        0.12,
        "probability of EDM's labelled augmentation; 0 = off",
        least=0,
        most=1,
        expected="a probability",
    )
    resolution: int = _decided(
        0,
        "crop images to squares and resize them to this side; 0 = as stored",
        least=0,
        expected="a number of pixels, or 0 for images as stored",
    )
    channels: int = _decided(0, "1 or 3; 0 = as stored")
    memory_limit: float = _free(
        2.0,
        "GiB; smaller sets are kept in memory as one array",
        least=0,
        expected="GiB, at least 0",
    )
    workers: int = _free(
        -1,
        "processes that read larger sets; -1 = half the cores (1 to 8), 0 = threads instead",
        least=-1,
        expected="a number of processes, 0 for threads, or -1 for half of the cores",
    )

    def _check_together(self) -> None:
        stored = "1, 3, or 0 for images as stored"
        require(self.channels in (0, 1, 3), "data.channels", self.channels, stored)


@dataclasses.dataclass(frozen=True)
class Network(_Checked):
    """The denoiser's network."""

    kind: str = setting(
        "song",
        "song (DDPM++, NCSN++), dhariwal (EDM's ADM) or openai (ADM as OpenAI has it)",
        choices=("song", "dhariwal", "openai"),
    )
    model_channels: int = setting(128, "width of the first level", least=1)
    channel_mult: tuple[int, ...] = setting((2, 2, 2), "width of each level over the first's")
    num_blocks: int = setting(4, "residual blocks per level", least=1)
    attn_resolutions: tuple[int, ...] = setting((16,), "sides at which blocks attend")
    dropout: float = _decided(
        0.13, "share of dropped units", least=0, below=1, expected="a probability below 1"
    )
    embedding_type: str = setting("positional", "song: positional, or fourier (NCSN++)")
    encoder_type: str = setting("standard", "song: standard, or residual (NCSN++)")
    resample_filter: tuple[int, ...] = setting((1, 1), "song: (1, 1), or (1, 3, 3, 1) (NCSN++)")
    num_heads: int = setting(1, "openai: attention heads")
    head_channels: int = setting(
        0, "openai: width of a head, in place of their number where above 0"
    )
    scale_shift: bool = setting(
        True, "openai: the embedding scales and shifts (use_scale_shift_norm)"
    )
    resblock_updown: bool = setting(False, "openai: residual blocks resample")
    dtype: str = _decided(
        "float32",
        "compute type; parameters stay float32",
        choices=("float32", "bfloat16"),
    )
    remat: bool = _free(False, "recompute activations in the backward pass")


@dataclasses.dataclass(frozen=True)
class Precondition(_Checked):
    """How the network becomes a denoiser."""

    kind: str = setting(
        "edm",
        "edm, vp, ve, iddpm, or adm (eps of a discrete process)",
        choices=("edm", "vp", "ve", "iddpm", "adm"),
    )
    sigma_data: float = setting(
        0.5, "standard deviation of the data in [-1, 1]; `data describe` measures it", above=0
    )
    schedule: str = setting(
        "linear", "adm and noise.distribution ddpm: betas", choices=("linear", "cosine")
    )
    diffusion_steps: int = setting(1000, "and their number", least=2, expected="at least 2")
    learned_variance: bool = setting(
        False, "adm: the network has channels for it, trained by the bound of L_hybrid"
    )
    rescale_timesteps: bool = setting(False, "adm: the network is told t * 1000 / diffusion_steps")


@dataclasses.dataclass(frozen=True)
class Noise(_Checked):
    """The distribution of the noise levels of training."""

    distribution: str = _decided(
        "edm",
        "edm (log-normal), vp, ve, or ddpm (uniform over the discrete process)",
        choices=("edm", "vp", "ve", "ddpm"),
        was="law",
    )
    mean: float = _decided(-1.2, "edm: of ln sigma")
    std: float = _decided(1.2, "edm: of ln sigma", above=0)
    clip: bool = _decided(
        False,
        "clip sigma to [sample.sigma_min, sample.sigma_max] (OGDM's code; 2 draws in 100,000)",
    )
    stratified: bool = _decided(False, "spread the quantiles of a batch evenly")


@dataclasses.dataclass(frozen=True)
class Optim(_Checked):
    """Adam."""

    learning_rate: float = _decided(1e-3, "peak learning rate", above=0)
    ramp: str = _decided("10 Mimg", "linear warm-up from 0")
    decay: str = _decided(
        "0 steps",
        "linear decay to 0 over this length; 0 = constant, train.duration = as long as the run",
    )
    betas: tuple[float, float] = _decided(
        (0.9, 0.999), "of Adam", least=0, below=1, expected="two numbers in [0, 1)"
    )
    eps: float = _decided(1e-8, "of Adam", above=0)
    weight_decay: float = _decided(0.0, "decoupled (AdamW)", least=0)
    accumulate: int = _free(
        1,
        "rounds per optimiser step; equals one big batch",
        least=1,
        expected="a positive number of rounds",
    )

    def _check_together(self) -> None:
        require(len(self.betas) == 2, "optim.betas", self.betas, "two numbers in [0, 1)")


@dataclasses.dataclass(frozen=True)
class Ema(_Checked):
    """The exponential moving average of the parameters, which samples are drawn from."""

    halflife: str = _decided("500 kimg", "half-life")
    rampup: float = _decided(
        0.05,
        "half-life <= this share of the images seen; 0 = no ramp-up, as where init.workdir is set",
        least=0,
    )


@dataclasses.dataclass(frozen=True)
class Init(_Checked):
    """What a fresh run starts from."""

    workdir: str = setting("", "fine-tune the last checkpoint of this training folder")
    weights: str = setting("ema", "ema or params of that checkpoint")
    step: int = _free(
        -1,
        "a checkpoint of that folder; without init.workdir, and where a run is resumed: go back to "
        "this step of --workdir, with its optimiser (0 starts afresh); -1 = the newest",
        least=-1,
        expected="the step of a checkpoint, or -1 for the newest",
    )


@dataclasses.dataclass(frozen=True)
class Train(_Checked):
    """Length and checkpoints."""

    duration: str = _free("200 Mimg", "length of the training")
    save_every: str = _free("2500 kimg", "from checkpoint to checkpoint; 0 = only at the end")
    keep: int = _free(3, "newest checkpoints that stay")
    keep_every: str = _free("0 steps", "also keep one checkpoint per this length; 0 = none")


@dataclasses.dataclass(frozen=True)
class Parallel(_Checked):
    """How devices share the work."""

    plan: str = _free(
        "mesh",
        "mesh (data-parallel), sharded (parameters, EMA, Adam's state divided too) or pmap",
        choices=("mesh", "sharded", "pmap"),
        expected="one of mesh, sharded, pmap",
    )
    devices: int = _free(0, "number of devices; 0 = all", least=0)


@dataclasses.dataclass(frozen=True)
class Log(_Checked):
    """What is written down while training."""

    every: str = _free("50 kimg", "from line to line")
    tensorboard: bool = _free(True, "also write TensorBoard events")


@dataclasses.dataclass(frozen=True)
class Sample(_Checked):
    """The sampler, in training and as the default of sampling."""

    every: str = _free("5 Mimg", "from sample grid to sample grid; 0 = only at the end")
    num: int = _free(64, "images of a grid", least=1, expected="at least 1")
    solver: str = _free("heun", "rule of one step", choices=SOLVERS)
    steps: int = _free(18, "steps of the solver", least=1)
    grid: str = _free(
        "edm",
        "edm, vp, ve, iddpm; of discrete models also respaced (guided-diffusion's), ddim, quad, "
        "trailing, and pndm (as the released S- and F-PNDM step)",
        choices=GRIDS,
    )
    sigma_min: float = _decided(0.002, "lowest noise level; noise.clip clips to it")
    sigma_max: float = _decided(80.0, "highest noise level; noise.clip clips to it")
    rho: float = _free(7.0, "exponent of the grid", above=0)
    eta: float = _free(
        0.0, "ddim and heun: 0 = deterministic, 1 = as random as DDPM", least=0, most=1
    )
    clip: bool = _free(
        False, "clamp x0_hat to [-1, 1] at every evaluation, as ADM's published samples were made"
    )

    def _check_together(self) -> None:
        stochastic = self.solver in ("ddim", "heun")
        require(self.eta == 0 or stochastic, "sample.eta", self.eta, "0 but with ddim or heun")
        ordered = 0 < self.sigma_min < self.sigma_max
        require(ordered, "sample.sigma_min", self.sigma_min, "0 < sigma_min < sigma_max")
        if self.grid == "pndm":
            require(
                self.solver in ("spndm", "fpndm"),
                "sample.solver",
                self.solver,
                "spndm or fpndm with the grid 'pndm'",
            )
            require(
                not self.clip,
                "sample.clip",
                self.clip,
                "False with the grid 'pndm', whose released code does not clip; the grids ddim and "
                "respaced do",
            )


@dataclasses.dataclass(frozen=True)
class Evaluate(_Checked):
    """The distance of samples to the data."""

    features: str = _free("", "feature space: a labelled source, lite0, inception; '' = none")
    weights: str = _free("", "inception: the weights file")
    num: int = _free(
        0, "samples for it; 0 = as many as the data set has", least=0, expected="at least 0"
    )
    every: str = _free("0 steps", "evaluate during training, too; 0 = only at the end")
    keep_best: int = _free(
        1,
        "checkpoints with the smallest distances that stay, whatever train.keep says",
        least=0,
        expected="at least 0",
    )


@dataclasses.dataclass(frozen=True)
class Config:
    """All settings of a run; nothing behind the entry points reads anything else.

    Attributes:
      others: {method: its settings as plain values}; `Config.settings` makes them the method's own
        dataclass.
    """

    seed: int = _decided(0, "of every draw", least=0)
    task: str = setting(
        "denoiser",
        "what is trained: a denoiser, or a discriminator that guides one",
        choices=("denoiser", "discriminator"),
    )
    methods: tuple[str, ...] = _decided(
        (), "training methods that are on, by name, with commas between them"
    )
    data: Data = Data()
    network: Network = Network()
    precondition: Precondition = Precondition()
    noise: Noise = Noise()
    optim: Optim = Optim()
    ema: Ema = Ema()
    init: Init = Init()
    train: Train = Train()
    parallel: Parallel = Parallel()
    log: Log = Log()
    sample: Sample = Sample()
    evaluate: Evaluate = Evaluate()
    others: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        check(self, "")
        for key, text in flatten(self).items():
            if key in DURATIONS and (key, text) != ("optim.decay", WHOLE_RUN):
                duration(text, self.data.batch, f"config.{key}")
        every, features = self.evaluate.every, self.evaluate.features
        if self.steps(every) and not features:
            require(False, "evaluate.every", every, "'0 steps' while evaluate.features is ''")

    def steps(self, text: str) -> int:
        """Optimiser steps of one of this run's durations."""
        text = self.train.duration if text == WHOLE_RUN else text
        return duration(text, self.data.batch)

    def settings(self, name: str, kind: type[Settings]) -> Settings:
        """The group of a method as the dataclass that the method declares, checked.

        Raises:
          ConfigError: an unknown key or a value out of range.
        """
        return make(kind, self.others.get(name, {}), name)


GROUPS: dict[str, Any] = {
    field.name: type(field.default)
    for field in dataclasses.fields(Config)
    if dataclasses.is_dataclass(field.default)
}
WHOLE_RUN = "train.duration"  # as a value of optim.decay
DURATIONS = (
    *("optim.ramp", "optim.decay", "ema.halflife", "log.every", "sample.every", "evaluate.every"),
    *("train.duration", "train.save_every", "train.keep_every"),
)


def make(kind: type[Settings], values: Mapping[str, Any], group: str) -> Settings:
    """A dataclass of settings from the values of a group; what is not given keeps its default.

    Raises:
      ConfigError: a key that the dataclass does not have, with the nearest that it has; a value out
        of range.
    """
    fields = dataclasses.fields(kind)  # type: ignore[arg-type]
    known = [field.name for field in fields]
    older = {field.metadata.get("was", ""): field.name for field in fields}
    values = {older.get(name, name): value for name, value in values.items()}
    for name in values:
        if name not in known:
            key = f"{group}.{name}" if group else name
            raise ConfigError(
                f"config.{key}: unknown key {name!r}{suggestion(name, known)}; "
                f"{group or 'the configuration'} has {', '.join(sorted(known))}"
            )
    return kind(**values)


def resolve(values: Mapping[str, Any]) -> Config:
    """The typed settings of nested plain values: {"seed": 0, "data": {"batch": 64}, ...}. Groups
    that are not declared here are methods' own.

    Raises:
      ConfigError: as `make`.
    """
    top: dict[str, Any] = {}
    others: dict[str, Mapping[str, Any]] = {}
    for name, value in values.items():
        if name in GROUPS:
            top[name] = make(GROUPS[name], value, name)
        elif isinstance(value, Mapping):
            others[name] = value
        else:
            top[name] = value
    return make(Config, top | {"others": others}, "")


def plain(config: Config) -> dict[str, Any]:
    """Nested plain values of a configuration, those of methods at the top: what `resolve` takes."""
    values = dataclasses.asdict(config)
    return {**values, **values.pop("others")}


def replace(config: Config, changes: Mapping[str, Any]) -> Config:
    """The configuration with other values, {"optim.accumulate": 2}; it is checked anew."""
    values = plain(config)
    for key, value in changes.items():
        group, _, leaf = key.rpartition(".")
        (values[group] if group else values)[leaf] = value
    return resolve(values)


def flatten(config: Config | Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"group.key": value} of every leaf."""
    values = plain(config) if isinstance(config, Config) else config
    found: dict[str, Any] = {}
    for key, value in values.items():
        nested = isinstance(value, Mapping)
        found |= flatten(value, f"{prefix}{key}.") if nested else {prefix + key: value}
    return found
