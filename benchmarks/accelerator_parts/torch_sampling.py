"""EDM's own sampling loop (generate.py, edm_sampler) on its own network."""

from collections.abc import Callable
from typing import Any

from accelerator_parts import Options, clock, edm_code, sizes


def run(name: str, options: Options, report: Callable[[dict], None]) -> dict[str, Any]:
    code = edm_code.load(options.edm)
    import generate  # of EDM's checkout

    torch, size = code.torch, sizes.of(options.rehearse)
    way = name.removeprefix("torch-heun-")
    side, _, channels = size.shape
    net = code.networks.EDMPrecond(
        side, channels, model_type="SongUNet", augment_dim=9, **size.torch
    )
    net = net.eval().requires_grad_(False).to(code.device)
    net = edm_code.variant(
        code, net, {"float32": "eager-float32", "autocast": "channels_last-autocast"}.get(way, way)
    )
    latents = torch.randn(size.sample_batch, channels, side, side, device=code.device)
    last = []

    def work() -> None:
        with torch.no_grad():
            last[:] = [generate.edm_sampler(net, latents, num_steps=size.sample_steps)]

    found = clock.timed(work, lambda: edm_code.synchronise(code), size.timing)
    return found | {
        "batch": size.sample_batch,
        "nfe": 2 * size.sample_steps - 1,
        "images_per_second": 1000 * size.sample_batch / found["ms"],
        "peak_bytes": edm_code.peak(code),
        "finite": bool(torch.isfinite(last[0]).all()),
    }
