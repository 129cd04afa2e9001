"""Which platform a program is traced for. Some layers have other rules for the CPU's compiler than
for GPUs and TPUs.

The devices that a program is compiled for decide, not the host: a step for a TPU that is compiled
on a machine without one must not get the CPU's rules. `parallel.Plan` and `generate.sampler` know
their devices and say so with `traced_for`; everywhere else it is the device on which JAX would run
the program.
"""

import functools
from collections.abc import Callable
from typing import TypeVar

import jax

Function = TypeVar("Function", bound=Callable)

# A part of the key of jit's caches: a function inside, jitted for one platform, is traced anew for
# another.
_traced_for = jax.make_user_context(default_value=None)


def traced_for(platform: str, function: Function) -> Function:
    """The function, traced for a platform ("cpu", "gpu", "tpu": `device.platform`) wherever it is
    traced.
    """

    @functools.wraps(function)
    def traced(*args, **kwargs):
        with _traced_for(platform):
            return function(*args, **kwargs)

    return traced


def current() -> str:
    """The platform that the program now traced is for. Asks JAX's default device where nobody has
    said it.
    """
    if _traced_for.value is not None:
        return _traced_for.value
    device = jax.config.jax_default_device
    if device is None:
        return jax.default_backend()
    return device if isinstance(device, str) else device.platform
