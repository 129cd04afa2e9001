"""Operations of a traced program's convolutions and matrix products, by their type."""

import math
from collections import Counter
from collections.abc import Iterable
from typing import Any

import jax
from jax.extend import core

# The parameter of an equation that holds the program that it runs.
_CALLS = ("jaxpr", "call_jaxpr", "fun_jaxpr")


def matmul_flops(program: core.ClosedJaxpr) -> dict[str, float]:
    """{"bfloat16": n, "float32": n}: operations over all devices that the outputs need.

    A multiplication and its addition are 2 operations; their type is that of the wider operand, or
    bfloat16 where the program asks for it (attention's gradient rounds a float32 one). The body of
    a scan counts as often as it runs, a while loop of unknown length once, and of several branches
    the most expensive one. Multiplications with the zeros that a strided convolution's gradient
    inserts do not count, nor do equations whose results nothing reads.

    Args:
      program: of `jax.jit(f).trace(*args).jaxpr` or `jax.make_jaxpr(f)(*args)`.
    """
    return dict(_count(program.jaxpr, program.jaxpr.outvars))


def share(counts: dict[str, float], dtype: str) -> float:
    """The share of one type in all operations; 1 where there are none."""
    total = sum(counts.values())
    return counts.get(dtype, 0.0) / total if total else 1.0


def _count(jaxpr: Any, outputs: Iterable[Any]) -> Counter:
    counts: Counter = Counter()
    needed = {v for v in outputs if isinstance(v, core.Var)}
    for equation in reversed(jaxpr.eqns):
        used = [v in needed for v in equation.outvars]
        if not any(used) and not equation.effects:
            continue
        needed |= {v for v in equation.invars if isinstance(v, core.Var)}
        counts.update(_equation(equation, used))
    return counts


def _equation(equation: Any, used: list[bool]) -> Counter:
    name, params = equation.primitive.name, equation.params
    if name in ("dot_general", "conv_general_dilated"):
        left, right = (v.aval for v in equation.invars[:2])
        work = _dot if name == "dot_general" else _convolution
        wider = left.dtype if left.dtype.itemsize >= right.dtype.itemsize else right.dtype
        rounded = getattr(params["precision"], "name", "") == "BF16_BF16_F32"
        shapes = left.shape, right.shape, equation.outvars[0].aval.shape
        return Counter({"bfloat16" if rounded else str(wider): work(*shapes, params)})
    if name == "cond":
        branches = [_count(_open(b), _open(b).outvars) for b in params["branches"]]
        return max(branches, key=lambda c: sum(c.values()), default=Counter())
    if name == "scan":
        body = _open(params["jaxpr"])
        return _times(_count(body, body.outvars), params["length"])
    if name == "while":
        parts = (_open(params[key]) for key in ("cond_jaxpr", "body_jaxpr"))
        return sum((_count(part, part.outvars) for part in parts), Counter())
    inner = next((params[key] for key in _CALLS if key in params), None)
    if inner is None:
        return Counter()
    body = _open(inner)
    outputs = body.outvars  # all of them, where the equation's outputs do not correspond to them
    if len(outputs) == len(used):
        outputs = [v for v, u in zip(outputs, used) if u]
    devices = math.prod(params["mesh"].shape.values()) if name == "shard_map" else 1
    return _times(_count(body, outputs), devices)


def _open(program: Any) -> Any:
    return getattr(program, "jaxpr", program)


def _times(counts: Counter, factor: float) -> Counter:
    return Counter({dtype: n * factor for dtype, n in counts.items()})


def _dot(left: tuple, right: tuple, out: tuple, params: dict) -> float:
    (contracted, _), _ = params["dimension_numbers"]
    return 2.0 * math.prod(out) * math.prod(left[axis] for axis in contracted)


def _convolution(left: tuple, right: tuple, out: tuple, params: dict) -> float:
    numbers = params["dimension_numbers"]
    # Input channels of a group, and the kernel's sides.
    window = math.prod(right[axis] for axis in numbers.rhs_spec[1:])
    return 2.0 * math.prod(out) * window / math.prod(params["lhs_dilation"])


def trace(function: Any, *args: Any) -> core.ClosedJaxpr:
    """The traced program of a jitted function (or of any function) at these arguments or shapes."""
    if hasattr(function, "trace"):
        return function.trace(*args).jaxpr
    return jax.make_jaxpr(function)(*args)
