"""Sampling against EDM's published sampler in PyTorch, and guided sampling against an equal loop in
PyTorch.

    python benchmarks/sampling.py --torch-python PY --edm DIR [--sizes tiny8,mnist] [--work
        heun,dsg,dps] [--rounds 5]
        [--torch eager,channels_last,compile] [--guided-steps 10]

PY is a Python with torch (and click, requests, tqdm, pillow); DIR a checkout of NVlabs/edm (its
network and its sampler are read and run there, nothing of it is part of this package). heun: 18
steps, 35 evaluations, the sampler of generate.py beside `sample(solver="heun")`. dsg, dps: DDIM
steps with eta = 1 for half-hidden pictures, the gradient through the network at every step that has
one, as one scan of ours and as a loop with autograd in PyTorch. The networks are those of
train_step.py with random numbers in every tensor, handed over in a file that EDM's code pickled.
Before the turns ours repeats the PyTorch side's images from the same latents and noise. Prints one
JSON line per size, work and way of running PyTorch: that difference over the largest value, and the
median over interleaved rounds of ours / theirs (below 1: ours is faster), in wall time and in
processor time.
"""

import argparse
import dataclasses
import functools
import itertools
import json
import math
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
import train_step
import workers

STEPS = 18  # of Heun
RATE, SCALE = 0.2, 0.5  # of DSG, of DPS


def guided_levels(steps: int) -> np.ndarray:
    """EDM's grid, [steps + 1] with a final 0."""
    high, low = 80 ** (1 / 7), 0.002 ** (1 / 7)
    return np.append((high + np.arange(steps) / (steps - 1) * (low - high)) ** 7, 0).astype(
        np.float32
    )


def torch_network(size: str):
    """EDM's network with random numbers in every tensor: its own start has layers of zeros."""
    import torch
    from training.networks import EDMPrecond

    side, channels, _, settings = train_step.SIZES[size]
    net = EDMPrecond(side, channels, model_type="SongUNet", dropout=0.0, **settings)
    draw = torch.Generator().manual_seed(0)
    for name, p in net.named_parameters():
        fan_in, gain = (p[0].numel(), 1.0) if p.ndim > 1 else (1, 0.03)
        shift = 1.0 if p.ndim == 1 and name.endswith("weight") else 0.0
        p.data = shift + gain * torch.randn(p.shape, generator=draw) / fan_in**0.5
    return net.eval().requires_grad_(False)


def torch_guided(net, work: str, latents, levels, y, mask, noise: Callable):
    """DSG (arXiv 2402.03201) or DPS (arXiv 2209.14687) on DDIM steps with eta = 1, as a loop with
    autograd.
    """
    import torch

    x = latents * levels[0]
    for step, (sigma, after) in enumerate(itertools.pairwise(levels)):
        std, down = after * (1 - (after / sigma) ** 2).clamp(min=0).sqrt(), after**2 / sigma
        guided = work == "dps" or bool(after > 0)
        with torch.set_grad_enabled(guided):
            x = x.requires_grad_(guided)
            x0_hat = net(x, sigma)
            if guided:
                loss = (y - mask * x0_hat).flatten(1).norm(dim=1).sum()
                (grad,) = torch.autograd.grad(loss, x)
        x, x0_hat = x.detach(), x0_hat.detach()
        mean = x0_hat + down / sigma * (x - x0_hat)
        if not guided:
            x = mean
        elif work == "dps":
            x = mean + std * noise(step, x) - SCALE * grad
        else:
            radius = math.sqrt(x[0].numel()) * std
            downhill = -radius * grad / grad.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
            d = (1 - RATE) * std * noise(step, x) + RATE * downhill
            x = mean + radius * d / d.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    return x


