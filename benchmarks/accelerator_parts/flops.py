"""Floating-point operations of a traced program's convolutions and matrix products, by the type they run in.

Counted from the program as it was written (a jaxpr), so that a number means the same on every device and for every
compiler. A multiplication and an addition are two operations; element-wise work does not count.
"""

import math
from collections import Counter
from typing import Any


def count(jaxpr: Any, times: int = 1) -> Counter:
    """{"bfloat16": operations, "float32": ...} of a closed or open jaxpr; of a branch the dearest one counts."""
    total: Counter = Counter()
    for eqn in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        name, params = eqn.primitive.name, eqn.params
        if name == "conv_general_dilated":
            kernel, spec = eqn.invars[1].aval.shape, params["dimension_numbers"].rhs_spec
            work = math.prod(kernel[axis] for axis in spec[1:])  # input features of a group, and the window
            total[_type(eqn)] += 2 * times * work * math.prod(eqn.outvars[0].aval.shape)
        elif name in ("dot_general", "ragged_dot_general"):
            (contracted, _), _ = params["dimension_numbers"]
            work = math.prod(eqn.invars[0].aval.shape[axis] for axis in contracted)
            total[_type(eqn)] += 2 * times * work * math.prod(eqn.outvars[0].aval.shape)
        elif name == "cond":
            total += max((count(branch, times) for branch in params["branches"]), key=lambda c: c.total())
        else:
            inner = times * params["length"] if name == "scan" else times
            for value in params.values():
                for part in value if isinstance(value, (tuple, list)) else (value,):
                    if hasattr(getattr(part, "jaxpr", part), "eqns"):
                        total += count(part, inner)
    return total


def _type(eqn: Any) -> str:
    return str(eqn.invars[0].aval.dtype)
