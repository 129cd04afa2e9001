"""One optimiser step of ours against the published PyTorch code: the same network, the same work.

    python benchmarks/train_step.py --torch-python PY --edm DIR [--sizes
        tiny8,mnist,cifar64,ddpmpp] [--rounds 7]
    python benchmarks/train_step.py --torch-python PY --dit DIR --sizes dit_s8
        [--torch eager,channels_last,compile] [--dropout P] [--augment P] [--devices N]

PY is a Python with torch (and click, requests, tqdm, pillow; timm for DiT); DIR a checkout of
NVlabs/edm or facebookresearch/DiT (read and run there, nothing of it is part of this package). A
step is what both training loops do: augmentation where the recipe has it, forward, backward,
gradients made finite, Adam, moving average. cifar64 and ddpmpp have the dropout and the
augmentation of CIFAR-10's recipe unless the options say otherwise; ddpmpp is its network of full
size. dit_s8 is DiT-S/8 on latents, with the variance's term and 10 % of the labels hidden. Prints
one JSON line per size and way of running PyTorch: the median over interleaved rounds of ours /
theirs (below 1: ours is faster), in wall time and in processor time. "compile" needs a C++
compiler; its first call takes minutes.
"""

import argparse
import json
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import workers

CIFAR10 = {"dropout": 0.13, "augment": 0.12}
PLAIN = {"dropout": 0.0, "augment": 0.0}
SIZES = {  # side, channels, batch, EDM's network settings
    "tiny8": (
        8,
        1,
        64,
        dict(model_channels=32, channel_mult=[1, 2], num_blocks=2, attn_resolutions=[4]),
    ),
    "mnist": (
        28,
        1,
        64,
        dict(model_channels=32, channel_mult=[1, 2], num_blocks=2, attn_resolutions=[14]),
    ),
    "cifar64": (
        32,
        3,
        16,
        dict(model_channels=64, channel_mult=[2, 2, 2], num_blocks=4, attn_resolutions=[16]),
    ),
    "ddpmpp": (
        32,
        3,
        4,
        dict(model_channels=128, channel_mult=[2, 2, 2], num_blocks=4, attn_resolutions=[16]),
    ),
    "dit_s8": (32, 4, 16, dict(model_channels=384, num_blocks=12, num_heads=6, patch=8)),
}
RECIPES = {"tiny8": PLAIN, "mnist": PLAIN, "cifar64": CIFAR10, "ddpmpp": CIFAR10, "dit_s8": PLAIN}
# of EDM's train.py
PIPE = dict(xflip=1e8, yflip=1, scale=1, rotate_frac=1, aniso=1, translate_frac=1)
VARIANTS = ("eager", "channels_last", "compile")


def as_variant(net, variant: str):
    """A PyTorch network as it is, with its channels innermost, or compiled."""
    import torch

    if variant == "channels_last":
        return net.to(memory_format=torch.channels_last)
    return torch.compile(net) if variant == "compile" else net


def edm_torch(size: str, edm: str, dropout: float, augment: float) -> tuple:
    """(network, a function of it and pictures that gives the loss) of EDM's code."""
    sys.path.insert(0, edm)
    from training.augment import AugmentPipe
    from training.loss import EDMLoss
    from training.networks import EDMPrecond

    side, channels, batch, settings = SIZES[size]
    pipe = AugmentPipe(p=augment, **PIPE) if augment else None
    settings = settings | {"dropout": dropout, "augment_dim": 9 if augment else 0}
    net, loss = EDMPrecond(side, channels, model_type="SongUNet", **settings), EDMLoss()
    return net, lambda net, x: loss(net=net, images=x, augment_pipe=pipe).sum().mul(1 / batch)


def dit_torch(size: str, dit: str) -> tuple:
    """The same of DiT's code."""
    sys.path.insert(0, dit)
    import torch
    from diffusion import create_diffusion
    from models import DiT_models

    side, _, batch, _ = SIZES[size]
    net, diffusion = DiT_models["DiT-S/8"](input_size=side), create_diffusion("")
    labels = torch.randint(0, 1000, (batch,))

    def loss(net, x):
        t = torch.randint(0, diffusion.num_timesteps, (batch,))
        return diffusion.training_losses(net, x, t, {"y": labels})["loss"].mean()

    return net, loss


def serve_torch(args: argparse.Namespace, size: str, dropout: float, augment: float) -> None:
    import copy

    import torch

    torch.set_num_threads(2)
    edm, (side, channels, batch, _) = not size.startswith("dit"), SIZES[size]
    net, loss = edm_torch(size, args.edm, dropout, augment) if edm else dit_torch(size, args.dit)
    average = copy.deepcopy(net).eval().requires_grad_(False)
    trained = [p for p in net.parameters() if p.requires_grad]
    parameters = sum(p.numel() for p in trained)
    adam = torch.optim.Adam if edm else torch.optim.AdamW
    optimiser = adam(trained, lr=1e-3 if edm else 1e-4, weight_decay=0)
    images = torch.rand(batch, channels, side, side) * 2 - 1
    called = as_variant(net, args.torch)
    if args.torch == "channels_last":
        images = images.to(memory_format=torch.channels_last)

    def work():
        optimiser.zero_grad(set_to_none=True)
        loss(called, images).backward()
        for p in trained if edm else ():  # which EDM's loop does, and DiT's does not
            if p.grad is not None:
                p.grad.nan_to_num_(0.0, 1e5, -1e5)
        optimiser.step()
        with torch.no_grad():
            for p, mean in zip(net.parameters(), average.parameters()):
                mean.lerp_(p, 1e-3)

    began = time.perf_counter()
    work()
    workers.serve(
        work, {"parameters": parameters, "first_call_s": round(time.perf_counter() - began, 2)}
    )