def serve_torch(args: argparse.Namespace, size: str, work: str) -> None:
    """Writes the network, the inputs and the images they give to args.folder, then works on
    demand.
    """
    sys.path.insert(0, args.edm)
    import pickle

    import generate
    import torch

    torch.set_num_threads(2)
    side, channels, batch, _ = train_step.SIZES[size]
    net, draw = torch_network(size), torch.Generator().manual_seed(1)
    latents = torch.randn(batch, channels, side, side, generator=draw)
    levels = torch.from_numpy(guided_levels(args.guided_steps))
    mask = torch.ones(1, 1, side, side)
    mask[..., : side // 2] = 0
    y = mask * (2 * torch.rand(latents.shape, generator=draw) - 1)
    noise = torch.randn(args.guided_steps, *latents.shape, generator=draw)

    def images(called, fixed: bool):
        if work == "heun":
            with torch.no_grad():
                return generate.edm_sampler(called, latents, num_steps=STEPS)
        drawn = (lambda step, x: noise[step]) if fixed else (lambda step, x: torch.randn_like(x))
        return torch_guided(called, work, latents, levels, y, mask, drawn)

    arrays = {"latents": latents, "y": y, "noise": noise.flatten(0, 1), "images": images(net, True)}
    arrays = {name: a.numpy().transpose(0, 2, 3, 1) for name, a in arrays.items()}
    np.savez(
        Path(args.folder, "images.npz"), mask=mask[0, 0].numpy(), levels=levels.numpy(), **arrays
    )
    with open(Path(args.folder, "network.pkl"), "wb") as file:
        pickle.dump({"ema": net, "loss_fn": None, "augment_pipe": None, "dataset_kwargs": {}}, file)
    called = train_step.as_variant(net, args.torch)
    if args.torch == "channels_last":
        latents, y, noise = (
            t.contiguous(memory_format=torch.channels_last)
            for t in (latents, y, noise.flatten(0, 1))
        )
        noise = noise.view(args.guided_steps, *latents.shape)
    began = time.perf_counter()
    images(called, False)
    workers.serve(
        lambda: images(called, False), {"torch_first_call_s": round(time.perf_counter() - began, 2)}
    )


def serve_jax(args: argparse.Namespace, work: str) -> None:
    """Repeats the images of args.folder, then works on demand."""
    from ogdm_jax import startup

    startup.prepare()
    import jax
    import jax.numpy as jnp

    from ogdm_jax.diffusion import grids
    from ogdm_jax.interop import load_pretrained
    from ogdm_jax.inverse.operators import inpaint, measurement_loss
    from ogdm_jax.methods import dps, dsg
    from ogdm_jax.models import parameter_count
    from ogdm_jax.sampling.sampler import sample

    given = dict(np.load(Path(args.folder, "images.npz")))
    found = load_pretrained(Path(args.folder, "network.pkl"))
    truth = given.pop("images")
    noise = given.pop("noise").reshape(-1, *truth.shape)

    def images(variables, given, key, noise=None):
        denoise = dataclasses.replace(found, variables=variables).denoiser()
        if work == "heun":
            return sample(denoise, given["latents"], grids.edm(STEPS), solver="heun")
        loss = measurement_loss(inpaint(given["mask"]), given["y"], squared=False)
        guide = functools.partial(dsg.guidance, rate=RATE)
        if work == "dps":
            guide = functools.partial(dps.guidance, scale=SCALE)
        guidance = guide(loss)
        fixed = None if noise is None else (lambda step: noise[step])
        settings = dict(solver="ddim", eta=1.0, key=key, guidance=guidance, noise_fn=fixed)
        return sample(denoise, given["latents"], given["levels"], **settings)

    variables, given = jax.device_put((found.variables, given))
    difference = np.abs(
        np.asarray(jax.jit(images)(variables, given, jax.random.key(0), jnp.asarray(noise))) - truth
    )
    began = time.perf_counter()
    run = jax.jit(images).lower(variables, given, jax.random.key(0)).compile()
    about = {"compile_s": round(time.perf_counter() - began, 2), "batch": len(truth)}
    about["parameters"] = parameter_count(found.variables["params"])
    about["difference_over_largest"] = float(f"{float(difference.max() / np.abs(truth).max()):.2g}")
    keys = (jax.random.key(seed) for seed in itertools.count(1))
    workers.serve(lambda: jax.block_until_ready(run(variables, given, next(keys))), about)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--torch-python", default="")
    parser.add_argument("--edm", default="")
    parser.add_argument("--sizes", default="tiny8,mnist")
    parser.add_argument("--work", default="heun,dsg,dps")
    parser.add_argument(
        "--torch",
        default="eager",
        help=f"ways of running PyTorch: {', '.join(train_step.VARIANTS)}",
    )
    parser.add_argument("--guided-steps", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--serve", default="", help=argparse.SUPPRESS)
    parser.add_argument("--folder", default="", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        kind, size, work = args.serve.split(":")
        return serve_torch(args, size, work) if kind == "torch" else serve_jax(args, work)
    more = [str(Path(__file__).resolve()), "--edm", args.edm, f"--guided-steps={args.guided_steps}"]
    for size, work in itertools.product(args.sizes.split(","), args.work.split(",")):
        with tempfile.TemporaryDirectory() as folder:
            ours = None
            for variant in args.torch.split(","):
                command = [args.torch_python, *more, "--folder", folder, "--torch", variant]
                theirs = workers.Worker([*command, "--serve", f"torch:{size}:{work}"])
                if ours is None:  # the PyTorch side writes what it starts from
                    ours = workers.Worker(
                        [sys.executable, *more, "--folder", folder, "--serve", f"jax:{size}:{work}"]
                    )
                about = {"size": size, "work": work, "torch": variant}
                line = about | workers.ratio(ours, theirs, args.rounds) | ours.about | theirs.about
                print(json.dumps(line), flush=True)
                theirs.close()
            ours.close()


if __name__ == "__main__":
    main()
