"""Crops of 32x32 of scikit-learn's two photographs, at half their size: 4,000 of the left (held
= 0) and 200 of the right end (held = 1), which share no pixel.

python benchmarks/photo_crops.py photos32.npz
"""

import sys

import numpy as np
from PIL import Image
from sklearn.datasets import load_sample_images


def main() -> None:
    """Writes the file that is named."""
    draw, images, held = np.random.default_rng(0), [], []
    for picture in load_sample_images().images:  # china.jpg and flower.jpg, 427 x 640
        half = np.asarray(Image.fromarray(picture).resize((320, 213), Image.Resampling.BOX))
        for part, number, left, right in ((0, 2000, 0, 224), (1, 100, 224, 320)):
            for _ in range(number):
                y, x = draw.integers(213 - 32 + 1), draw.integers(left, right - 32 + 1)
                images.append(half[y : y + 32, x : x + 32])
                held.append(part)
    order = draw.permutation(len(images))
    rows = {"image": np.stack(images)[order], "held": np.array(held)[order]}
    np.savez_compressed(sys.argv[1], **rows)


if __name__ == "__main__":
    main()