def jax_step(size: str, dropout: float, augment: float) -> tuple:
    """(run, advance) for random pictures; advance(batch on the devices) does one step and waits for
    it.
    """
    from ogdm_jax import startup

    startup.prepare()
    import jax
    import numpy as np

    from ogdm_jax import config as configs
    from ogdm_jax import data, parallel
    from ogdm_jax.latents import Latents
    from ogdm_jax.training import run as runs

    side, channels, batch, settings = SIZES[size]
    shape, rng, dit = (side, side, channels), np.random.default_rng(0), size.startswith("dit")
    flags = ["methods=", f"data.batch={batch}", f"data.augment={augment}", "parallel.plan=mesh"]
    flags += [f"network.dropout={dropout}"] * (not dit) + ["data.source=digits"] * (not dit)
    flags += [f"network.{k}={tuple(v) if isinstance(v, list) else v}" for k, v in settings.items()]
    name = "imagenet256_dit" if dit else "base"
    config = configs.load(Path(__file__).parent.parent / "configs" / f"{name}.py", flags)
    if dit:
        latents = Latents(shape, views=1, moments=False, scaled=True, dtype="float32")
        pictures = rng.standard_normal((batch, *latents.item_shape)).astype(np.float32)
        labels = rng.integers(0, 1000, batch).astype(np.int32)
        source = data.Source(
            "random", shape, num_classes=1000, images=pictures, labels=labels, latents=latents
        )
    else:
        pictures = rng.integers(0, 255, (batch, *shape)).astype(np.uint8)
        source = data.Source(name="random", shape=shape, images=pictures)
    run = runs.build(config, source, parallel.make_plan(config.parallel.plan))
    holder = [run.init()]
    step, constants = run.compile(holder[0]), run.constants()

    def advance(placed):
        holder[0], metrics = step(holder[0], constants, placed, run.key)
        jax.block_until_ready((holder[0], metrics))
        return holder[0]

    return run, advance


def serve_jax(size: str, dropout: float, augment: float) -> None:
    run, advance = jax_step(size, dropout, augment)
    import numpy as np

    from ogdm_jax import models as model

    images, labels = run.source.images, run.source.labels
    rows = np.arange(len(images), dtype=np.int32)
    about = {"label": np.full(len(images), -1, np.int32) if labels is None else labels}
    about |= {"index": rows} | ({} if run.source.latents is None else {"row": rows})
    placed = run.plan.place_batch({"image": images} | about)
    began = time.perf_counter()
    state = advance(placed)
    compiled = time.perf_counter() - began
    about = {
        "parameters": model.parameter_count(state.params),
        "compile_s": round(compiled, 2),
        "batch": len(images),
    }
    del state
    workers.serve(lambda: advance(placed), about | {"devices": len(run.plan.devices)})


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--torch-python", default="")
    parser.add_argument("--edm", default="")
    parser.add_argument("--dit", default="")
    parser.add_argument("--sizes", default="tiny8,mnist,cifar64")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument(
        "--torch", default="eager", help=f"ways of running PyTorch: {', '.join(VARIANTS)}"
    )
    parser.add_argument("--dropout", type=float, help="on both sides, in place of the recipe's")
    parser.add_argument("--augment", type=float, help="on both sides, in place of the recipe's")
    parser.add_argument("--devices", type=int, default=1, help="host devices that ours uses")
    parser.add_argument("--serve", default="", help=argparse.SUPPRESS)
    args = parser.parse_args()
    given = {name: getattr(args, name) for name in PLAIN if getattr(args, name) is not None}
    if args.serve:
        kind, size = args.serve.split(":")
        recipe = RECIPES[size] | given
        return serve_torch(args, size, **recipe) if kind == "torch" else serve_jax(size, **recipe)
    this = str(Path(__file__).resolve())
    env = dict(os.environ)
    if args.devices > 1:
        env["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={args.devices}"
    for size in args.sizes.split(","):
        recipe = RECIPES[size] | given
        same = [f"--{name}={value}" for name, value in recipe.items()]
        ours = workers.Worker([sys.executable, this, "--serve", f"jax:{size}", *same], env)
        for variant in args.torch.split(","):
            command = [
                args.torch_python,
                this,
                "--serve",
                f"torch:{size}",
                "--edm",
                args.edm,
                "--dit",
                args.dit,
                "--torch",
                variant,
            ]
            theirs = workers.Worker([*command, *same])
            assert ours.about["parameters"] == theirs.about["parameters"], (
                ours.about,
                theirs.about,
            )
            about = {"size": size, "torch": variant} | recipe
            first = {"torch_first_call_s": theirs.about["first_call_s"]}
            print(
                json.dumps(about | workers.ratio(ours, theirs, args.rounds) | ours.about | first),
                flush=True,
            )
            theirs.close()
        ours.close()


if __name__ == "__main__":
    main()
