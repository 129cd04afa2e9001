"""Compiled programs as files: one process compiles, another runs, and tracing is paid once, beside
other compilations.

A file holds the executable, its arguments' shapes, and what compiling it told. Arguments whose
values do not matter for speed are drawn at random when the program is opened (never zeros, which
some chips multiply quicker).
"""

import dataclasses
import math
import pickle
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from accelerator_parts import Options

COMPILED: dict[
    str, Any
] = {}  # by this process, for where an executable cannot be written or read; cleared by worker


def start() -> Any:
    """JAX, with the settings of the package's own entry points."""
    from ogdm_jax import startup

    startup.prepare()
    import jax

    return jax


@dataclasses.dataclass(frozen=True)
class Program:
    """run(*arguments()) does the program's work. about: trace_s, compile_s, tflop, memory and what
    its maker added.
    """

    run: Callable[..., Any]
    leaves: list[Any]
    tree: Any
    about: dict[str, Any]

    def arguments(self) -> tuple[Any, ...]:
        """Fresh arguments on the device; the program may donate them."""
        import jax

        drawn = [_draw(leaf, i) for i, leaf in enumerate(self.leaves)]
        return jax.tree.unflatten(self.tree, jax.device_put(drawn, jax.devices()[0]))[0]


def path_of(name: str, options: Options) -> Path:
    return Path(options.scratch) / "programs" / f"{name}.pickle"


def save(
    name: str, options: Options, jitted: Any, arguments: tuple[Any, ...], **more: Any
) -> dict[str, Any]:
    """Compiles jitted(*arguments) and writes it.

    Args:
      arguments: arrays, which are kept, or shapes (jax.ShapeDtypeStruct), for values drawn at
        random.
      more: joins `about`.

    Returns:
      about.
    """
    import jax
    from jax.experimental.serialize_executable import serialize

    from ogdm_jax.planning import flops

    shapes = jax.eval_shape(lambda tree: tree, arguments)
    began = time.perf_counter()
    traced = jitted.trace(*shapes)
    lowered = traced.lower()
    traced_s = time.perf_counter() - began
    began = time.perf_counter()
    compiled = lowered.compile()
    about = {"trace_s": round(traced_s, 2), "compile_s": round(time.perf_counter() - began, 2)}
    work = flops.matmul_flops(traced.jaxpr)
    about |= {"tflop": sum(work.values()) / 1e12, "bfloat16_share": flops.share(work, "bfloat16")}
    about |= {"memory_bytes": _needed(compiled)} | more
    COMPILED[name] = compiled
    try:
        payload, tree, out_tree = serialize(compiled)
    except Exception:  # whatever a platform raises that cannot: this process has the program
        traceback.print_exc()
        payload, tree, out_tree = None, compiled.in_tree, None
    paths = jax.tree_util.tree_leaves_with_path((arguments, {}))
    file = path_of(name, options)
    file.parent.mkdir(parents=True, exist_ok=True)
    new = file.with_suffix(".new")
    leaves = [_kept(path, leaf) for path, leaf in paths]
    new.write_bytes(pickle.dumps((payload, tree, out_tree, leaves, about)))
    new.replace(file)  # whoever is stopped here leaves no half of a file
    return about


def fits(about: dict[str, Any], options: Options) -> bool:
    """Whether the device's memory, where it is known, holds the program."""
    return (
        not (options.memory and about["memory_bytes"])
        or about["memory_bytes"] < 0.9 * options.memory
    )


def load(name: str, options: Options, prepare: Callable[..., dict]) -> Program:
    """The program of a file, compiled here and now if nobody did before."""
    import jax
    from jax.experimental.serialize_executable import deserialize_and_load

    file = path_of(name, options)
    if not file.exists():
        prepare(name, options, lambda _: None)
    payload, tree, out_tree, leaves, about = pickle.loads(file.read_bytes())
    run = COMPILED.get(name)
    if run is None and payload is not None:
        try:
            run = deserialize_and_load(payload, tree, out_tree, execution_devices=jax.devices()[:1])
        except Exception:
            traceback.print_exc()
    if run is None:
        prepare(name, options, lambda _: None)
        run = COMPILED[name]
    return Program(run, leaves, tree, about)


def _needed(compiled: Any) -> int:
    """Bytes of arguments, results and temporaries; 0 where the compiler does not say."""
    found = compiled.memory_analysis()
    names = ("argument_size_in_bytes", "output_size_in_bytes", "temp_size_in_bytes")
    size = sum(getattr(found, name, 0) or 0 for name in names)
    return int(size - (getattr(found, "alias_size_in_bytes", 0) or 0))


def _kept(path: Any, leaf: Any) -> Any:
    """An array, or (shape, type, whether it may not be negative) of one to draw."""
    import jax
    import numpy as np

    if not isinstance(leaf, jax.ShapeDtypeStruct):
        return np.asarray(leaf)
    key = jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    return tuple(leaf.shape), "key" if key else str(leaf.dtype), ".nu" in jax.tree_util.keystr(path)


def _draw(leaf: Any, seed: int) -> Any:
    """Pixels at random, places 0, 1, 2, ..., keys, and small normal numbers for everything else."""
    import jax
    import numpy as np

    if not isinstance(leaf, tuple):
        return leaf
    shape, kind, positive = leaf
    rng, size = np.random.default_rng(seed), math.prod(shape)
    if kind == "key":
        return jax.random.key(seed)
    if kind == "uint8":
        return rng.integers(0, 256, shape, np.uint8)
    if "int" in kind or kind == "bool":
        return np.arange(size).reshape(shape).astype(kind)
    value = np.resize(0.02 * rng.standard_normal(min(size, 1 << 20), np.float32), shape)
    return (np.abs(value) if positive or not shape else value).astype(kind)
