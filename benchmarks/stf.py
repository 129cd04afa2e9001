"""Cost of STF's target: ogdm_jax.methods.stf against the authors' formulation in PyTorch, in one
interleaved run.

    python benchmarks/stf.py [--batch 32] [--references 1024] [--side 32] [--rounds 5] [--torch
        PYTHON] [--step ddpmpp]

The authors' formulation, re-stated from the paper's code description: an explicit difference array
(batch, references, pixels), its squares summed, a softmax, and the weights times a repeated copy of
the references. It runs in a second process (PYTHON: an interpreter with PyTorch; default this one),
one call a round, in turn with ours; both get the same numbers. --official DIR runs the authors' own
function from a checkout of their repository instead. Printed: median and fastest times, their
ratio, memory beyond the inputs, and the error against float64. The default size needs about 2 GB
for the PyTorch side; batch 128 with 4096 references needs 12 GB.

--step adds a train step of benchmarks/train_step.py's network of that name to the turns, and prints
the target's share of the step for --batch images (the step runs on few images; its time is taken to
grow with their number).
"""

import argparse
import resource
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
import workers


def problem(batch: int, references: int, side: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Images x [b,d], sigma [b] log-uniform on [0.5, 50], references uint8 [n,d].

    The first b references are the images' sources.
    """
    rng = np.random.default_rng(0)
    known = rng.integers(0, 256, (references, side * side * 3), dtype=np.uint8)
    sigma = np.exp(rng.uniform(np.log(0.5), np.log(50), batch)).astype(np.float32)
    x = known[:batch] / 127.5 - 1 + sigma[:, None] * rng.normal(size=(batch, known.shape[1]))
    return x.astype(np.float32), sigma, known


def exact(x: np.ndarray, sigma: np.ndarray, known: np.ndarray) -> np.ndarray:
    """The target in float64."""
    x, known = x.astype(np.float64), known / 127.5 - 1
    logits = (x @ known.T - 0.5 * np.square(known).sum(1)) / np.square(sigma.astype(np.float64))[
        :, None
    ]
    weights = np.exp(logits - logits.max(1, keepdims=True))
    return weights / weights.sum(1, keepdims=True) @ known


def peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def serve_torch(args: argparse.Namespace) -> None:
    """The authors' target on demand; the first one goes to the file args.worker."""
    import torch

    x, sigma, known = problem(args.batch, args.references, args.side)
    x, sigma, known = (
        torch.from_numpy(x),
        torch.from_numpy(sigma),
        torch.from_numpy(known / 127.5 - 1).float(),
    )
    before = peak_mb()

    def target() -> torch.Tensor:
        n, d = known.shape
        distance = torch.sum((x.unsqueeze(1) - known.unsqueeze(0)) ** 2, dim=2)
        logits = -distance / (2 * sigma.unsqueeze(1) ** 2)
        weights = torch.exp(logits - logits.max(dim=1, keepdim=True)[0])
        weights = weights / weights.sum(dim=1, keepdim=True)
        return torch.sum(weights.unsqueeze(2) * known.unsqueeze(0).repeat(len(x), 1, 1), dim=1)

    if args.official:
        sys.path.insert(0, args.official)
        from training.loss import EDMLoss

        target = lambda: EDMLoss().stf_targets(sigma, x, known)
    with torch.no_grad():
        np.save(args.worker, target().numpy())
        workers.serve(target, {"megabytes": peak_mb() - before})


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, value in (("batch", 32), ("references", 1024), ("side", 32), ("rounds", 5)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument(
        "--torch", default=sys.executable, help="interpreter with PyTorch; empty = ours alone"
    )
    parser.add_argument(
        "--official",
        default="",
        help="checkout of Newbeeer/stf, run there instead of our restatement",
    )
    parser.add_argument(
        "--step", default="", help="network of benchmarks/train_step.py; empty = no step"
    )
    parser.add_argument("--worker", default="", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return serve_torch(args)

    import jax

    from ogdm_jax.methods import stf

    arrays = [jax.device_put(a) for a in problem(args.batch, args.references, args.side)]
    ours = jax.jit(stf.stable_target).lower(*arrays).compile()
    result = np.asarray(ours(*arrays)[0])

    def seconds() -> float:
        began = time.perf_counter()
        jax.block_until_ready(ours(*arrays))
        return time.perf_counter() - began

    print(
        f"{args.batch} queries, {args.references} references, {args.side}x{args.side}x3, "
        f"{args.rounds} rounds"
    )
    truth = exact(*problem(args.batch, args.references, args.side))
    megabytes = {"ours": ours.memory_analysis().temp_size_in_bytes / 1e6}
    errors = {"ours": np.abs(result - truth).max()}
    others: dict[str, workers.Worker] = {}
    if args.torch:
        with tempfile.TemporaryDirectory() as folder:
            saved = Path(folder) / "target.npy"
            sizes = [
                f"--{n}={getattr(args, n)}" for n in ("batch", "references", "side", "official")
            ]
            others["PyTorch"] = workers.Worker([args.torch, __file__, *sizes, f"--worker={saved}"])
            errors["PyTorch"] = np.abs(np.load(saved) - truth).max()
        megabytes["PyTorch"] = others["PyTorch"].about["megabytes"]
    if args.step:
        code = Path(__file__).with_name("train_step.py")
        others["step"] = workers.Worker([sys.executable, str(code), "--serve", f"jax:{args.step}"])
    turns = {"ours": seconds} | {name: worker.seconds for name, worker in others.items()}
    times = {name: [] for name in turns}
    for _ in range(args.rounds):
        for name, turn in turns.items():
            times[name].append(turn())
    for worker in others.values():
        worker.close()

    for name, error in errors.items():
        print(
            f"{name:8} median {np.median(times[name]) * 1e3:9.2f} ms   fastest "
            f"{min(times[name]) * 1e3:9.2f} ms   "
            f"{megabytes[name]:8.1f} MB   error against float64 {error:.1e}"
        )
    over = {name: np.median(np.array(times[name]) / np.array(times["ours"])) for name in others}
    if args.torch:
        memory = megabytes["PyTorch"] / megabytes["ours"]
        print(
            f"PyTorch / ours: {over['PyTorch']:.0f} times the time, {memory:.0f} times the memory"
        )
    if args.step:
        images = others["step"].about["batch"]
        share = images / (over["step"] * args.batch)
        print(f"{args.step}, {images} images: {np.median(times['step']) * 1e3:.0f} ms a step; "
              f"the target is {share:.2%} of the step for {args.batch} images")  # fmt: skip


if __name__ == "__main__":
    main()
