"""Everything worth knowing of one accelerator in one call, within a given time.

    python benchmarks/accelerator.py --minutes 9 --out DIR [--edm DIR] [--images FILE] [--only
        PARTS] [--rehearse]

Parts: exact (golden files, accumulation, resuming), train (steps beside EDM's code in PyTorch),
sampling, images (EDM and OGDM on real pictures), profile. What need not be timed, and every
compilation, runs side by side first; then one case after the other is timed alone. A case that
fails, is killed or overruns is one entry of the table, and the others go on; what had no time is
listed. --out gets PART.json as results come, images.png, log.txt, and at the end results.json with
the table. benchmarks/README.md says how to bring this to a machine without a network.
"""

import argparse
import fnmatch
import importlib
import json
import math
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from accelerator_parts import Case, Options, machine, pool, table  # noqa: E402

# Shares of --minutes, in the order of what happens: what one phase leaves goes to those after it.
# "prepare" compiles, and checks what is exact; "torch" has the cases of train and sampling that
# PyTorch runs.
SHARES = {
    "prepare": 0.34,
    "train": 0.15,
    "sampling": 0.07,
    "profile": 0.03,
    "torch": 0.21,
    "images": 0.20,
}
PARTS = {
    "exact": "exact",
    "train": "train",
    "sampling": "sampling",
    "images": "images",
    "profile": "profiling",
}
CLOSING = 4.0  # seconds kept for the table


class Clock:
    """What is left of the whole run and of each of its phases."""

    def __init__(self, minutes: float, phases: Sequence[str]):
        self._until = time.monotonic() + 60 * minutes - min(CLOSING, 6 * minutes)
        self._phases = list(phases)

    def left(self) -> float:
        return self._until - time.monotonic()

    def begin(self, phase: str) -> float:
        """time.monotonic() until which a phase may run: its share of what is left, all phases
        before it being over.
        """
        rest = self._phases[self._phases.index(phase) :]
        return time.monotonic() + max(self.left(), 0) * SHARES[phase] / sum(
            SHARES[name] for name in rest
        )


class Results:
    """Answers by part and case, each written to PART.json the moment it comes."""

    def __init__(self, out: Path):
        self.out, self.found, self.not_run = out, {}, {}
        self._lock = threading.Lock()

    def add(self, case: Case, answer: Mapping[str, Any]) -> None:
        with self._lock:
            self.found.setdefault(case.part, {})[case.name] = plain(answer)
            write(self.out / f"{case.part}.json", self.found[case.part])
        say(
            f"{case.part}.{case.name}: "
            f"{table.figures(case.part, case.name, answer, self.found) or answer}"
        )

    def skip(self, case: Case, why: str) -> None:
        self.not_run[f"{case.part}.{case.name}"] = why


def say(text: str) -> None:
    print(text[:300], file=sys.stderr, flush=True)


def plain(value: Any) -> Any:
    """The value as JSON has it: a number that is not finite becomes its name."""
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def write(path: Path, value: Any) -> None:
    new = path.with_suffix(".new")
    new.write_text(json.dumps(plain(value), indent=1, allow_nan=False) + "\n")
    new.replace(path)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--minutes", type=float, default=9.0, help="after this time the table is there"
    )
    parser.add_argument(
        "--out", required=True, help="folder for results; it is made where it is missing"
    )
    parser.add_argument(
        "--only",
        default="",
        help="PART or PART.CASE with commas between them; * stands for anything",
    )
    parser.add_argument(
        "--edm", default="", help="checkout of NVlabs/edm, which PyTorch's figures come from"
    )
    parser.add_argument("--torch-python", default=sys.executable, help="interpreter with PyTorch")
    parser.add_argument(
        "--images", default="", help=".npz of real pictures (`image` [N,H,W,3], `skin_tone` [N])"
    )
    parser.add_argument(
        "--rehearse", action="store_true", help="the same in tiny form, on whatever device there is"
    )
    parser.add_argument(
        "--lanes", type=int, default=0, help="compilations side by side; 0: by the number of cores"
    )
    args = parser.parse_args()
    for fits, text in (
        (
            0 < args.minutes < math.inf,
            f"--minutes: {args.minutes:g} given; expected a positive number",
        ),
        (args.lanes >= 0, f"--lanes: {args.lanes} given; expected at least 0"),
        (
            _edm(args.edm),
            f"--edm: {args.edm!r} has no training/networks.py; expected a checkout of NVlabs/edm",
        ),
        (
            _file(args.images),
            f"--images: {args.images!r} is no file; expected an .npz of uint8 pictures",
        ),
        (
            shutil.which(args.torch_python),
            f"--torch-python: {args.torch_python!r} cannot be run; expected a Python",
        ),
    ):
        if not fits:
            raise SystemExit(f"error: {text}")
    return args


def _edm(folder: str) -> bool:
    return not folder or (Path(folder) / "training" / "networks.py").is_file()


def _file(path: str) -> bool:
    return not path or Path(path).is_file()


