"""XLA's flags for the tests, which compile far more than they compute. Users' runs keep XLA's
defaults.
"""

from importlib.metadata import version

FLAGS = "--xla_backend_optimization_level=0"  # a third less time without LLVM's optimiser
# One LLVM module a program: dividing it for more cores costs a fifth of its processor time, and the
# other core has a test of its own.
FLAGS += " --xla_cpu_parallel_codegen_split_count=1"
if tuple(map(int, version("jaxlib").split(".")[:2])) < (
    0,
    11,
):  # XLA aborts at a flag that it does not know
    FLAGS += " --xla_cpu_use_fusion_emitters=false"  # the older emitter takes another third less
