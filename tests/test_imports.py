"""Importing starts nothing and needs nothing that is not declared."""

import pkgutil
import subprocess
import sys

import pytest

import ogdm_jax

pytestmark = pytest.mark.fast

MODULES = [
    m.name
    for m in pkgutil.walk_packages(ogdm_jax.__path__, "ogdm_jax.")
    if not m.name.endswith("__main__")
]

CHECK = """
import importlib, sys
for name in {names!r}:
    importlib.import_module(name)
for banned in ("tensorflow", "torch", "tensorboard"):
    assert banned not in sys.modules, banned
from jax._src import xla_bridge
assert not xla_bridge._backends, "a backend was started"
import jax
jax.config.update("jax_num_cpu_devices", 3)
assert jax.device_count() == 3
"""


def test_importing_everything_starts_no_backend_and_no_tensorflow():
    subprocess.run([sys.executable, "-c", CHECK.format(names=MODULES)], check=True, timeout=120)


@pytest.mark.parametrize(
    "package",
    [
        "ogdm_jax",
        "ogdm_jax.sampling.sampler",
        "ogdm_jax.methods.contract",
        "ogdm_jax.training.loop",
    ],
)
@pytest.mark.default
def test_modules_import_alone(package):
    subprocess.run([sys.executable, "-c", f"import {package}"], check=True, timeout=120)


@pytest.mark.parametrize("command", ["train", "sample"])
@pytest.mark.default
def test_a_command_starts_without_what_it_may_never_need(command):
    """Each of these takes a tenth of a second and more."""
    slow = ("diffrax", "jinja2", "matplotlib", "sklearn", "tensorboardX", "tensorflow_datasets")
    code = f"import sys, ogdm_jax.cli.{command}; print(*(set(sys.modules) & set({slow!r})))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout.split()) == (0, []), done.stderr