def choose(options: Options, only: str) -> list[Case]:
    """The cases that --only names, in the order of the parts. Ends with one sentence where a word
    names none.
    """
    cases = [
        c
        for m in PARTS.values()
        for c in importlib.import_module(f"accelerator_parts.{m}").cases(options)
    ]
    words = [word.strip() for word in only.split(",") if word.strip()] or list(PARTS)
    patterns = [word if "." in word else f"{word}.*" for word in words]
    for word, pattern in zip(words, patterns):
        if not any(fnmatch.fnmatch(f"{case.part}.{case.name}", pattern) for case in cases):
            raise SystemExit(
                f"error: --only: {word!r} given; expected PART or PART.CASE, PART among "
                f"{', '.join(PARTS)}"
            )
    return [
        c
        for c in cases
        if any(fnmatch.fnmatch(f"{c.part}.{c.name}", pattern) for pattern in patterns)
    ]


class Runner:
    """The chosen cases, their processes and their clock."""

    def __init__(self, args: argparse.Namespace, scratch: Path, results: Results):
        self.args, self.scratch, self.results = args, scratch, results
        self.card = machine.card()
        golden = os.environ.get("OGDM_GOLDEN") or str(ROOT / "tests" / "golden")
        edm, images = (
            str(Path(path).resolve()) if path else "" for path in (args.edm, args.images)
        )
        memory = 0 if args.rehearse else self.card.get("memory_bytes", 0)
        self.options = Options(
            args.rehearse, str(scratch), str(results.out), edm, images, golden, memory
        )
        cores = (
            len(os.sched_getaffinity(0))
            if hasattr(os, "sched_getaffinity")
            else os.cpu_count() or 1
        )
        self.lanes = args.lanes or (1 if args.rehearse else max(1, min(6, cores // 2)))
        self.processes: list[pool.Process] = []
        chosen = choose(self.options, args.only)
        self.cases = [
            case for case in chosen if not case.needs or getattr(self.options, case.needs)
        ]
        for case in chosen:
            if case not in self.cases:
                results.skip(case, f"--{case.needs} was not given")
        timed = {case.phase for case in self.cases if case.timed}
        self.phases = [phase for phase in SHARES if phase in timed]
        self.clock = Clock(args.minutes, ["prepare", *self.phases])

    def process(self, side: str, share: float, flags: str = "") -> pool.Process:
        """A worker that may use this share of the device's memory."""
        env = dict(os.environ)
        python = self.args.torch_python if side == "torch" else sys.executable
        # packages there are of one interpreter
        inherited = env.get("PYTHONPATH") if python == sys.executable else None
        env["PYTHONPATH"] = os.pathsep.join(
            filter(None, [str(ROOT), str(ROOT / "benchmarks"), inherited])
        )
        # with it the memory of which algorithms are quick
        env["JAX_COMPILATION_CACHE_DIR"] = str(self.scratch / "xla")
        env.pop("XLA_CLIENT_MEM_FRACTION", None)  # another name of the next: both are refused
        env |= {
            "XLA_PYTHON_CLIENT_MEM_FRACTION": f"{share:.2f}",
            "TORCHINDUCTOR_CACHE_DIR": str(self.scratch / "torch"),
        }
        env["XLA_PYTHON_CLIENT_PREALLOCATE"] = "true" if share > 0.5 else "false"
        if self.args.rehearse:
            env.setdefault("JAX_PLATFORMS", "cpu")
            env["JAX_ENABLE_COMPILATION_CACHE"] = (
                "0"  # on a CPU, a program out of that cache cannot be written again
            )
            sys.path.append(str(ROOT / "tests"))
            # compiles far more than it computes
            flags = f"{flags} {importlib.import_module('tests.support.compiling').FLAGS}"
        env["XLA_FLAGS"] = f"{env.get('XLA_FLAGS', '')} {flags}".strip()
        made = pool.Process(python, env, self.scratch / f"log-{len(self.processes)}.txt")
        self.processes.append(made)
        return made

    def ask(
        self, process: pool.Process, case: Case, action: str, name: str, until: float, report=None
    ) -> dict:
        seconds = max(until - time.monotonic(), 0.1)
        options = Options(**self.options.to_dict() | {"seconds": seconds - 1.0})
        request = {
            "module": case.module,
            "action": action,
            "name": name,
            "options": options.to_dict(),
        }
        return process.ask(request, seconds, report or (lambda _: None))

    def look(self) -> dict[str, Any]:
        """Card, driver and versions. Ends with one sentence where there is no accelerator and
        nobody rehearses.
        """
        until, found = time.monotonic() + min(120, self.clock.left()), {}
        sides = sorted({case.side for case in self.cases} | {"jax"})

        def ask(process: pool.Process, side: str) -> None:
            found[side] = self.ask(
                process, Case("machine", side, "machine", side=side), "run", side, until
            )

        asking = [
            threading.Thread(target=ask, args=(self.process(side, 0.15), side)) for side in sides
        ]
        for thread in asking:
            thread.start()
        for thread in asking:
            thread.join()
        self.end_processes()
        if "error" in found["jax"]:
            raise SystemExit(f"error: JAX does not start here: {found['jax']['error']}")
        torch = found.get("torch", {})
        about = {
            **found["jax"],
            **self.card,
            **({"torch": torch["error"]} if "error" in torch else torch),
        }
        if about.get("platform") == "cpu" and not self.args.rehearse:
            raise SystemExit("error: JAX finds no accelerator here; expected one, or --rehearse")
        return about

    def prepare(self) -> None:
        """Compiles every program and runs every case that is not timed, side by side."""
        until = self.clock.begin("prepare")
        untimed = [case for case in self.cases if not case.timed]
        named = {name: case for case in reversed(self.cases) for name in case.programs}
        programs = [
            (case, name) for case in self.cases for name in case.programs if named[name] is case
        ]
        exact = (
            importlib.import_module("accelerator_parts.exact").ENV if not self.args.rehearse else ""
        )
        checking = min(2, self.lanes - 1) if untimed and programs else self.lanes * bool(untimed)
        share = min(0.15, 0.75 / self.lanes)

        # what has begun may finish: it would be begun again otherwise
        end = until + min(60.0, 0.2 * self.clock.left())

        def compile_one(process: pool.Process, job: tuple[Case, str]) -> None:
            answer = self.ask(process, job[0], "prepare", job[1], end)
            say(f"compiled {job[1]}: {answer.get('error') or answer.get('compile_s')}")

        def check_one(process: pool.Process, case: Case) -> None:
            self.results.add(case, self.ask(process, case, "run", case.name, end))

        compilers = [self.process("jax", share) for _ in range(max(self.lanes - checking, 1))]
        checkers = [self.process("jax", share, exact) for _ in range(checking or bool(untimed))]
        checks = threading.Thread(
            target=pool.side_by_side, args=(untimed, checkers, check_one, until), daemon=True
        )
        checks.start()
        if self.lanes == 1:
            checks.join()
        pool.side_by_side(programs, compilers, compile_one, until)
        checks.join()

    def measure(self) -> None:
        """Times the rest, one case after the other, one process on the device."""
        process, side = None, ""
        for phase in self.phases:
            until = self.clock.begin(phase)
            ours = [case for case in self.cases if case.timed and case.phase == phase]
            for case in sorted(ours, key=lambda case: case.rank):
                if until - time.monotonic() < (case.seconds if not self.args.rehearse else 1.0):
                    continue
                if case.side != side:
                    if process is not None:
                        process.close()
                    process, side = self.process(case.side, 0.92), case.side
                so_far: dict[str, Any] = {}
                answer = self.ask(process, case, "run", case.name, until, so_far.update)
                self.results.add(case, so_far | answer)
        if process is not None:
            process.close()

    def end_processes(self) -> None:
        for process in self.processes:
            process.end()

    def close(self) -> None:
        """Ends all processes and gathers what they said."""
        self.end_processes()
        logs = sorted(self.scratch.glob("log-*.txt"), key=lambda path: int(path.stem.split("-")[1]))
        text = "".join(
            f"==== {path.stem}\n{path.read_text(errors='replace')[-40_000:]}\n" for path in logs
        )
        (self.results.out / "log.txt").write_text(text)


def main() -> None:
    args, began = parse(), time.monotonic()
    out = Path(args.out).resolve()
    try:
        out.mkdir(parents=True, exist_ok=True)
        write(out / "results.json", {"finished": False})
    except OSError as error:
        raise SystemExit(
            f"error: --out: {args.out} cannot be written ({error.strerror}); expected a folder"
        ) from None
    # like Ctrl-C: the table of what is there is written
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    results, about, finished = Results(out), {}, False
    with tempfile.TemporaryDirectory(prefix="accelerator-", ignore_cleanup_errors=True) as scratch:
        runner = Runner(args, Path(scratch), results)
        try:
            about = runner.look()
            if about["platform"] == "tpu":  # whose chips one process alone may open
                runner.lanes = 1
            runner.prepare()
            runner.measure()
            finished = True
        except KeyboardInterrupt:
            raise SystemExit(130) from None
        finally:
            runner.close()
            for case in runner.cases:
                if (
                    case.name not in results.found.get(case.part, {})
                    and f"{case.part}.{case.name}" not in results.not_run
                ):
                    results.skip(case, "no time left" if finished else "the run was stopped")
            found = {part: results.found[part] for part in PARTS if part in results.found}
            rows = table.lines(found, results.not_run)
            taken = {
                "minutes": (time.monotonic() - began) / 60,
                "rehearsal": args.rehearse,
                "finished": finished,
            }
            more = {"ratios": table.ratios(found), "not_run": results.not_run, "table": rows}
            write(out / "results.json", taken | {"machine": about, "parts": found} | more)
            print(
                "\n".join(
                    [f"{about.get('card', 'no card')}; {json.dumps(plain(about))}", "", *rows]
                ),
                flush=True,
            )


if __name__ == "__main__":
    main()
