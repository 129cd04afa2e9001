"""What the golden files mean: the rules of tests/golden/README.md as code. No file and no
configuration is special.
"""

import functools
import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np

FOLDER = Path(os.environ.get("OGDM_GOLDEN", Path(__file__).parent.parent / "golden"))


def hash_values(n: int, p: int) -> np.ndarray:
    """n float64 pseudo-random numbers of variance 1 for tensor number p (README section 1)."""
    h = (np.arange(n, dtype=np.uint64) * 2654435761 + p * 40503 + 12345) % 2**32
    for _ in range(2):
        h ^= h >> np.uint64(16)
        h = (h * 0x45D9F3B) % 2**32
    h ^= h >> np.uint64(16)
    return (2.0 * h.astype(np.float64) / 2**32 - 1.0) * np.sqrt(3.0)


def formula_images(n: int, height: int, width: int) -> np.ndarray:
    """[n,height,width,3] float32 whole numbers from 0 to 255: inputs that need no file."""
    b, y, x, c = np.meshgrid(*map(np.arange, (n, height, width, 3)), indexing="ij")
    values = 7 * y + (5 + b) * x + 40 * c + (x * y) % (31 + b)
    return (values % 256).astype(np.float32)


class Golden:
    """One .npz file: arrays by item, texts by .json(name), settings by .config."""

    def __init__(self, path: Path):
        self.path = Path(path)
        with np.load(path) as archive:
            self.arrays = {name: archive[name] for name in archive.files}
        self.config = self.json("config")

    def __getitem__(self, name: str) -> np.ndarray:
        return self.arrays[name]

    def __contains__(self, name: str) -> bool:
        return name in self.arrays

    def json(self, name: str):
        return json.loads(str(self.arrays[name]))

    def truth(self, name: str) -> np.ndarray:
        """The float64 value of a quantity where the file has one, else the float32 value."""
        return self.arrays.get(f"{name}_f64", self.arrays[name])

    def tolerance(self, name: str) -> float:
        """atol = max(20 max_abs_diff, 2e-6 max_abs) of README section 3."""
        stats = self.config.get("f32_vs_f64", {}).get(name)
        if stats is None:
            return 2e-6 * float(np.max(np.abs(self.truth(name)), initial=1.0))
        return max(20 * stats["max_abs_diff"], 2e-6 * stats["max_abs"])

    def assert_close(self, name: str, actual, atol: float | None = None):
        np.testing.assert_allclose(
            np.asarray(actual),
            self.truth(name),
            rtol=0,
            atol=self.tolerance(name) if atol is None else atol,
            err_msg=name,
        )

    def assert_norms(self, name: str, actual: dict[str, float]):
        """Gradient norms by PyTorch parameter name: rel 1e-4 plus abs 1e-4 of the largest norm."""
        truth = self.json(f"{name}_f64" if f"{name}_f64" in self else name)
        assert set(actual) == set(truth), set(actual) ^ set(truth)
        largest = max(truth.values())
        for key, value in truth.items():
            np.testing.assert_allclose(
                float(actual[key]), value, rtol=1e-4, atol=1e-4 * largest, err_msg=f"{name} {key}"
            )

    def state_dict(self, prefix: str = "") -> dict[str, np.ndarray]:
        """The PyTorch state dict rebuilt from the three authoritative lists; constructed buffers
        only where stored.
        """
        state = {}
        names, shapes, rules = (
            self.json(f"{prefix}param_{k}") for k in ("names", "shapes", "rule")
        )
        for name, shape, rule in zip(names, shapes, rules, strict=True):
            if rule["scale"] is None:
                stored = f"{prefix}buffer/{name}"
                if stored in self.arrays:
                    state[name] = self.arrays[stored]
                continue
            size = int(np.prod(shape, dtype=np.int64))
            value = rule["shift"] + rule["scale"] * hash_values(size, rule["p"])
            state[name] = value.reshape(shape).astype(np.float32)
        return state


def nhwc(x: np.ndarray) -> np.ndarray:
    return np.moveaxis(x, 1, -1)


def nchw(x) -> np.ndarray:
    return np.moveaxis(np.asarray(x), -1, 1)


FAMILIES: dict[str, Callable[[Golden], None]] = {}


def family(prefix: str):
    """Registers the check of every golden file whose name starts with prefix (the longest prefix
    wins).
    """

    def register(check):
        assert prefix not in FAMILIES, f"two checks of family {prefix}"
        FAMILIES[prefix] = check
        return check

    return register


@functools.cache
def load(path: str) -> Golden:
    return Golden(Path(path))
