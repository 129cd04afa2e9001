"""The figures of a plan, as JSON and as lines to read."""

import math
from importlib import metadata
from typing import Any, cast

import jax

from ogdm_jax import config as configs
from ogdm_jax.planning import flops
from ogdm_jax.planning.chips import CHIPS
from ogdm_jax.planning.collectives import seconds as seconds_sent
from ogdm_jax.planning.program import Compiled

GIB = 2**30  # bytes


def figures(
    config: configs.Config,
    compiled: Compiled,
    chip: str,
    devices: int,
    memory: int | None,
    name: str,
) -> dict[str, Any]:
    """Everything known of a compiled step: the keys of `--plan-out`.

    seconds_lower_bound is the largest of three times that no program can undercut on this chip: its
    matrix operations at the published rate, its traffic at the published bandwidth (where the
    compiler tells it), and its messages. It is no forecast: what a step really takes must be
    measured.

    Args:
      config: of the run.
      compiled: what the compiler says of its step.
      devices: their number.
      chip: a name of CHIPS, or "" where nothing is published (a CPU): then what follows from rates
        is None.
      memory: bytes of one device, None where unknown.
      name: of the configuration.
    """
    batch, known = config.data.batch, CHIPS.get(chip)
    total = sum(compiled.operations.values()) / devices
    bounds: dict[str, float] = {}
    if known:
        bounds = {
            "compute": total / known.bfloat16,
            "messages": seconds_sent(compiled.sent, devices, known.link),
        }
        if compiled.moved is not None:
            bounds["memory"] = compiled.moved / known.bandwidth
    least = max(bounds.values()) if bounds else None
    steps = configs.duration(config.train.duration, batch, "config.train.duration")
    return {
        "name": name,
        "chip": chip or jax.default_backend(),
        "devices": devices,
        "plan": config.parallel.plan,
        "batch": batch,
        "accumulate": config.optim.accumulate,
        "remat": config.network.remat,
        "parameters": compiled.parameters,
        "hbm_bytes": {
            "arguments": compiled.arguments,
            "temporaries": compiled.temporaries,
            "peak": compiled.peak,
            "available": memory,
        },
        "tflop_per_device": total / 1e12,
        "bfloat16_share": flops.share(compiled.operations, "bfloat16"),
        "bytes_moved": compiled.moved,
        "collectives": compiled.sent,
        "seconds_bounds": bounds,
        "seconds_lower_bound": least,
        "images_per_second": batch / least if least else None,
        "days": steps * least / 86400 if least else None,
        "steps": steps,
        "fits": compiled.fits and (memory is None or compiled.peak <= memory),
        "advice": "",
        "compile_seconds": round(compiled.seconds, 1),
        "versions": versions(),
    }


def versions() -> dict[str, str]:
    """What the figures were made with."""
    level = cast(Any, jax.config).jax_optimization_level  # made at run time
    found = {"jax": jax.__version__, "level": "default" if level in (None, "UNKNOWN") else level}
    for name in ("jaxlib", "flax", "libtpu"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def text(plan: dict[str, Any]) -> str:
    """The figures as lines."""
    hbm = plan["hbm_bytes"]
    of = f" of {hbm['available'] / GIB:.1f}" if hbm["available"] else ""
    sent = ", ".join(
        f"{v['count']} {k} ({v['bytes'] / 2**20:.1f} MiB)"
        for k, v in sorted(plan["collectives"].items())
    )
    lines = [
        f"{plan['name']}: {plan['parameters']:,} parameters; batch {plan['batch']} on "
        f"{plan['devices']} x {plan['chip']}, plan {plan['plan']}",
        f"memory of a device   {hbm['peak'] / GIB:.2f}{of} GiB "
        f"(arguments {hbm['arguments'] / GIB:.3f}, temporaries {hbm['temporaries'] / GIB:.3f})",
        f"arithmetic           {plan['tflop_per_device']:.4g} TFLOP a device and step, "
        f"{100 * plan['bfloat16_share']:.1f} % of it in bfloat16",
        f"messages             {sent or 'none'}",
    ]
    if plan["seconds_lower_bound"]:
        bound = max(plan["seconds_bounds"], key=plan["seconds_bounds"].get)
        lines.append(
            f"time of a step       at least {1000 * plan['seconds_lower_bound']:.3g} ms ({bound}): "
            f"at most {plan['images_per_second']:,.0f} images/s, at least "
            f"{_days(plan['days'])} for {plan['steps']:,} steps"
        )
    lines.append(
        "fits                 "
        f"{'yes' if plan['fits'] else 'NO'}{'; ' + plan['advice'] if plan['advice'] else ''}"
    )
    about = ", ".join(f"{k} {v}" for k, v in plan["versions"].items() if k != "level")
    lines.append(
        f"compiled in          {plan['compile_seconds']:.0f} s at level "
        f"{plan['versions']['level']} ({about})"
    )
    return "\n".join(lines)


def _days(days: float) -> str:
    if days >= 1:
        return f"{days:.1f} days"
    return f"{days * 24:.1f} hours" if days * 24 >= 1 else f"{math.ceil(days * 24 * 60)} minutes"
