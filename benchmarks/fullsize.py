"""Latent models of full size with random weights: the originals in PyTorch beside ours, end to end.

    python benchmarks/fullsize.py --torch-python PY --dit DIR --folder FOLDER [--rounds 3]
        [--parts dit,dit_diffusers,unet,encode,decode,text] [--side 512] [--small]

PY is a Python with torch, diffusers, transformers and timm; DIR a checkout of
facebookresearch/DiT (read and run there, nothing of it is part of this package). FOLDER gets the
files (10 GB): DiT-XL/2 in the published .pt form (dit) and as diffusers keeps it (dit_diffusers),
and unet, vae and text_encoder of Stable Diffusion 2.1's size, written by diffusers and
transformers. A file that is there already is taken. PyTorch's side makes the weights (from one
seed; none of them zero), writes them and its output; ours reads the files with `load_pretrained`.
Prints one JSON line a part: the largest difference over the largest number ("worst"), the median
over interleaved rounds of ours / theirs (below 1: ours is faster), seconds of reading, and the most
memory that either process held. One network at a time, float32, one picture. --small tries all of
it in a minute: DiT-S/2 for XL/2, the others with fewer and narrower layers (another FOLDER).
"""

import argparse
import json
import resource
import sys
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
import workers

PARTS = ("dit", "dit_diffusers", "unet", "encode", "decode", "text")
FILES = {"dit": "DiT-XL-2-256x256.pt", "dit_diffusers": "transformer", "text": "text_encoder"}
FILES |= {"unet": "unet", "encode": "vae", "decode": "vae"}
DIT = dict(name="DiT-XL/2", layers=28)
UNET = dict(  # of Stable Diffusion 2.1
    sample_size=64,
    cross_attention_dim=1024,
    attention_head_dim=[5, 10, 20, 20],
    use_linear_projection=True,
)
VAE = dict(
    block_out_channels=[128, 256, 512, 512],
    down_block_types=["DownEncoderBlock2D"] * 4,
    up_block_types=["UpDecoderBlock2D"] * 4,
    layers_per_block=2,
    latent_channels=4,
    norm_num_groups=32,
    sample_size=512,
)
TEXT = dict(
    hidden_size=1024,
    intermediate_size=4096,
    num_hidden_layers=23,
    num_attention_heads=16,
    hidden_act="gelu",
    vocab_size=49408,
)


