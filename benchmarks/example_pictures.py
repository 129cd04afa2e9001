"""Pictures of the tasks that follow an example (docs/tasks.md), with a denoiser that needs no
training: the exact one of a mixture with a Gaussian around each image of a set.

    python benchmarks/example_pictures.py --images emoji32.npz --task style --example 7 --out a.png

The first row is the example, the second what the same seeds give without guidance, the third with
it. Prints distances as JSON. What it shows is the loss at work, not what a trained model can do.
"""

import argparse
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from ogdm_jax import records
from ogdm_jax.data import pictures
from ogdm_jax.diffusion import grids
from ogdm_jax.inverse import measured, tasks
from ogdm_jax.methods import dsg
from ogdm_jax.pixels import to_float
from ogdm_jax.sampling import sample
from ogdm_jax.sampling.guidance import per_image
from ogdm_jax.typing import Array

STD = 0.1  # of the Gaussian around each image


def denoiser(images: Array, x: Array, sigma: Array) -> Array:
    """E[x0 | x] of the mixture: images [N,D], x [B,H,W,C], sigma [B]."""
    flat, variance = x.reshape(len(x), -1), STD**2 + sigma[:, None] ** 2
    distance = (
        jnp.sum(flat**2, 1, keepdims=True) - 2 * flat @ images.T + jnp.sum(images**2, 1)[None]
    )
    mean = jax.nn.softmax(-distance / (2 * variance), axis=1) @ images
    share = STD**2 / variance
    return (share * flat + (1 - share) * mean).reshape(x.shape)


def main() -> None:
    """Draws and writes the picture."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", required=True, help="npz with uint8 images [n,h,w,3]")
    parser.add_argument("--keep", default="", help="NAME=VALUE of a column: only these images")
    parser.add_argument("--task", required=True)
    parser.add_argument("--example", required=True, help="row that is left out, or a picture")
    parser.add_argument("--rate", type=float, default=0.2)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--num", type=int, default=8)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--weights", default="")
    parser.add_argument("--out", required=True)
    args = parser.parse_args()
    file = np.load(args.images)
    name = "image" if "image" in file else "images"
    kept = np.ones(len(file[name]), bool)
    if args.keep:
        column, _, value = args.keep.partition("=")
        kept = file[column].astype(str) == value
    side = file[name].shape[1]
    if args.example.isdecimal():
        example = file[name][int(args.example)]
        kept[int(args.example)] = False
    else:
        with open(args.example, "rb") as picture:
            example = pictures.fit(pictures.decode(picture.read()), side)
    images = jnp.asarray(to_float(file[name][kept]).reshape(kept.sum(), -1))
    settings = tasks.Settings(weights=args.weights)
    if args.task == "style":
        settings = dataclasses.replace(settings, size=args.size)
    task = tasks.make_task(args.task, settings, (side, side, 3))
    seeds = np.arange(args.num)
    made = measured.measure(task, settings, to_float(np.stack([example] * args.num)), seeds)
    guide = per_image(
        lambda rows, weights: dsg.guidance(made.measured(rows, weights).loss(), args.rate),
        made.rows,
        task.weights,
    )

    @jax.jit
    def draw(images: Array, rows: dict, weights: dict, latents: Array, key: Array) -> list[Array]:
        held = dataclasses.replace(guide, rows=rows, constants=weights)
        sigmas, denoise = (
            grids.edm(args.steps),
            lambda x, sigma, label=None: denoiser(images, x, sigma),
        )
        how = {"solver": "ddim", "eta": 1.0, "key": key}
        return [sample(denoise, latents, sigmas, guidance=g, **how) for g in ((), (held,))]

    latents = jax.random.normal(jax.random.key(0), (args.num, side, side, 3))
    rows = jax.tree.map(jnp.asarray, made.rows)
    free, guided = map(np.asarray, draw(images, rows, task.weights, latents, jax.random.key(1)))
    blank = np.ones((args.num - 1, side, side, 3), np.float32)
    shown = np.concatenate([to_float(example[None]), blank, free, guided]).clip(-1, 1)
    pictures.save_png(args.out, pictures.grid(shown, args.num, padding=2, scale=2))
    figures = {k: made.judge(v)["distance"] for k, v in (("free", free), ("guided", guided))}
    said = {k: [round(float(v), 3) for v in values] for k, values in figures.items()}
    nearest = [int(np.square(v.reshape(-1) - np.asarray(images)).sum(1).argmin()) for v in guided]
    rows_of = np.flatnonzero(kept)[nearest].tolist()
    print(records.dumps({"task": args.task, **task.about, **said, "nearest_rows": rows_of}))


if __name__ == "__main__":
    main()
