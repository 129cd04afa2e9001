"""`ogdm sample --animate FILE.webp`: how one batch comes out of the noise, frame by frame."""

import numpy as np
from etils import epath

from ogdm_jax import places
from ogdm_jax.config import ConfigError, Sample
from ogdm_jax.data.pictures import save_animation, sheet
from ogdm_jax.report.numbers import nice
from ogdm_jax.sampling import generate
from ogdm_jax.training.workdir import Path, TrainedModel

MOST = 16  # images of an animation
LENGTH, LAST, LEAST = 3.0, 1.5, 0.04  # seconds: of all steps, of the end, of a frame


def check(text: str, trained: TrainedModel, settings: Sample) -> epath.Path | None:
    """Where an animation goes; None of "".

    Raises:
      ConfigError: another kind of file, or a sampler that does not keep its steps.
    """
    if not text:
        return None
    path = places.place(text, "--animate")
    if path.suffix.lower() not in (".webp", ".gif", ".png"):
        raise ConfigError(f"--animate: {text!r} given; expected FILE.webp, FILE.gif or FILE.png")
    if settings.grid == generate.PNDM:
        raise ConfigError(
            "--animate: the grid 'pndm' is the released sampler, which does not keep its steps; "
            "expected another grid, such as ddim"
        )
    return places.writable(path, "--animate", file=True)


def write(where: epath.Path, path: Path) -> int:
    """Writes the frames of a path: the sampler's state beside what the network takes the image to
    be, then the images. Returns the number of frames.

    Latents are no pictures: where they are decoded only the second is shown.
    """
    shows_state = path.states.shape[2:] == path.images.shape[1:]
    columns = min(4, len(path.images))
    frames = []
    for step, sigma in enumerate(path.sigmas):
        end = step == len(path.x0_hats)
        x0 = path.images if end else path.x0_hats[step]
        words = ["the image" if end else "denoised"]
        words = [f"noise level {nice(float(f'{sigma:.2g}'))}", *words] if shows_state else words
        parts = [path.states[step], x0] if shows_state else [x0]
        frames.append(_frame(parts, columns, words))
    each = max(LEAST, LENGTH / len(frames))
    save_animation(where, frames, [round(1000 * each)] * (len(frames) - 1) + [round(1000 * LAST)])
    return len(frames)


def _frame(parts: list[np.ndarray], columns: int, headings: list[str]) -> np.ndarray:
    """Sheets of images in about [-1, 1] side by side, each with a heading."""
    rows = -(-len(parts[0]) // columns)
    cells = np.ones((rows, len(parts), columns, *parts[0].shape[1:]), np.float32)  # white
    for part, images in enumerate(parts):
        for i, image in enumerate(np.clip(images, -1, 1)):
            cells[i // columns, part, i % columns] = image
    wide = cells.reshape(-1, *parts[0].shape[1:])
    return sheet(wide, len(parts) * columns, headings=headings, group=columns)
