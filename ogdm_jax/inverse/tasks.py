"""Restoring measured images: tasks by name, their measurements, and what the results are worth.

A task turns clean images into measurements y = A(x0) + noise, once and from each image's seed
alone, and hands the sampler what it needs to go back. Settings that depend on the size follow the
published ones for 256 pixels.
"""

import dataclasses
import importlib.util
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from etils import epath
from PIL import Image

from ogdm_jax import data, places, randomness
from ogdm_jax.data import Source, from_arrays
from ogdm_jax.data import pictures as report
from ogdm_jax.inverse import degradations as degrade
from ogdm_jax.inverse import operators
from ogdm_jax.inverse.operators import Operator
from ogdm_jax.metrics import distances as metrics
from ogdm_jax.pixels import to_uint8
from ogdm_jax.sampling import generate
from ogdm_jax.typing import Array, PyTree

RESTORING = (
    "inpaint",
    "super_resolution",
    "deblur",
    "motion_deblur",
    "nonlinear_deblur",
    "phase_retrieval",
    "high_dynamic_range",
    "denoise",
)
STEERING = (
    "style",
    "embedding",
    "segmentation",
)  # the input is an example to follow; a network says how
TASKS = RESTORING + STEERING


@dataclasses.dataclass(frozen=True)
class Settings:
    """What a task may be told; None takes the default for the size of the images.

    Attributes:
      noise: standard deviation of Gaussian noise on y, images in [-1, 1].
      poisson: counts per grey level of Poisson noise instead; 0: none.
      mask: "random", "box" or a picture of which black pixels are hidden.
      factor: of super-resolution.   blur: standard deviation of the Gaussian, or side of the other
        blurs' kernel.
      network: "FILE.py:FUNCTION", images [B,H,W,C] in [-1, 1] -> features, for style, embedding and
        segmentation.
    """

    noise: float = 0.05
    poisson: float = 0.0
    mask: str = "random"
    factor: int = 4
    blur: float | None = None
    network: str = ""


@dataclasses.dataclass(frozen=True)
class Task:
    """One kind of measurement.

    Attributes:
      name: of TASKS.
      operator: rows -> Operator; rows are those of `draw` for a batch.
      draw: (seeds, shape) -> pytree of arrays, one row per image, that the operator needs ({}:
        none).
      restores: whether the result should equal the input.
    """

    name: str
    operator: Callable[[PyTree], Operator]
    draw: Callable[[np.ndarray], PyTree] = lambda seeds: {}
    restores: bool = True


def make_task(name: str, settings: Settings, shape: tuple[int, int, int]) -> Task:
    """The task for images of this shape.

    Raises:
      ValueError: an unknown task, a setting out of range, or a network that cannot be loaded.
    """
    side = shape[0]
    large = side / 256
    if name == "inpaint":
        return Task(name, lambda rows: operators.inpaint(rows["mask"]), _masks(settings.mask, side))
    if name in STEERING:
        network = load_function(settings.network)
        op = {
            "style": operators.style,
            "embedding": operators.embedding,
            "segmentation": operators.segmentation,
        }
        return _fixed(name, op[name](network), restores=False)
    if name == "super_resolution":
        return _fixed(name, operators.super_resolution(settings.factor, side))
    if name == "deblur":
        std = max(3 * large, 1.0) if settings.blur is None else settings.blur
        if not 0 < std < np.inf:
            raise ValueError(f"--blur: {std} given; expected a positive standard deviation")
        return _fixed(name, operators.gaussian_blur(2 * round(10 * std) + 1, std))
    if name in ("motion_deblur", "nonlinear_deblur"):
        wide = max(round(61 * large), 7) if settings.blur is None else settings.blur
        if not 2 <= wide < np.inf:
            raise ValueError(f"--blur: {wide} given; expected a kernel's side of at least 2 pixels")
        size = int(wide) // 2 * 2 + 1
        kernel = degrade.motion_kernel(np.random.default_rng(0), size)
        if name == "motion_deblur":
            return _fixed(name, operators.motion_blur(kernel))
        network = load_function(settings.network) if settings.network else None
        return _fixed(name, operators.nonlinear_blur(kernel, network=network))
    plain = {
        "phase_retrieval": operators.phase_retrieval,
        "high_dynamic_range": operators.high_dynamic_range,
        "denoise": operators.identity,
    }
    if name not in plain:
        raise ValueError(f"--task: {name!r} given; expected one of {', '.join(TASKS)}")
    return _fixed(name, plain[name]())


def _fixed(name: str, operator: Operator, restores: bool = True) -> Task:
    return Task(name, lambda rows: operator, restores=restores)


