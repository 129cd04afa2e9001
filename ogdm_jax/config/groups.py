"""Every setting of a training run with its default, its meaning and its limits: EDM's recipe for
CIFAR-10 (2206.00364, configuration F) on one set of names.

Durations are "N steps", "N images", "N kimg" or "N Mimg"; images are counted over all devices.
`Config` (whole.py) is all of these groups; a method's settings are declared in its own file.
"""

import dataclasses
from typing import Any

from ogdm_jax.config.fields import Group, decided, free, setting

# What `sampling.sampler` and `sampling.generate` have under these names.
SOLVERS = (
    *("euler", "heun", "ddim", "ancestral", "spndm", "fpndm", "dpmpp_2m"),
    *("plms", "dpmpp_2m_sde", "unipc", "pc", "dopri5"),
)
# Settings of config.sample that one solver alone has, and `sampling.sample` takes by name.
SOLVER_OPTIONS = {"pc": ("snr", "corrector_steps", "sde"), "unipc": ("order", "bh")}
SOLVER_OPTIONS["dopri5"] = ("rtol", "atol")
# Steps of a discrete model's own process, and settings of config.sample that only these have.
OWN_GRIDS = ("respaced", "ddim", "quad", "trailing", "leading", "linspace")
GRID_OPTIONS = {"offset": ("leading",), "start": OWN_GRIDS, "end": OWN_GRIDS}
GRIDS = ("edm", "vp", "ve", "iddpm", "flow", *OWN_GRIDS, "pndm")
_FIXED = "solver=" + "|".join(name for name in SOLVERS if name != "dopri5")


@dataclasses.dataclass(frozen=True)
class Data(Group):
    """Where images come from and how they are batched and augmented."""

    source: str = decided(
        "tfds:cifar10/train",
        "digits, mnist5k, tfds:NAME/SPLIT, folder:DIR, wds:SHARDS, zip:FILE, npz:FILE, "
        "cifar10:FILE, latents:DIR (ogdm data encode)",
    )
    vae: str = free(
        "",
        "file or folder of the autoencoder that decodes latents; '' = the one that encoded them",
        only="source=latents:*",
    )
    heldout: str = free(
        "", "images that are never trained on, such as digits/test, tfds:NAME/test: their loss"
    )
    data_dir: str = free("", "where prepared tfds sets lie; '' = tfds's own default")
    batch: int = decided(
        512, "images per step over all devices", least=1, most=2**20, expected="1 to 2^20 images"
    )
    conditional: bool = setting(False, "the network sees class labels")
    label_dropout: float = decided(
        0.0,
        "share of labels hidden in training (for classifier-free guidance); of captions: replaced "
        "by the empty one",
        least=0,
        most=1,
        expected="a probability",
        only=("conditional", "network.kind=sd"),
    )
    xflip: bool = decided(
        False, "unlabelled horizontal flips; they become part of the data distribution"
    )
    augment: float = decided(
        0.12,
        "probability of EDM's labelled augmentation; 0 = off",
        least=0,
        most=1,
        expected="a probability",
    )
    resolution: int = decided(
        0,
        "crop images to squares and resize them to this side; 0 = as stored",
        least=0,
        most=8192,
        expected="a number of pixels, at most 8192, or 0 for images as stored",
    )
    channels: int = decided(0, "1 or 3; 0 = as stored")
    memory_limit: float = free(
        2.0,
        "GiB; smaller sets are kept in memory as one array",
        least=0,
        most=2**20,
        expected="GiB, at least 0",
    )
    workers: int = free(
        -1,
        "processes that read larger sets; -1 = half the cores (1 to 8), 0 = threads instead",
        least=-1,
        most=1024,
        expected="a number of processes, 0 for threads, or -1 for half of the cores",
    )

    def _check_together(self) -> None:
        self._require(self.channels in (0, 1, 3), "channels", "1, 3, or 0 for images as stored")


@dataclasses.dataclass(frozen=True)
class Optim(Group):
    """Adam."""

    learning_rate: float = decided(1e-3, "peak learning rate", above=0)
    ramp: str = decided("10 Mimg", "linear warm-up from 0")
    schedule: str = decided(
        "linear",
        "after the warm-up: constant, linear or cosine (to 0 over optim.decay), or inverse_sqrt "
        "(EDM2's: constant up to optim.decay, then falling as 1 / sqrt(step))",
        choices=("constant", "linear", "cosine", "inverse_sqrt"),
    )
    decay: str = decided(
        "0 steps",
        "length of the schedule; 0 = constant (linear), train.duration = as long as the run",
        only="schedule=linear|cosine|inverse_sqrt",
    )
    clip: float = decided(
        0.0, "largest norm of the whole gradient, which is scaled down to it; 0 = off", least=0
    )
    betas: tuple[float, float] = decided(
        (0.9, 0.999), "of Adam", least=0, below=1, expected="two numbers in [0, 1)"
    )
    eps: float = decided(1e-8, "of Adam", above=0)
    weight_decay: float = decided(0.0, "decoupled (AdamW)", least=0)
    accumulate: int = free(
        1,
        "rounds per optimiser step; equals one big batch",
        least=1,
        expected="a positive number of rounds",
    )


