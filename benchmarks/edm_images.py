"""The images of EDM's published code and sampler against ours, from one checkpoint file that its
code pickled.

    python benchmarks/edm_images.py --torch-python PY --edm DIR [--networks edm,vp,ve,adm]
        [--channels 128]

PY is a Python with torch and what EDM's generate.py imports; DIR a checkout of NVlabs/edm (read and
run there, nothing of it is part of this package). The networks are CIFAR-10's (adm: two levels of
ImageNet-64's, at 32 pixels), with random numbers in every tensor; both samplers start from the same
latents. Prints one JSON line per network: the largest difference over the largest value.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

STEPS = 18
SONG = {"model_type": "SongUNet", "channel_mult": [2, 2, 2], "augment_dim": 9, "dropout": 0.13}
NCSN = {
    "embedding_type": "fourier",
    "encoder_type": "residual",
    "channel_mult_noise": 2,
    "resample_filter": [1, 3, 3, 1],
}
NETWORKS = {  # EDM's preconditioning, settings of its network
    "edm": ("EDMPrecond", SONG),
    "vp": ("VPPrecond", SONG),
    "ve": ("VEPrecond", SONG | NCSN),
    "adm": (
        "EDMPrecond",
        {"model_type": "DhariwalUNet", "channel_mult": [1, 2], "attn_resolutions": [16]},
    ),
}


def theirs(edm: str, folder: Path, name: str, channels: int) -> None:
    sys.path.insert(0, edm)
    import pickle

    import generate
    import torch
    from training import networks

    kind, settings = NETWORKS[name]
    net = getattr(networks, kind)(
        img_resolution=32, img_channels=3, label_dim=10, model_channels=channels, **settings
    )
    draw = torch.Generator().manual_seed(0)
    for entry, p in net.named_parameters():
        size, gain = (p[0].numel(), 1.0) if p.ndim > 1 else (1, 0.03)
        shift = 1.0 if p.ndim == 1 and entry.endswith("weight") else 0.0
        p.data = shift + gain * torch.randn(p.shape, generator=draw) / size**0.5
    net = net.eval().requires_grad_(False)
    with open(folder / f"{name}.pkl", "wb") as file:
        pickle.dump({"ema": net, "loss_fn": None, "augment_pipe": None, "dataset_kwargs": {}}, file)
    latents, labels = torch.randn(3, 3, 32, 32, generator=draw), torch.eye(10)[[1, 4, 7]]
    with torch.no_grad():
        images = generate.edm_sampler(net, latents, labels, num_steps=STEPS)
    np.savez(folder / f"{name}.npz", latents=latents, labels=labels, images=images)


def ours(folder: Path, name: str) -> dict:
    import jax

    from ogdm_jax.diffusion import grids
    from ogdm_jax.interop import load_pretrained
    from ogdm_jax.models import parameter_count
    from ogdm_jax.sampling.sampler import sample

    with np.load(folder / f"{name}.npz") as saved:
        given = dict(saved)
    latents, truth = (given[key].transpose(0, 2, 3, 1) for key in ("latents", "images"))
    found = load_pretrained(folder / f"{name}.pkl")
    denoise = found.denoiser()
    levels = grids.edm(STEPS, *grids.clip_range(denoise, 0.002, 80.0))
    run = jax.jit(lambda z: sample(denoise, z, levels, solver="heun", label=given["labels"]))
    largest = float(np.abs(truth).max())
    difference = float(np.abs(run(latents.astype(np.float32)) - truth).max())
    about = {
        "network": name,
        "parameters": parameter_count(found.variables["params"]),
        "largest": round(largest, 4),
    }
    return about | {"difference_over_largest": float(f"{difference / largest:.3g}")}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--torch-python", default="")
    parser.add_argument("--edm", default="")
    parser.add_argument("--networks", default="edm,vp,ve,adm")
    parser.add_argument("--channels", type=int, default=128)
    parser.add_argument("--serve", nargs=2, default=None, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        return theirs(args.edm, Path(args.serve[0]), args.serve[1], args.channels)
    from ogdm_jax import startup

    startup.prepare()
    import jax

    jax.config.update("jax_default_matmul_precision", "highest")
    with tempfile.TemporaryDirectory() as folder:
        for name in args.networks.split(","):
            more = ["--edm", args.edm, "--channels", str(args.channels), "--serve", folder, name]
            subprocess.run([args.torch_python, str(Path(__file__).resolve()), *more], check=True)
            print(json.dumps(ours(Path(folder), name)), flush=True)


if __name__ == "__main__":
    main()
