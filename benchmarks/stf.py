"""Cost of STF's target: ogdm_jax.methods.stf against the authors' formulation in PyTorch, in one interleaved run.

    python benchmarks/stf.py [--batch 32] [--references 1024] [--side 32] [--rounds 5] [--torch PYTHON]

The authors' formulation, re-stated from the paper's code description: an explicit difference array (batch, references,
pixels), its squares summed, a softmax, and the weights times a repeated copy of the references. It runs in a second
process (PYTHON: an interpreter with PyTorch; default this one), one call a round, in turn with ours; both get the same
numbers. Printed: median and fastest times, their ratio, memory beyond the inputs, and the error against float64.
The default size needs about 2 GB for the PyTorch side; batch 128 with 4096 references would need 20 GB.
"""

import argparse
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np


def problem(batch: int, references: int, side: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """x [b,d], sigma [b] log-uniform on [0.5, 50], references uint8 [n,d] whose first b are the sources."""
    rng = np.random.default_rng(0)
    known = rng.integers(0, 256, (references, side * side * 3), dtype=np.uint8)
    sigma = np.exp(rng.uniform(np.log(0.5), np.log(50), batch)).astype(np.float32)
    x = known[:batch] / 127.5 - 1 + sigma[:, None] * rng.normal(size=(batch, known.shape[1]))
    return x.astype(np.float32), sigma, known


def exact(x: np.ndarray, sigma: np.ndarray, known: np.ndarray) -> np.ndarray:
    """The target in float64."""
    x, known = x.astype(np.float64), known / 127.5 - 1
    logits = (x @ known.T - 0.5 * np.square(known).sum(1)) / np.square(sigma.astype(np.float64))[:, None]
    weights = np.exp(logits - logits.max(1, keepdims=True))
    return weights / weights.sum(1, keepdims=True) @ known


def peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def torch_worker(args: argparse.Namespace) -> None:
    """Answers every line on stdin with the seconds of one call and the peak memory of the process so far."""
    import torch

    x, sigma, known = problem(args.batch, args.references, args.side)
    x, sigma, known = torch.from_numpy(x), torch.from_numpy(sigma), torch.from_numpy(known / 127.5 - 1).float()
    before = peak_mb()

    def target() -> torch.Tensor:
        n, d = known.shape
        distance = torch.sum((x.unsqueeze(1) - known.unsqueeze(0)) ** 2, dim=2)
        logits = -distance / (2 * sigma.unsqueeze(1) ** 2)
        weights = torch.exp(logits - logits.max(dim=1, keepdim=True)[0])
        weights = weights / weights.sum(dim=1, keepdim=True)
        return torch.sum(weights.unsqueeze(2) * known.unsqueeze(0).repeat(len(x), 1, 1), dim=1)

    with torch.no_grad():
        np.save(args.worker, target().numpy())
        for _ in sys.stdin:
            began = time.perf_counter()
            target()
            print(time.perf_counter() - began, peak_mb() - before, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, value in (("batch", 32), ("references", 1024), ("side", 32), ("rounds", 5)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--torch", default=sys.executable, help="interpreter with PyTorch; empty = ours alone")
    parser.add_argument("--worker", default="", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return torch_worker(args)

    import jax

    from ogdm_jax.methods import stf

    arrays = [jax.device_put(a) for a in problem(args.batch, args.references, args.side)]
    ours = jax.jit(stf.stable_target).lower(*arrays).compile()
    result = np.asarray(ours(*arrays)[0])
    temporaries = ours.memory_analysis().temp_size_in_bytes / 1e6
    mine, theirs, memory = [], [], 0.0
    with tempfile.TemporaryDirectory() as folder:
        saved, worker = Path(folder) / "target.npy", None
        if args.torch:
            sizes = [f"--{n}={getattr(args, n)}" for n in ("batch", "references", "side")]
            command = [args.torch, __file__, *sizes, f"--worker={saved}"]
            worker = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for _ in range(args.rounds):
            if worker:
                print("go", file=worker.stdin, flush=True)
                answer = worker.stdout.readline().split()
                if not answer:
                    sys.exit(f"--torch: {args.torch} stopped; expected an interpreter with PyTorch and enough memory")
                theirs.append(float(answer[0]))
                memory = float(answer[1])
            began = time.perf_counter()
            jax.block_until_ready(ours(*arrays))
            mine.append(time.perf_counter() - began)
        if worker:
            worker.stdin.close()
            worker.wait()
            reference = np.load(saved)

    truth = exact(*problem(args.batch, args.references, args.side))
    print(f"{args.batch} queries, {args.references} references, {args.side}x{args.side}x3, {args.rounds} rounds")
    rows = [("ours", mine, temporaries, result)] + ([("PyTorch", theirs, memory, reference)] if theirs else [])
    for name, seconds, megabytes, target in rows:
        print(
            f"{name:8} median {np.median(seconds) * 1e3:9.2f} ms   fastest {min(seconds) * 1e3:9.2f} ms   "
            f"{megabytes:8.1f} MB   error against float64 {np.abs(target - truth).max():.1e}"
        )
    if theirs:
        ratio = np.median(np.array(theirs) / np.array(mine))
        print(f"PyTorch / ours: {ratio:.0f} times the time, {memory / temporaries:.0f} times the memory")


if __name__ == "__main__":
    main()