@dataclasses.dataclass(frozen=True)
class Ema(Group):
    """The exponential moving average of the parameters, which samples are drawn from."""

    halflife: str = decided("500 kimg", "half-life")
    rampup: float = decided(
        0.05,
        "half-life <= this share of the images seen; 0 = no ramp-up, as where init.workdir is set",
        least=0,
    )
    stds: tuple[float, ...] = setting(
        (),
        "relative widths of further averages, such as 0.05,0.1 (EDM2's, of which `ogdm ema` makes "
        "an average of any width afterwards); each takes the memory of the parameters",
        above=0,
        below=0.2886,
        expected="different numbers above 0 and below 0.2886, such as 0.05,0.1",
    )
    snapshots: str = free(
        "0 steps", "from one snapshot of these averages to the next; 0 = 32 in a run", only="stds"
    )

    def _check_together(self) -> None:
        self._require(len(set(self.stds)) == len(self.stds), "stds", "each width once")


@dataclasses.dataclass(frozen=True)
class Init(Group):
    """What a fresh run starts from."""

    workdir: str = setting(
        "", "fine-tune the last checkpoint of this training folder; sd: or a folder of diffusers"
    )
    weights: str = setting(
        "ema",
        "ema or params of that checkpoint; sd: or text, its text encoder alone",
        choices=("ema", "params", "text"),
        only="workdir",
    )
    partial: bool = setting(
        False,
        "also of another network (labels, size): copy what fits, list the rest; of a folder of "
        "diffusers: also for another process (betas, prediction)",
        only="workdir",
    )
    step: int = free(
        -1,
        "a checkpoint of that folder; without init.workdir, and where a run is resumed: go back to "
        "this step of --workdir, with its optimiser (0 starts afresh); -1 = the newest",
        least=-1,
        expected="the step of a checkpoint, or -1 for the newest",
    )


@dataclasses.dataclass(frozen=True)
class Train(Group):
    """Length and checkpoints."""

    duration: str = free("200 Mimg", "length of the training")
    save_every: str = free("2500 kimg", "from checkpoint to checkpoint; 0 = only at the end")
    keep: int = free(3, "newest checkpoints that stay", least=1)
    keep_every: str = free("0 steps", "also keep one checkpoint per this length; 0 = none")


@dataclasses.dataclass(frozen=True)
class Parallel(Group):
    """How devices share the work."""

    plan: str = free(
        "mesh",
        "mesh (data-parallel), sharded (state and frozen networks divided too) or pmap",
        choices=("mesh", "sharded", "pmap"),
    )
    devices: int = free(0, "number of devices; 0 = all", least=0)


@dataclasses.dataclass(frozen=True)
class Log(Group):
    """What is written down while training."""

    every: str = free("50 kimg", "from line to line")
    tensorboard: bool = free(True, "also write TensorBoard events")
    tracker: str = free(
        "", "also send numbers and pictures to wandb or trackio", choices=("", "wandb", "trackio")
    )
    project: str = free("ogdm_jax", "of the tracker", only="tracker")


