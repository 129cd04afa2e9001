"""Writes the latents of a set: `ogdm data encode`, resumable; latents.py reads them."""

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter
from etils import epath

from ogdm_jax import places, records
from ogdm_jax.data.base import Source, SourceError, fingerprint
from ogdm_jax.data.latents import SIDECAR
from ogdm_jax.data.prepare import bounds_of, write_shards
from ogdm_jax.latents import Latents

# uint8 images [n,H,W,C] -> (mean, std) [n,h,w,C] each, float32, unscaled
Encode = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]
FORMAT = "ogdm_jax latents 1"
_LARGEST = float(np.finfo(np.float16).max)


def encode(
    source: Source,
    out: str | Path,
    encode: Encode,
    latents: Latents,
    batch: int = 16,
    shard_images: int | None = None,
) -> str:
    """Encodes every image of a set and its mirrored image, and writes (mean, std) as float16;
    captions as they are, each shard's in a JSON file (`latents.read_captions`).

    A shard takes its name when it is whole; interrupted work lies beside the result (".parts"), and
    the next call with the same set and autoencoder goes on with it. Its files are then those of a
    call that was not interrupted, byte for byte, on the same machine.

    Args:
      source: of pixels.
      out: the folder to write.
      encode: the autoencoder; images come `batch` at a time.
      latents: what the numbers will be: shape, scale, shift, vae and pixels.
      batch: images at a time.
      shard_images: images a shard; about 64 MB by default.

    Returns:
      The name under which open_source reads the result.

    Raises:
      SourceError: out exists, parts of another set or autoencoder lie there, an image's latent is
        not finite, or the files cannot be written.
    """
    try:
        final = places.local(out, "--out")
    except places.PlaceError as error:
        raise SourceError(f"{error}: encode there, then copy it") from None
    bounds = bounds_of(source, 2 * int(np.prod(latents.item_shape)), shard_images)
    shards = [f"latents-{k:05d}-of-{len(bounds):05d}.array_record" for k in range(len(bounds))]
    parts = final.with_name(final.name + ".parts")
    about = {
        "format": FORMAT,
        "layout": "hwc",
        "stored": "mean, std",
        "images": len(source),
        "class_names": list(source.class_names),
        **({"captions": len(source)} if source.captioned else {}),
        **dataclasses.asdict(latents),
    }

    def write(path: Path, start: int, stop: int, tick: Callable[[], object]) -> None:
        labels, captions = [], []
        writer = ArrayRecordWriter(str(path), "group_size:1")
        for at in range(start, stop, batch):
            rows = np.resize(np.arange(at, min(at + batch, stop)), batch)  # one size is compiled
            part = source.take(rows)
            items = _items(encode, part["image"], source, rows)
            for item, label in list(zip(items, part["label"]))[: stop - at]:
                writer.write(item.tobytes())
                labels.append(label)
                tick()
            captions += list(part.get("caption", ()))[: stop - at]
        writer.close()
        name = shards[bounds.index((start, stop))].removeprefix("latents")
        if captions:
            records.write(epath.Path(parts / f"captions{name}").with_suffix(".json"), captions)
        with places.written(epath.Path(parts / f"labels{name}").with_suffix(".npy")) as new:
            np.save(new, np.stack(labels))

    vae = f"the autoencoder {latents.vae.get('path')} ({latents.vae.get('sha256', '')[:12]})"
    write_shards(source, final, parts, shards, bounds, write, {"encoded with": vae})
    records.write(epath.Path(parts / SIDECAR), about, indent=1)
    (parts / "plan.json").unlink()
    shutil.move(parts, final)
    return f"latents:{out}"


def about_pixels(source: Source, settings: dict[str, Any]) -> dict[str, Any]:
    """What was encoded: settings of `open_source`, and the set's fingerprint."""
    return {"name": source.name, **settings, "data_set": fingerprint(source)}


def _items(encode: Encode, images: np.ndarray, source: Source, rows: np.ndarray) -> np.ndarray:
    """Items [n,2,h,w,2C] float16 of images and their mirrored ones."""
    views = [np.concatenate(encode(view), axis=-1) for view in (images, images[:, :, ::-1])]
    items = np.stack(views, axis=1)
    bad = ~np.isfinite(items).all(axis=(1, 2, 3, 4)) | (np.abs(items) > _LARGEST).any((1, 2, 3, 4))
    if bad.any():
        row = int(rows[np.flatnonzero(bad)[0]])
        where = f"image {row}" if source.reader is None else source.reader.where(row)
        raise SourceError(
            f"{source.name}: the latent of {where} holds NaN or infinity, or is beyond float16; "
            "expected an autoencoder that encodes it, or the set without it"
        )
    return items.astype(np.float16)
