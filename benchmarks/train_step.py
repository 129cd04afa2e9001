"""One optimiser step (forward, backward, Adam) of ours against the same network of EDM's published PyTorch code.

    python benchmarks/train_step.py --torch-python PY --edm DIR [--sizes tiny8,mnist,cifar64] [--rounds 7]

PY is a Python with torch; DIR a checkout of NVlabs/edm (read and run there, nothing of it is part of this package).
Prints one JSON line per size: the median over interleaved rounds of ours / theirs (below 1: ours is faster).
"""

import argparse
import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import workers

SIZES = {  # side, channels, batch, EDM's network settings
    "tiny8": (8, 1, 64, dict(model_channels=32, channel_mult=[1, 2], num_blocks=2, attn_resolutions=[4])),
    "mnist": (28, 1, 64, dict(model_channels=32, channel_mult=[1, 2], num_blocks=2, attn_resolutions=[14])),
    "cifar64": (32, 3, 16, dict(model_channels=64, channel_mult=[2, 2, 2], num_blocks=4, attn_resolutions=[16])),
    "ddpmpp": (32, 3, 4, dict(model_channels=128, channel_mult=[2, 2, 2], num_blocks=4, attn_resolutions=[16])),
}


def serve_torch(size: str, edm: str) -> None:
    sys.path.insert(0, edm)
    import torch
    from training.loss import EDMLoss
    from training.networks import EDMPrecond

    torch.set_num_threads(2)
    side, channels, batch, settings = SIZES[size]
    net = EDMPrecond(side, channels, model_type="SongUNet", dropout=0.0, **settings)
    optimiser, loss = torch.optim.Adam(net.parameters(), lr=1e-3), EDMLoss()
    images = torch.rand(batch, channels, side, side) * 2 - 1

    def work():
        optimiser.zero_grad(set_to_none=True)
        loss(net=net, images=images).sum().mul(1 / batch).backward()
        optimiser.step()

    workers.serve(work, {"parameters": sum(p.numel() for p in net.parameters())})


def serve_jax(size: str) -> None:
    import time

    from ogdm_jax import startup

    startup.prepare()
    import jax
    import numpy as np

    from ogdm_jax import config as configs
    from ogdm_jax import data, model, parallel
    from ogdm_jax.training import run as runs

    side, channels, batch, settings = SIZES[size]
    flags = ["methods=", f"data.batch={batch}", "data.augment=0.0", "network.dropout=0.0", "data.source=digits"]
    flags += [f"network.{k}={tuple(v) if isinstance(v, list) else v}" for k, v in settings.items()]
    config = configs.load(Path(__file__).parent.parent / "configs" / "base.py", flags)
    pictures = np.random.default_rng(0).integers(0, 255, (batch, side, side, channels)).astype(np.uint8)
    source = data.Source(name="random", shape=(side, side, channels), images=pictures)
    run = runs.build(config, source, parallel.make_plan("pmap"))
    holder = [run.init()]
    step, frozen = run.compile(holder[0]), run.frozen()
    placed = run.plan.place_batch(
        {"image": pictures, "label": np.full(batch, -1, np.int32), "index": np.arange(batch, dtype=np.int32)}
    )

    def work():
        holder[0], metrics = step(holder[0], frozen, placed, run.key)
        jax.block_until_ready((holder[0], metrics))

    began = time.perf_counter()
    work()
    compiled = time.perf_counter() - began
    about = {"parameters": model.parameter_count(holder[0].params), "compile_s": round(compiled, 2), "batch": batch}
    workers.serve(work, about | {"devices": len(run.plan.devices)})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--torch-python", default="")
    parser.add_argument("--edm", default="")
    parser.add_argument("--sizes", default="tiny8,mnist,cifar64")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--devices", type=int, default=1, help="host devices that ours uses")
    parser.add_argument("--serve", default="", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        kind, size = args.serve.split(":")
        return serve_torch(size, args.edm) if kind == "torch" else serve_jax(size)
    this = str(Path(__file__).resolve())
    env = dict(os.environ)
    if args.devices > 1:
        env["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={args.devices}"
    for size in args.sizes.split(","):
        ours = workers.Worker([sys.executable, this, "--serve", f"jax:{size}"], env)
        theirs = workers.Worker([args.torch_python, this, "--serve", f"torch:{size}", "--edm", args.edm])
        assert ours.about["parameters"] == theirs.about["parameters"], (ours.about, theirs.about)
        print(json.dumps({"size": size} | workers.ratio(ours, theirs, args.rounds) | ours.about), flush=True)
        ours.close()
        theirs.close()


if __name__ == "__main__":
    main()
