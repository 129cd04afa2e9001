"""The picture of README.md: real digits, and samples of two training folders from the same noise.

    python benchmarks/front_picture.py runs/posthoc/baseline-seed3 runs/posthoc/ogdm-seed3 \
        --out docs/pictures/front.png

The folders are those of `ogdm study` (docs/studies/posthoc_ema.md). The first real images, and the
image seeds 0 to 31, as they come: nothing is chosen.
"""

import argparse

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ogdm_jax.data import pictures
from ogdm_jax.training.workdir import open_source, open_workdir

COLUMNS, ROWS, SCALE, GAP, HEAD = 8, 4, 4, 28, 26


def sheet(images: np.ndarray) -> np.ndarray:
    """Grey images [32,h,w,1] as one picture, each enlarged, with white lines around."""
    page = pictures.grid(images, COLUMNS, padding=2, scale=SCALE)[..., 0]
    return np.pad(page, 1, constant_values=255)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("baseline")
    parser.add_argument("ogdm")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--out", required=True)
    args = parser.parse_args()
    n = COLUMNS * ROWS
    runs = [open_workdir(folder) for folder in (args.baseline, args.ogdm)]
    source = open_source(runs[0].config)
    panels = {"real digits": np.stack([np.asarray(source[i]["image"]) for i in range(n)])}
    for name, run in zip(("plain training", "with OGDM"), runs, strict=True):
        images = run.sample(n, batch=n, solver="euler", steps=args.steps)
        panels[f"{name}, {args.steps} evaluations an image"] = images
    sheets = [sheet(images) for images in panels.values()]
    height, width = sheets[0].shape
    page = Image.new("L", (3 * width + 2 * GAP, height + HEAD), 255)
    draw, font = ImageDraw.Draw(page), ImageFont.load_default(14)
    for i, (title, panel) in enumerate(zip(panels, sheets, strict=True)):
        draw.text((i * (width + GAP), 2), title, fill=0, font=font)
        page.paste(Image.fromarray(panel), (i * (width + GAP), HEAD))
    page.save(args.out, optimize=True)


if __name__ == "__main__":
    main()