def inputs(part: str, side: int) -> dict[str, np.ndarray]:
    """What both sides are asked, in PyTorch's layout."""
    rng = np.random.default_rng(1)
    normal = lambda *shape: rng.standard_normal(shape).astype(np.float32)
    if part == "text":
        return {"ids": rng.integers(0, TEXT["vocab_size"], (1, 77)).astype(np.int32)}
    if part == "encode":
        return {"x": np.clip(normal(1, 3, side, side) / 2, -1, 1)}
    if part == "decode":
        return {"x": normal(1, 4, side // 8, side // 8)}
    t = np.full(1, 500, np.float32)
    if part == "unet":
        return {"x": normal(1, 4, side // 8, side // 8), "t": t, "context": normal(1, 77, 1024)}
    return {"x": normal(1, 4, 32, 32), "t": t, "label": np.full(1, 207, np.int32)}


def narrow() -> None:
    """Makes all networks small; this process alone."""
    TEXT.update(intermediate_size=256, num_hidden_layers=2, vocab_size=500)
    VAE.update(block_out_channels=[32, 32, 64, 64])
    UNET.update(layers_per_block=1, block_out_channels=[64, 128, 128, 128], sample_size=8)
    UNET.update(attention_head_dim=[1, 2, 2, 2])
    DIT.update(name="DiT-S/2", layers=3)


def _filled(network):
    """Random numbers for every parameter that is trained, from one seed."""
    import torch

    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in filter(lambda p: p.requires_grad, network.parameters()):
            fan = parameter[0].numel() if parameter.dim() > 1 else 100
            parameter.normal_().div_(fan**0.5)
    return network


def original(part: str, dit: str):
    """(the network in PyTorch, a function that writes it, its output for the inputs)."""
    import torch

    torch.manual_seed(0)
    if part == "dit":
        sys.path.insert(0, dit)
        from models import DiT_models

        network = _filled(DiT_models[DIT["name"]]())
        return network, lambda at: torch.save(network.state_dict(), at), network.forward
    import diffusers
    import transformers

    if part == "dit_diffusers":
        network = _filled(diffusers.DiTTransformer2DModel(out_channels=8, num_layers=DIT["layers"]))
        state = network.state_dict()
        for name in state:  # the embedders are one, kept in every block
            at, emb, rest = name.partition(".norm1.emb.")
            if emb:
                state[name].copy_(state[f"transformer_blocks.0{emb}{rest}"])
        for block in network.transformer_blocks:  # the authors' arithmetic in place of diffusers'
            block.norm1.emb.time_proj.downscale_freq_shift = 0
            block.norm3.eps = 1e-6
        run = lambda x, t, y: network(x, timestep=t, class_labels=y).sample
    elif part == "unet":
        network = diffusers.UNet2DConditionModel(**UNET)
        run = lambda x, t, context: network(x, t, context).sample
    elif part == "text":
        network = transformers.CLIPTextModel(transformers.CLIPTextConfig(**TEXT))
        run = lambda ids: network(ids).last_hidden_state
    else:
        network = diffusers.AutoencoderKL(**VAE)
        encode = lambda x: network.encode(x).latent_dist.parameters
        run = encode if part == "encode" else lambda x: network.decode(x).sample
    return network, network.save_pretrained, run


def _peak() -> float:
    """GB that this process held at most."""
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6, 2)


def serve_torch(part: str, dit: str, folder: Path, side: int) -> None:
    import torch

    torch.set_num_threads(2)
    network, write, run = original(part, dit)
    network.eval()
    file = folder / FILES[part]
    if not file.exists():
        write(file)
    given = inputs(part, side)
    tensors = [
        torch.from_numpy(v).to(torch.int64 if v.dtype == np.int32 else None) for v in given.values()
    ]
    with torch.inference_mode():
        np.savez(folder / f"{part}.npz", run(*tensors).numpy())
        parameters = sum(p.numel() for p in network.parameters())
        about = {"parameters": parameters, "peak_gb": _peak()}
        workers.serve(lambda: run(*tensors), about, warm=0)


def serve_jax(part: str, folder: Path, side: int) -> None:
    from ogdm_jax import startup

    startup.prepare()
    import jax

    from ogdm_jax.interop import load_pretrained

    began = time.perf_counter()
    found = load_pretrained(folder / FILES[part])
    read = round(time.perf_counter() - began, 1)
    nhwc = lambda v: v.transpose(0, 2, 3, 1) if v.ndim == 4 else v
    given = [nhwc(v) for v in inputs(part, side).values()]
    method = part if part in ("encode", "decode") else None
    run = jax.jit(lambda variables, *args: found.network.apply(variables, *args, method=method))
    variables = jax.device_put(found.variables)
    object.__setattr__(found, "variables", None)
    ours = np.asarray(run(variables, *given))
    with np.load(folder / f"{part}.npz") as file:
        theirs = nhwc(file["arr_0"])
    worst = float(np.abs(ours - theirs).max() / np.abs(theirs).max())
    about = {"worst": worst, "largest": float(np.abs(theirs).max()), "read_s": read}
    about |= {"parameters": sum(v.size for v in jax.tree.leaves(variables)), "peak_gb": _peak()}
    workers.serve(lambda: jax.block_until_ready(run(variables, *given)), about, warm=0)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--torch-python", default="")
    parser.add_argument("--dit", default="")
    parser.add_argument("--folder", required=True, type=Path)
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--side", type=int, default=512, help="of the autoencoder's and U-Net's")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--serve", default="", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.small:
        narrow()
    if args.serve:
        kind, part = args.serve.split(":")
        if kind == "torch":
            return serve_torch(part, args.dit, args.folder, args.side)
        return serve_jax(part, args.folder, args.side)
    args.folder.mkdir(parents=True, exist_ok=True)
    this = str(Path(__file__).resolve())
    more = ["--dit", args.dit, "--folder", str(args.folder), "--side", str(args.side)]
    more += ["--small"] * args.small
    for part in args.parts.split(","):
        theirs = workers.Worker([args.torch_python, this, "--serve", f"torch:{part}", *more])
        ours = workers.Worker([sys.executable, this, "--serve", f"jax:{part}", *more])
        about = {"part": part, "torch_peak_gb": theirs.about["peak_gb"]}
        print(json.dumps(about | ours.about | workers.ratio(ours, theirs, args.rounds)), flush=True)
        theirs.close()
        ours.close()


if __name__ == "__main__":
    main()
