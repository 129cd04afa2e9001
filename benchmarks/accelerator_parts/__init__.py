"""The parts of benchmarks/accelerator.py.

A part is a module with `cases(options) -> list[Case]`. It is imported by the process that plans the
run, which starts neither JAX nor PyTorch: both are imported inside the functions that a worker
process calls.

    case.module.run(name, options, report) -> dict        measures; report(dict) hands over what
        is known so far
    case.module.prepare(name, options, report) -> dict    compiles program `name` and keeps it
        in options.scratch

Cases that are not timed, and all that has to be compiled, run side by side first. Then nothing else
touches the device while one case after the other is timed.
"""

import dataclasses
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent


@dataclasses.dataclass(frozen=True)
class Case:
    """One figure, or a few that belong together.

    Attributes:
      part, name: what --only calls it, PART.NAME.   module: of this package, which measures it.
      side: jax or torch, whose interpreter runs it.   timed: whether nothing else may run beside
        it.
      programs: names that the module's `prepare` compiles for it.   needs: an option without which
        it cannot run.
      seconds: it is not started with less time left.   rank: PyTorch's cases of all parts are timed
        in this order.
    """

    part: str
    name: str
    module: str
    side: str = "jax"
    timed: bool = True
    programs: tuple[str, ...] = ()
    needs: str = ""
    seconds: float = 5.0
    rank: int = 0

    @property
    def phase(self) -> str:
        """The share of the time that it is timed in. PyTorch's cases come together: two programs of
        a kind that takes all of a device's memory cannot wait for each other there, and starting
        one takes ten seconds.
        """
        return "torch" if self.side == "torch" else self.part


@dataclasses.dataclass(frozen=True)
class Options:
    """What a worker is told about the run; plain values, so that it travels as JSON.

    Attributes:
      rehearse: tiny sizes.   scratch, out: folders for what is thrown away and for results.
      edm: a checkout of NVlabs/edm, or "".   images: an .npz of colour images, or "".   golden:
        folder of golden files.
      memory: bytes that a program may need; 0 = unknown.   seconds: what this case may take.
    """

    rehearse: bool
    scratch: str
    out: str
    edm: str = ""
    images: str = ""
    golden: str = ""
    memory: int = 0
    seconds: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)
