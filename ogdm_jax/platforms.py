"""Which platform a program is traced for.

Some layers have other rules for the CPU's compiler than for GPUs and TPUs. The devices that a
program is compiled for decide, not the host: a step for a TPU that is compiled on a machine without
one must not get the CPU's rules. `parallel.Plan` and `generate.sampler` know their devices and name
them with `traced_for`; everywhere else it is the device on which JAX would run the program.
"""

import functools
from collections.abc import Callable
from typing import Any, TypeVar, cast

import jax

Function = TypeVar("Function", bound=Callable)

# A part of the key of jit's caches: a function inside, jitted for one platform, is traced anew for
# another.
_traced_for = jax.make_user_context(default_value=None)


def traced_for(platform: str, function: Function) -> Function:
    """The function, which is traced for that platform wherever it is traced.

    platform: "cpu", "gpu" or "tpu", as `device.platform`.
    """

    @functools.wraps(function)
    def traced(*args: Any, **kwargs: Any) -> Any:
        with _traced_for(platform):
            return function(*args, **kwargs)

    return cast(Function, traced)


def current() -> str:
    """The platform that the program now traced is for.

    It is that of JAX's default device outside of `traced_for`.
    """
    if _traced_for.value is not None:
        return _traced_for.value
    device = cast(Any, jax.config).jax_default_device  # made at run time
    if device is None:
        return jax.default_backend()
    return device if isinstance(device, str) else device.platform
