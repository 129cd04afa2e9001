"""Says what a bug report needs: versions, devices, environment, and what a training folder holds.

    ogdm doctor
    ogdm doctor --workdir runs/digits

Paste what it prints. Of the environment it shows the variables that change what JAX does and no
others; paths are in it, so look through it first.
"""

import argparse
import os
import platform
import subprocess
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import jax

from ogdm_jax import __version__, places, records, startup
from ogdm_jax import config as configs
from ogdm_jax.cli.parsing import parser_of
from ogdm_jax.report import inputs
from ogdm_jax.training import steps

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "scipy", "chex")
PLUGINS = ("jax-cuda12-plugin", "jax-cuda13-plugin", "jax-rocm7-plugin", "libtpu")
# Names alone decide what is shown: none of these holds a secret.
VARIABLES = """
    JAX_PLATFORMS JAX_ENABLE_X64 JAX_DEFAULT_MATMUL_PRECISION JAX_COMPILATION_CACHE_DIR
    JAX_DEBUG_NANS XLA_FLAGS XLA_PYTHON_CLIENT_PREALLOCATE XLA_PYTHON_CLIENT_MEM_FRACTION
    CUDA_VISIBLE_DEVICES LD_LIBRARY_PATH LIBTPU_INIT_ARGS TPU_VISIBLE_CHIPS OMP_NUM_THREADS
    SLURM_NTASKS
""".split()
LINES = 5  # of the log


def main(argv: Sequence[str] | None = None) -> None:
    """Prints the findings; exits with 1 after one sentence on bad input."""
    parser = parser_of("doctor", __doc__)
    parser.add_argument("--workdir", default="", help="a training folder to say more of")
    parser.add_argument("--json", action="store_true", help="print JSON, with all settings")
    args = parser.parse_args(argv)
    with startup.one_sentence():
        found = machine()
        if args.workdir:
            found["workdir"] = folder(args)
        print(records.dumps(found, indent=1) if args.json else "\n".join(_lines(found)))


def machine() -> dict[str, Any]:
    """What is installed here and what JAX finds."""
    environment = {name: os.environ[name] for name in VARIABLES if name in os.environ}
    versions = {name: _version(name) for name in (*PACKAGES, *PLUGINS)}
    startup.prepare()
    try:
        devices = [f"{d.id}: {d.device_kind} ({d.platform}){_memory(d)}" for d in jax.devices()]
    except RuntimeError as error:  # the very thing that a report is about
        devices = ["JAX finds no device: " + " ".join(str(error).split())]
    return {
        "ogdm_jax": __version__ + _commit(),
        "Python": platform.python_version(),
        "system": f"{platform.platform()}, {os.cpu_count()} cores",
        "versions": {name: version for name, version in versions.items() if version},
        "devices": devices,
        "environment": environment,
    }


def _version(name: str) -> str:
    """The version of a package; of one of PACKAGES that is missing, those words; else ""."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed" if name in PACKAGES else ""


def _memory(device: Any) -> str:
    """Memory of a device that says so."""
    limit = (device.memory_stats() or {}).get("bytes_limit", 0)
    return f", {limit / 2**30:.1f} GiB" if limit else ""


def _commit() -> str:
    """The commit of a checkout, and whether files were changed; "" elsewhere."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return ""
    git = ["git", "-C", str(root)]
    run = lambda *words: subprocess.run(
        [*git, *words], capture_output=True, text=True, check=True, timeout=10
    ).stdout.strip()
    try:
        commit = run("rev-parse", "--short", "HEAD")
        changed = ", files changed" if run("status", "--porcelain", "--untracked-files=no") else ""
    except (OSError, subprocess.SubprocessError):  # no git, or a checkout of somebody else's
        return ""
    return f" (commit {commit}{changed})"


def folder(args: argparse.Namespace) -> dict[str, Any]:
    """What a training folder holds: checkpoints, settings, the last lines of its log. What cannot
    be read is said, not raised: a damaged folder is what reports are about.

    Raises:
      ValueError: there is no such folder.
    """
    path = places.workdir(args.workdir)
    if not path.is_dir():
        raise ValueError(
            f"--workdir: {args.workdir!r} is no folder; expected one that ogdm train made"
        )
    found: dict[str, Any] = {"files": sorted(file.name for file in path.iterdir())}
    logged = inputs.metrics(args.workdir)
    found["log"] = logged.values[-LINES:]
    notes = [*logged.notes]
    try:
        found["checkpoints"] = steps.complete(args.workdir)
        text = (path / "config.json").read_text()
        found["settings"] = configs.flatten(configs.from_json(text))
    except (OSError, ValueError, KeyError, TypeError) as error:
        notes.append(" ".join(str(error).split()) or type(error).__name__)
    return found | ({"notes": notes} if notes else {})


def _lines(found: dict[str, Any]) -> list[str]:
    """The findings for people; of the settings those that differ from the defaults."""
    said = [f"{name}: {found[name]}" for name in ("ogdm_jax", "Python", "system")]
    said += [f"{name} {version}" for name, version in found["versions"].items()]
    said += ["devices:", *(f"  {device}" for device in found["devices"])]
    said += ["environment:", *(f"  {name}={text}" for name, text in found["environment"].items())]
    if "workdir" not in found:
        return said
    run = found["workdir"]
    said.append(f"workdir: {', '.join(run['files'])}")
    said.append(f"checkpoints: {', '.join(map(str, run.get('checkpoints', [])))}")
    said += ["settings that differ from the defaults:"]
    said += [f"  {line}" for line in configs.changed(run.get("settings", {}))]
    said += [f"log, the last {len(run['log'])} lines:"]
    for line in run["log"]:
        numbers = [f"{name} {value:.4g}" for name, value in line.items() if name != "step"]
        said.append("  ".join(["", f"step {line['step']}", *numbers]))
    return said + [f"note: {note}" for note in run.get("notes", [])]
