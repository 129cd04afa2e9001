"""XLA's flags for the tests, which compile far more than they compute. Users' runs keep XLA's
defaults.
"""

from importlib.metadata import version

FLAGS = "--xla_backend_optimization_level=0"  # a third less time without LLVM's optimiser
if tuple(map(int, version("jaxlib").split(".")[:2])) < (
    0,
    11,
):  # XLA aborts at a flag that it does not know
    FLAGS += " --xla_cpu_use_fusion_emitters=false"  # the older emitter takes another third less