def _masks(kind: str, side: int) -> Callable[[np.ndarray], PyTree]:
    """seeds -> {"mask": [n,side,side,1]}, each from its own seed."""
    if kind == "random":
        return lambda seeds: {"mask": np.stack([degrade.random_mask(_rng(s), side) for s in seeds])}
    if kind == "box":
        box, margin = side // 2, side // 16
        return lambda seeds: {
            "mask": np.stack([degrade.box_mask(_rng(s), side, box, margin) for s in seeds])
        }
    path = places.place(kind, "--mask")
    if not path.is_file():
        raise ValueError(
            f"--mask: {kind!r} given; expected random, box or a picture of which black pixels are "
            "hidden"
        )
    try:
        with Image.open(io.BytesIO(path.read_bytes())) as image:
            picture = np.asarray(image.convert("L").resize((side, side), Image.Resampling.NEAREST))
    except OSError:
        raise ValueError(f"--mask: {kind!r} is no readable picture") from None
    mask = (picture > 127).astype(np.float32)[None, ..., None]
    return lambda seeds: {"mask": np.repeat(mask, len(seeds), axis=0)}


def _rng(seed: int) -> np.random.Generator:
    return np.random.default_rng([int(seed), 0x6D61736B])


def load_function(where: str) -> Callable[..., Any]:
    """The function of "FILE.py:NAME". Raises ValueError where there is none."""
    path, _, name = where.rpartition(":")
    if not (path.endswith(".py") and name and Path(path).is_file()):
        raise ValueError(
            f"--network: {where!r} given; expected FILE.py:FUNCTION, images in [-1, 1] to features"
        )
    spec = importlib.util.spec_from_file_location("ogdm_jax_user_network", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not callable(getattr(module, name, None)):
        raise ValueError(f"--network: {path} has no function {name!r}")
    return getattr(module, name)


def open_input(where: str, shape: tuple[int, int, int]) -> Source:
    """Images to measure: a picture, a folder of pictures, or a data source by name; cropped and
    resized to the model's.

    Raises:
      ValueError: nothing there, or colour for a grey model.
    """
    if not where:
        raise ValueError(
            "--input: not given; expected the picture or the folder of pictures to measure"
        )
    source = "://" in where and not places.is_uri(where)  # folder:gs://bucket/images
    path = places.place("" if source else where, "--input")
    if path.is_file() and path.suffix.lower() not in (".npz", ".zip"):
        try:
            with Image.open(io.BytesIO(path.read_bytes())) as picture:
                pixels = np.asarray(picture.convert("L" if shape[2] == 1 else "RGB"))
        except OSError:
            raise ValueError(f"--input: {where!r} is no readable picture") from None
        return from_arrays(
            where, pixels.reshape(1, *pixels.shape[:2], -1), resolution=shape[0], channels=shape[2]
        )
    name = where
    if not source:
        name = (
            f"folder:{where}"
            if path.is_dir()
            else f"{path.suffix[1:]}:{where}"
            if path.is_file()
            else where
        )
    if ":" not in name and name not in ("digits", "mnist5k"):
        raise ValueError(
            f"--input: {where!r} is no file, folder or data source; expected pictures to measure"
        )
    return data.open_source(name, resolution=shape[0], channels=shape[2])


@dataclasses.dataclass(frozen=True)
class Restoration:
    """Measured images, and the judgement of what comes back.

    Attributes:
      task, settings: what was measured.   seeds: [n] of the images.
      images: [n,H,W,C] inputs in [-1, 1].   rows: what `task.draw` gave.   y: [n,...] measurements.
    """

    task: Task
    settings: Settings
    seeds: np.ndarray
    images: np.ndarray
    rows: PyTree
    y: np.ndarray

    @property
    def given(self) -> PyTree:
        """The arrays that a guidance receives, a row per image."""
        return {"rows": self.rows, "y": self.y}

    def operator(self, given: PyTree) -> Operator:
        return self.task.operator(given["rows"])

    def std(self, y: Array) -> Array | float:
        """The noise of y's numbers: a number, or like y for Poisson noise. At least a
        thousandth.
        """
        if self.settings.poisson:
            return degrade.poisson_std(y, self.settings.poisson)
        return max(self.settings.noise, 1e-3)

    def judge(self, restored: np.ndarray) -> dict[str, np.ndarray]:
        """Figures per image: PSNR and SSIM of images clipped to [-1, 1] (where there is a truth),
        residuals.

        residual_ratio = ||y - A x0|| / (noise sqrt(m)), about 1 where x0 explains y and not its
        noise (absent without noise); residual = ||y - A x0|| / sqrt(m). Where the input is an
        example: distance = ||y - A x0|| / ||y||.
        """
        operator, y = self.operator(self.given), jnp.asarray(self.y)
        x0 = jnp.asarray(restored, jnp.float32)
        if not self.task.restores:
            miss = operators.measurement_loss(operator, y, squared=False)(x0)
            return {
                "distance": np.asarray(
                    miss / jnp.sqrt(jnp.sum(jnp.square(y).reshape(len(y), -1), axis=1))
                )
            }
        clipped = np.clip(restored, -1, 1)
        figures = {"psnr": metrics.psnr(clipped, self.images)}
        if min(restored.shape[1:3]) >= 11:
            figures["ssim"] = metrics.ssim(clipped, self.images)
        if self.settings.noise or self.settings.poisson:
            figures["residual_ratio"] = np.asarray(
                operators.residual_ratio(operator, y, x0, self.std(y))
            )
        figures["residual"] = np.asarray(operators.residual_ratio(operator, y, x0, 1.0))
        return figures

    def pictures(self, restored: np.ndarray) -> np.ndarray:
        """[n,3,H,W,C] uint8: input, measurement and result of each image."""
        shown = _as_pictures(self.y, self.images.shape) if self.task.restores else self.images
        return np.stack(
            [to_uint8(np.clip(v, -1, 1)) for v in (self.images, shown, restored)], axis=1
        )

    def write(self, path: epath.Path, restored: np.ndarray) -> None:
        """Input, measurement and result side by side: one grid (FILE.png), a picture an image
        (folder), or FILE.npz with the float arrays input, measurement, result and the seeds.
        Figures per image go beside it as JSON."""
        n, _, h, w, c = (triples := self.pictures(restored)).shape
        figures = {
            k: [round(float(v), 5) for v in values] for k, values in self.judge(restored).items()
        }
        text = json.dumps({"seeds": self.seeds.tolist(), **figures}) + "\n"
        scale = max(1, 64 // h)
        if path.suffix == ".npz":
            arrays = {
                "input": self.images,
                "measurement": self.y,
                "result": restored,
                "seeds": self.seeds,
            }
            with places.written(path) as new:
                np.savez_compressed(new, **arrays)
        elif path.suffix == ".png":
            columns = 3 * min(n, 4)
            report.save_png(
                path, report.grid(triples.reshape(3 * n, h, w, c), columns, padding=2, scale=scale)
            )
        else:
            for seed, triple in zip(self.seeds, triples, strict=True):
                report.save_png(
                    path / f"img{int(seed):08d}.png", report.grid(triple, 3, padding=2, scale=scale)
                )
        (path.with_suffix(".json") if path.suffix else path / "figures.json").write_text(text)


def measure(task: Task, settings: Settings, images: np.ndarray, seeds: np.ndarray) -> Restoration:
    """Measures images [n,H,W,C] in [-1, 1]: one draw of masks and noise, each from its image's
    seed.

    Raises:
      ValueError: noise out of range.
    """
    for option, value in (("--measurement-noise", settings.noise), ("--poisson", settings.poisson)):
        if not 0 <= value < np.inf:
            raise ValueError(f"{option}: {value} given; expected a number of at least 0")
    images, rows = np.asarray(images, np.float32), task.draw(seeds)
    operator = task.operator(rows)
    keys = randomness.fold_in_each(
        generate.seed_keys(jnp.asarray(seeds, jnp.uint32)), "measurement"
    )
    y = operator.forward(jnp.asarray(images))
    if task.restores and settings.poisson:
        y = degrade.poisson_noise(keys, y, settings.poisson)
    elif task.restores and settings.noise:
        y = degrade.gaussian_noise(keys, y, settings.noise)
    y = y if operator.hide is None else operator.hide(y)
    return Restoration(task, settings, np.asarray(seeds), images, rows, np.asarray(y))


def _as_pictures(y: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Measurements [n,h,w,c] as images of the input's size: nearest pixels; amplitudes by their
    logarithm.
    """
    n, height, width, _ = shape
    if y.shape == shape:
        return y
    if y.shape[1] > height:
        y = np.log(np.maximum(y, 1e-3))
        low, high = (f(y, axis=(1, 2, 3), keepdims=True) for f in (np.min, np.max))
        y = 2 * (y - low) / np.maximum(high - low, 1e-9) - 1
    rows, columns = (
        np.arange(a) * b // a for a, b in zip((height, width), y.shape[1:3], strict=True)
    )
    return y[:, rows][:, :, columns]
