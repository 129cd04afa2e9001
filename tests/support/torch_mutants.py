"""Random edits of healthy checkpoints, read in a process of their own.

`python -m tests.support.torch_mutants KIND COUNT SEED` prints one JSON object: how many were read
and refused, the longest time and the most memory of one, and what failed otherwise.
"""

import contextlib
import io
import json
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from ogdm_jax import startup
from ogdm_jax.interop import UnsafeFileError, export, load_pretrained, names_edm, read_torch
from tests.support import apart as processes
from tests.support import hostile
from tests.support import torch_files as tf

MADE = Path(__file__).parent.parent / "fixtures" / "torch"
ACTS = ("os.system", "os.exec", "os.posix_spawn", "subprocess.Popen", "socket.connect")
_acted: list[str] = []


def small() -> dict[str, np.ndarray]:
    """The smallest network of EDM's: its shapes are traced quickly."""
    settings = {"img_resolution": 4, "img_channels": 1, "label_dim": 2, "model_channels": 4}
    settings |= {"channel_mult": (1,), "num_blocks": 1, "attn_resolutions": ()}
    network = names_edm.edm_network(settings | {"model_type": "SongUNet"})
    rng = np.random.default_rng(0)
    entries = names_edm.edm_entries(network)
    return {e.name: rng.normal(size=e.torch_shape).astype("f4") for e in entries}


def _readable(root: Path) -> list[Path]:
    """Files of every layout; those that torch made among them."""
    for name, data in hostile.good().items():
        (root / name).write_bytes(data)
    made = (
        "objects.pt",
        "objects_0.pkl",
        "objects_2.pkl",
        "legacy_4.pth",
        "script.pt",
        "types.pkl",
    )
    for name in (*made, "odd_sharded.pt", "odd_quantised.pt", "training_state.pt", "snapshot.pkl"):
        (root / name).write_bytes((MADE / name).read_bytes())
    arrays: dict[str, Any] = {"a": np.ones((2, 3), "f4"), "b": np.array({"x": [1]}, dtype=object)}
    np.savez(root / "a.npz", **arrays)
    np.savez_compressed(root / "b.npz", **arrays)
    np.save(root / "c.npy", arrays["b"])
    return sorted(root.iterdir())


def _loadable(root: Path) -> list[Path]:
    """A small network in every layout, beside an average, an optimiser and settings."""
    state, book = small(), tf.Book()
    tensors = {name: book.tensor(value) for name, value in state.items()}
    settings = tf.Call(tf.Name("argparse", "Namespace"), (), {"lr": 1}, new=True)
    optimiser = {"state": {0: {"exp_avg": next(iter(tensors.values()))}}, "param_groups": []}
    whole = {"model": tensors, "ema": {"module": tensors}, "opt": optimiser, "args": settings}
    (root / "a.pt").write_bytes(tf.zip_file(whole, book))
    (root / "b.pth").write_bytes(tf.legacy_file([tensors, optimiser, 3], book))
    ema = tf.network(state, tf.pickled_tensor, sigma_data=0.5, _init_kwargs={"dropout": 0.1})
    (root / "c.pkl").write_bytes(tf.pickled({"ema": ema}))
    export.write(
        root / "d.safetensors", state, {"kind": "edm", "precondition": "edm", "dropout": 0.1}
    )
    save_file(state, root / "e.safetensors")
    plain: dict[str, Any] = dict(state)
    np.savez(root / "f.npz", **plain)
    index = {"metadata": {}, "weight_map": dict.fromkeys(state, "e.safetensors")}
    (root / "model.safetensors.index.json").write_text(json.dumps(index))
    return sorted(root.iterdir())


def _load(path: Path) -> None:
    load_pretrained(path.with_suffix(".safetensors") if path.name == "d.json" else path)


KINDS: dict[str, tuple[Callable[[Path], list[Path]], Callable[[Path], Any]]] = {
    "read": (_readable, read_torch),
    "load": (_loadable, _load),
}


