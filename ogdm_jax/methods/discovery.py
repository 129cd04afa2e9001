"""Where methods are found: the files of this folder, and those that other packages name in the
entry point group `ogdm_jax.methods`.
"""

import functools
import importlib
import importlib.metadata
import pkgutil
from types import ModuleType

from ogdm_jax import methods

GROUP = "ogdm_jax.methods"


@functools.cache
def modules() -> dict[str, ModuleType]:
    """Every method's module by name: those with `training(settings, context)` or, for sampling,
    `build(settings, session)`.

    Raises:
      ValueError: two methods of one name.
    """
    found = {
        m.name: importlib.import_module(f"{methods.__name__}.{m.name}")
        for m in pkgutil.iter_modules(methods.__path__)
    }
    for entry in importlib.metadata.entry_points(group=GROUP):
        if entry.name in found:
            raise ValueError(
                f"{GROUP}: {entry.value} brings a method named {entry.name!r}, which is taken; "
                "expected another name"
            )
        found[entry.name] = entry.load()
    return {
        name: module
        for name, module in sorted(found.items())
        if hasattr(module, "training") or hasattr(module, "build")
    }


def sampling() -> dict[str, ModuleType]:
    """The sampling methods by name."""
    return {name: module for name, module in modules().items() if hasattr(module, "build")}
