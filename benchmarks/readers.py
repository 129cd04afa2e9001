"""Images a second that sets on disk are read with: threads of the training process against reading
processes.

    python benchmarks/readers.py [--images 8192] [--side 32] [--batch 256] [--batches 40]
        [--repeats 5]
        [--sources folder,zip,array_record] [--readers
            threads:1,threads:8,workers:1,workers:2] [--step mnist]

Makes a temporary set of PNG files that compress like photographs, and from it EDM's zip and an
array_record set by `ogdm data prepare`. The readers take turns, --repeats times.
Every turn opens the set anew as one larger than memory, takes a few batches (start of threads and
processes), then times the following ones; nothing else is done with the batches. Prints one JSON
line per source and reader, medians over the turns: images a second, seconds of processor time per
1,000 images (of the process that trains, and of it with its reading processes), and seconds until
the first batch. The set lies in the file cache: what a disk or a network adds is not in these
figures.

--step NAME measures instead what reading adds to training: the time of a train step
(benchmarks/train_step.py's network of that name, pictures of its size) on batches from disk over
that on one batch that stays on the devices; --batches steps a turn.
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
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent))
import train_step

from ogdm_jax import data


def write_folder(folder: Path, count: int, side: int, channels: int = 3) -> None:
    """`count` smooth images with a little noise, in ten class folders: about 2.2 kB each at 32x32
    in colour.
    """
    rng = np.random.default_rng(0)
    for k in range(10):
        (folder / str(k)).mkdir(parents=True)
    for i in range(count):
        coarse = np.clip(
            127 + 50 * rng.normal(size=(side // 4, side // 4, channels)), 0, 255
        ).astype(np.uint8)
        coarse = coarse[..., 0] if channels == 1 else coarse
        smooth = np.asarray(
            Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC), np.int16
        )
        noisy = np.clip(smooth + rng.integers(-6, 7, smooth.shape), 0, 255).astype(np.uint8)
        Image.fromarray(noisy).save(folder / str(i % 10) / f"{i:06d}.png")


def prepare(source: str, out: Path) -> None:
    subprocess.run(
        [sys.executable, "-m", "ogdm_jax", "data", "prepare", source, "--out", out],
        check=True,
        capture_output=True,
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


def step_lines(
    sources: dict[str, data.Source], readers: list[str], size: str, steps: int, repeats: int
) -> None:
    """Prints, per source and reader, a step's time from disk over its time on a resident batch."""
    run, advance = train_step.jax_step(size, **train_step.RECIPES[size])
    batch = len(run.source.images)
    streams = {
        (kind, reader): data.batches(
            source, batch, 0, **{reader.split(":")[0]: int(reader.split(":")[1])}
        )
        for kind, source in sources.items()
        for reader in readers
    }
    resident = run.plan.place_batch(next(next(iter(streams.values()))))
    for _ in range(3):
        advance(resident)

    def timed(take: Callable[[], Any]) -> tuple[float, float]:
        began, spent = time.perf_counter(), sum(processor_seconds())
        for _ in range(steps):
            advance(take())
        return time.perf_counter() - began, sum(processor_seconds()) - spent

    ratios = {name: [] for name in streams}
    for name, stream in streams.items():
        for _ in range(repeats + 1):
            took = timed(lambda stream=stream: run.plan.place_batch(next(stream)))
            without = timed(lambda: resident)
            ratios[name].append((took[0] / without[0], took[1] / without[1], without[0] / steps))
        stream.close()
        # first: the start
        wall, processor, alone = (statistics.median(values) for values in zip(*ratios[name][1:]))
        line = {"step": size, "source": name[0], "reader": name[1], "over_resident": round(wall, 4)}
        line |= {
            "processor_over_resident": round(processor, 4),
            "resident_ms": round(1000 * alone, 1),
        }
        print(
            json.dumps(line | {"repeats": repeats, "load": round(os.getloadavg()[0], 1)}),
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, value in (
        ("images", 8192),
        ("side", 32),
        ("batch", 256),
        ("batches", 40),
        ("repeats", 5),
    ):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--sources", default="folder,zip,array_record")
    parser.add_argument("--readers", default="threads:1,threads:8,workers:1,workers:2")
    parser.add_argument("--step", default="", choices=("", *train_step.SIZES))
    args = parser.parse_args()
    readers, (side, channels) = args.readers.split(","), (args.side, 3)
    if args.step:
        side, channels = train_step.SIZES[args.step][:2]
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root, "set")
        write_folder(folder, args.images, side, channels)
        names = {
            "folder": f"folder:{folder}",
            "zip": f"zip:{root}/set.zip",
            "array_record": "tfds:set",
        }
        sources = {}
        for kind in args.sources.split(","):
            if kind != "folder":
                prepare(names["folder"], Path(root, "set.zip" if kind == "zip" else ""))
            sources[kind] = data.open_source(
                names[kind], root if kind == "array_record" else None, memory_limit=0
            )
        if args.step:
            return step_lines(sources, readers, args.step, args.batches, args.repeats)
        for kind, source in sources.items():
            turns = [
                {r: turn(source, r, args.batch, args.batches) for r in readers}
                for _ in range(args.repeats)
            ]
            for reader in readers:
                figures = {
                    key: round(statistics.median(t[reader][key] for t in turns), 4)
                    for key in turns[0][reader]
                }
                figures["images_per_second"] = round(figures["images_per_second"])
                about = {"source": kind, "side": side, "batch": args.batch, "reader": reader}
                about |= figures | {"cores": os.cpu_count(), "repeats": args.repeats}
                print(json.dumps(about | {"load": round(os.getloadavg()[0], 1)}), flush=True)


if __name__ == "__main__":
    main()