def edited(data: bytes, rng: np.random.Generator) -> bytes:
    """One or two random edits: a bit, byte, digit or number, bytes left out, put in or doubled."""
    new = bytearray(data)
    for _ in range(rng.integers(1, 3)):
        at, kind = int(rng.integers(max(len(new), 1))), rng.integers(10)
        length = int(rng.integers(1, 9))
        if kind == 0 and new:
            new[at] ^= 1 << int(rng.integers(8))
        elif kind == 1 and new:
            new[at] = int(rng.integers(256))
        elif kind == 2:
            number = int(rng.choice([0, 1, 2**31 - 1, 2**32 - 1, 65536]))
            new[at : at + 4] = number.to_bytes(4, "little")
        elif kind == 3:
            del new[at : at + length]
        elif kind == 4:
            new[at:at] = rng.bytes(length)
        elif kind == 5:
            new[at:at] = new[at : at + 8 * length]
        elif kind == 6 and rng.integers(4) == 0:
            del new[at:]
        else:  # names and numbers that are written as text
            digits = [i for i, byte in enumerate(new[:20_000]) if 48 <= byte < 58]
            if digits:
                new[digits[int(rng.integers(len(digits)))]] = 48 + int(rng.integers(10))
    return bytes(new)


def mutant(data: bytes, rng: np.random.Generator) -> bytes:
    """A file's random edit; of an archive mostly one of a member, with a checksum that fits."""
    if data[:2] != b"PK" or rng.integers(4) == 0:
        head = int.from_bytes(data[:8], "little")
        if data[8:9] == b"{" and rng.integers(2):  # a header of safetensors, with its new length
            text = edited(data[8 : 8 + head], rng)
            return len(text).to_bytes(8, "little") + text + data[8 + head :]
        return edited(data, rng)
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as source, zipfile.ZipFile(out, "w") as target:
        infos = source.infolist()
        named = [i for i, info in enumerate(infos) if info.filename.endswith("data.pkl")]
        chosen = named[0] if named and rng.integers(4) else int(rng.integers(len(infos)))
        for i, info in enumerate(infos):
            content = source.read(info)
            content = edited(content, rng) if i == chosen else content
            target.writestr(zipfile.ZipInfo(info.filename), content, info.compress_type)
    return out.getvalue()


def _intended(error: Exception, kind: str) -> bool:
    one_line = "\n" not in str(error) and len(str(error)) < 1000
    known = isinstance(error, UnsafeFileError) or (kind == "load" and isinstance(error, ValueError))
    return known and one_line and startup.raised_here(error)


def run(kind: str, count: int, seed: int) -> dict[str, Any]:
    """Reads `count` mutants, one after the other."""
    rng, failed = np.random.default_rng(seed), []
    done: dict[str, Any] = {"read": 0, "refused": 0, "seconds": 0.0, "megabytes": 0.0}
    make, read = KINDS[kind]
    with tempfile.TemporaryDirectory() as folder:
        files = make(Path(folder))
        healthy = {path: path.read_bytes() for path in files}
        for path in files:
            with contextlib.suppress(UnsafeFileError):  # odd ones are refused as they are
                read(path)
        sys.addaudithook(lambda event, _: _acted.append(event) if event in ACTS else None)
        for k in range(count):
            path = files[int(rng.integers(len(files)))]
            path.write_bytes(mutant(healthy[path], rng))
            with processes.measured(done, f"{kind} {seed} {k} {path.name}"):
                try:
                    read(path)
                    done["read"] += 1
                except Exception as error:
                    done["refused"] += 1
                    if not _intended(error, kind):
                        said = f"{type(error).__name__}: {str(error)[:300]}"
                        failed.append(f"{k} {path.name}: {said}")
            path.write_bytes(healthy[path])
    return done | {"failed": failed[:10], "acted": _acted}


def apart(kind: str, count: int, seed: int) -> dict[str, Any]:
    """`run` in a process of its own; a process that ends otherwise names its last mutant."""
    return processes.run("tests.support.torch_mutants", kind, count, seed, 3600)


if __name__ == "__main__":
    with contextlib.redirect_stdout(io.StringIO()):
        result = run(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
    print(json.dumps(result))
