"""Images a second that sets on disk are read with: threads of the training process against reading processes.

    python benchmarks/readers.py [--images 8192] [--side 32] [--batch 256] [--batches 40] [--repeats 5]
        [--sources folder,zip,array_record] [--readers threads:1,threads:8,workers:1,workers:2]

Makes a temporary set of PNG files that compress like photographs, and from it EDM's zip and an array_record set by
`python -m ogdm_jax.data prepare`. The readers take turns, --repeats times. Every turn opens the set anew as one larger
than memory, takes a few batches (start of threads and processes), then times the following ones; nothing else is done
with the batches. Prints one JSON line per source and reader, medians over the turns: images a second, seconds of
processor time per 1,000 images (of the process that trains, and of it with its reading processes), and seconds until
the first batch. The set lies in the file cache: what a disk or a network adds is not in these figures.
"""

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil
from PIL import Image

from ogdm_jax import data


def write_folder(folder: Path, count: int, side: int) -> None:
    """`count` smooth colour images with a little noise, in ten class folders: about 2.2 kB each at 32x32."""
    rng = np.random.default_rng(0)
    for k in range(10):
        (folder / str(k)).mkdir(parents=True)
    for i in range(count):
        coarse = np.clip(127 + 50 * rng.normal(size=(side // 4, side // 4, 3)), 0, 255).astype(np.uint8)
        smooth = np.asarray(Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC), np.int16)
        noisy = np.clip(smooth + rng.integers(-6, 7, smooth.shape), 0, 255).astype(np.uint8)
        Image.fromarray(noisy).save(folder / str(i % 10) / f"{i:06d}.png")


def prepare(source: str, out: Path) -> None:
    subprocess.run(
        [sys.executable, "-m", "ogdm_jax.data", "prepare", source, "--out", out], check=True, capture_output=True
    )


def processor_seconds() -> tuple[float, float]:
    """(of this process, of its children that run)."""
    spent = 0.0
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            times = child.cpu_times()
            spent += times.user + times.system
    return time.process_time(), spent


def turn(source: data.Source, reader: str, batch: int, batches: int) -> dict[str, float]:
    kind, _, number = reader.partition(":")
    began = time.perf_counter()
    stream = data.batches(source, batch, 0, **{kind: int(number)})
    next(stream)
    first = time.perf_counter() - began
    for _ in range(2 * int(number)):  # what was read ahead while the first batch was awaited
        next(stream)
    own, children = processor_seconds()
    began = time.perf_counter()
    for _ in range(batches):
        next(stream)
    seconds = time.perf_counter() - began
    own, children = (now - before for now, before in zip(processor_seconds(), (own, children)))
    stream.close()
    thousands = batch * batches / 1000
    return {
        "images_per_second": 1000 * thousands / seconds,
        "trainer_cpu_s_per_1000": own / thousands,
        "cpu_s_per_1000": (own + children) / thousands,
        "first_batch_s": first,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in (("images", 8192), ("side", 32), ("batch", 256), ("batches", 40), ("repeats", 5)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--sources", default="folder,zip,array_record")
    parser.add_argument("--readers", default="threads:1,threads:8,workers:1,workers:2")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root, "set")
        write_folder(folder, args.images, args.side)
        names = {"folder": f"folder:{folder}", "zip": f"zip:{root}/set.zip", "array_record": "tfds:set"}
        for kind in args.sources.split(","):
            if kind != "folder":
                prepare(names["folder"], Path(root, "set.zip" if kind == "zip" else ""))
            source = data.open_source(names[kind], root if kind == "array_record" else None, memory_limit=0)
            readers = args.readers.split(",")
            turns = [{r: turn(source, r, args.batch, args.batches) for r in readers} for _ in range(args.repeats)]
            for reader in readers:
                figures = {key: round(statistics.median(t[reader][key] for t in turns), 4) for key in turns[0][reader]}
                figures["images_per_second"] = round(figures["images_per_second"])
                about = {"source": kind, "side": args.side, "batch": args.batch, "reader": reader}
                print(json.dumps(about | figures | {"cores": os.cpu_count(), "repeats": args.repeats}), flush=True)


if __name__ == "__main__":
    main()