@dataclasses.dataclass(frozen=True)
class Sample(Group):
    """The sampler, in training and as the default of sampling."""

    every: str = free("5 Mimg", "from sample grid to sample grid; 0 = only at the end")
    num: int = free(64, "images of a grid", least=1)
    solver: str = free("heun", "rule of one step", choices=SOLVERS)
    steps: int = free(18, "steps of the solver", least=1, most=10**5, only=_FIXED)
    rtol: float = free(
        1e-5,
        "dopri5: relative tolerance of an image, which has as many steps as it needs",
        above=0,
        most=0.1,
        only="solver=dopri5",
    )
    atol: float = free(1e-5, "dopri5: absolute tolerance", above=0, most=0.1, only="solver=dopri5")
    grid: str = free(
        "edm",
        "edm, vp, ve, iddpm; of flow models also flow (equal steps of t, from pure noise); of "
        "discrete models also respaced (guided-diffusion's), ddim, quad, trailing, leading and "
        "linspace (Stable Diffusion's), and pndm (as the released S- and F-PNDM step)",
        choices=GRIDS,
    )
    sigma_min: float = decided(0.002, "lowest noise level; noise.clip clips to it", above=0)
    sigma_max: float = decided(80.0, "highest noise level; noise.clip clips to it", above=0)
    rho: float = free(7.0, "exponent of the grid", least=0.1, most=1000, only="grid=edm")
    shift: float = free(
        1.0,
        "grid flow: more steps in the noise, t' = shift t / (1 + (shift - 1) t)",
        above=0,
        most=1000,
        only="grid=flow",
    )
    offset: int = free(
        1, "grid leading: its lowest step (steps_offset)", least=0, most=999, only="grid=leading"
    )
    start: str = free(
        "ve",
        "grids of a discrete model's steps start from sigma eps (ve), or, as DDIM is released, "
        "from sqrt(1 + sigma^2) eps (vp: x_t is eps)",
        choices=("ve", "vp"),
        only="grid=" + "|".join(OWN_GRIDS),
    )
    end: str = free(
        "zero",
        "and end at zero, or at the level of their first step (set_alpha_to_one false)",
        choices=("zero", "first"),
        only="grid=" + "|".join(OWN_GRIDS),
    )
    eta: float = free(
        0.0,
        "ddim, heun, dpmpp_2m_sde: 0 = deterministic, 1 = as random as DDPM and as published",
        least=0,
        most=1,
    )
    clip: bool = free(
        False, "clamp x0_hat to [-1, 1] at every evaluation, as ADM's published samples were made"
    )
    variance: str = free(
        "auto",
        "ancestral: small, large (ADM where it learns none), diffusion, or learned; auto = learned "
        "where the network has it, else small",
        choices=("auto", "small", "large", "diffusion", "learned"),
        only="solver=ancestral",
    )
    snr: float = free(
        0.16,
        "signal-to-noise ratio of pc's corrector; 0.16 is score_sde's for CIFAR-10, larger images "
        "have 0.075 to 0.17",
        above=0,
        most=1,
        only="solver=pc",
    )
    corrector_steps: int = free(
        1, "pc's Langevin steps at each level; 0 = none", least=0, most=1000, only="solver=pc"
    )
    sde: str = free("ve", "pc's process", choices=("ve", "vp"), only="solver=pc")
    order: int = free(2, "unipc's: 1 to 3", least=1, most=3, only="solver=unipc")
    bh: str = free("bh2", "unipc's variant", choices=("bh1", "bh2"), only="solver=unipc")

    @property
    def options(self) -> dict[str, Any]:
        """Settings that this solver alone has, see SOLVER_OPTIONS."""
        return {name: getattr(self, name) for name in SOLVER_OPTIONS.get(self.solver, ())}

    def _check_together(self) -> None:
        stochastic = self.solver in ("ddim", "heun", "dpmpp_2m_sde")
        expected = "0 but with dpmpp_2m_sde, ddim or heun"
        self._require(self.eta == 0 or stochastic, "eta", expected)
        chosen = self.variance == "auto" or self.solver == "ancestral"
        self._require(chosen, "variance", "auto but with ancestral")
        below = f"less than sample.sigma_max, {self.sigma_max}"
        self._require(self.sigma_min < self.sigma_max, "sigma_min", below)
        if self.grid == "pndm":
            solvers = "spndm or fpndm with the grid 'pndm'"
            self._require(self.solver in ("spndm", "fpndm"), "solver", solvers)
            unclipped = (
                "False with the grid 'pndm', whose released code does not clip; the grids ddim and "
                "respaced do"
            )
            self._require(not self.clip, "clip", unclipped)


@dataclasses.dataclass(frozen=True)
class Evaluate(Group):
    """The distance of samples to the data."""

    features: str = free("", "feature space: a labelled source, lite0, inception; '' = none")
    weights: str = free("", "inception: the weights file", only="features=inception")
    num: int = free(
        0,
        "samples for it; 0 = as many as the data set has, at most 50,000",
        least=0,
        only="features",
    )
    heldout: int = free(
        1000,
        "images of data.heldout whose loss is measured, spread evenly over it; 0 = all",
        least=0,
        only="data.heldout",
    )
    every: str = free("0 steps", "evaluate during training, too; 0 = only at the end")
    keep_best: int = free(
        1,
        "checkpoints with the smallest distances that stay, whatever train.keep says",
        least=0,
        only="features",
    )
