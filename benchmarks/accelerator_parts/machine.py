"""What the figures were measured on."""

import platform
import shutil
import subprocess
from collections.abc import Callable
from importlib import metadata
from typing import Any

from accelerator_parts import Options

PACKAGES = (
    "jax",
    "jaxlib",
    "jax-cuda13-plugin",
    "jax-cuda12-plugin",
    "flax",
    "optax",
    "orbax-checkpoint",
    "numpy",
)


def run(name: str, options: Options, report: Callable[[dict], None]) -> dict[str, Any]:
    """Device and versions, seen through JAX ("jax") or PyTorch ("torch")."""
    if name == "torch":
        import torch

        found = {
            "torch": torch.__version__,
            "torch_cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
        }
        return found | {
            "torch_device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
        }
    from accelerator_parts import programs

    device = programs.start().devices()[0]
    return {
        "platform": device.platform,
        "card": device.device_kind,
        "devices": programs.start().device_count(),
        "python": platform.python_version(),
        "versions": {name: version for name in PACKAGES if (version := _version(name))},
    }


def card() -> dict[str, Any]:
    """Name, driver and memory of the first NVIDIA card, {} where there is none; starts neither JAX
    nor PyTorch.
    """
    if not shutil.which("nvidia-smi"):
        return {}
    names = ("name", "driver_version", "memory.total")
    command = [
        "nvidia-smi",
        f"--query-gpu={','.join(names)}",
        "--format=csv,noheader,nounits",
        "--id=0",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    values = [value.strip() for value in done.stdout.strip().split(",")]
    if done.returncode or len(values) != len(names):
        return {}
    memory = int(values[2]) << 20 if values[2].isdigit() else 0
    return {"card": values[0], "driver": values[1], "memory_bytes": memory}


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
