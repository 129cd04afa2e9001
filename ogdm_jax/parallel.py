"""Plans: one pure step over one device, many devices, or many processes.

    mesh     jax.jit over a mesh; state replicated, batch divided; the compiler inserts the
             collectives. The default.
    sharded  the same with parameters, moving average, optimiser state and the weights of frozen
             networks divided over the devices as well.
    pmap     jax.pmap over an axis "data"; state replicated, batch divided; gradients averaged
             inside the step.

All three compute what one device computes on the whole batch, to float tolerance.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ogdm_jax import platforms
from ogdm_jax.config import require
from ogdm_jax.typing import PyTree

AXIS = "data"
PLANS = ("mesh", "sharded", "pmap")


@dataclasses.dataclass(frozen=True)
class Plan:
    """Where arrays live and how the step is compiled. Made by make_plan.

    Attributes:
      kind: one of PLANS.
      devices: all devices of the run, over every process.
      processes: the number of processes.
    """

    kind: str
    devices: tuple[Any, ...]
    processes: int

    @property
    def axis(self) -> str | None:
        """The mapped axis that the step sees; None where arrays are global."""
        return AXIS if self.kind == "pmap" else None

    @property
    def platform(self) -> str:
        """What programs are compiled for, "cpu", "gpu" or "tpu"; the host may have none of it."""
        return self.devices[0].platform

    @property
    def ravel(self) -> bool:
        """Between processes one long vector is averaged many times faster than a tree of leaves."""
        return self.kind == "pmap" and self.processes > 1

    @property
    def local_devices(self) -> list[Any]:
        """The run's devices that belong to this process."""
        mine = jax.process_index()
        return [d for d in self.devices if d.process_index == mine]

    @property
    def mesh(self) -> Mesh:
        """All devices in one row, the axis AXIS. Of the plan sharded an axis for each prime factor
        of their number, so that an array none of whose sides they divide is divided along several.
        """
        factors = _primes(len(self.devices)) if self.kind == "sharded" else []
        names = [f"{AXIS}{i}" for i in range(len(factors))]
        return Mesh(np.asarray(self.devices).reshape(factors or -1), names or (AXIS,))

    def sharding(self, *spec: str | None) -> NamedSharding:
        """An array's place, one entry an axis: AXIS divides it, None (or no entry) does not."""
        mesh = self.mesh
        return NamedSharding(mesh, PartitionSpec(*(name and mesh.axis_names for name in spec)))

    def state_shardings(self, state: PyTree) -> PyTree:
        """Where each leaf of a state (arrays or shapes) lives between steps and in checkpoints."""
        if self.kind != "sharded":
            whole = self.sharding()
            return jax.tree.map(lambda _: whole, state)
        mesh = self.mesh
        place = lambda leaf: NamedSharding(mesh, PartitionSpec(*_divide(leaf.shape, mesh.shape)))
        return jax.tree.map(place, state)

    def state_bytes(self, state: PyTree) -> int:
        """Bytes of a state (arrays or shapes) that each device holds."""
        leaves = zip(jax.tree.leaves(state), jax.tree.leaves(self.state_shardings(state)))
        return sum(
            math.prod(at.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf, at in leaves
        )

    def gather(self, tree: PyTree) -> PyTree:
        """Inside the step: parameters, whole on every device while a network uses them.

        Without it the compiler divides the convolutions as their kernels are divided, and sends
        activations between devices.
        """
        if self.kind != "sharded":
            return tree
        return jax.lax.with_sharding_constraint(tree, self.sharding())

    def scatter(self, tree: PyTree) -> PyTree:
        """Inside the step: gradients, of which each device keeps its share of the sum.

        They are gathered first: otherwise the compiler divides the convolutions that make them, as
        it does without `gather`.
        """
        if self.kind != "sharded":
            return tree
        return jax.lax.with_sharding_constraint(self.gather(tree), self.state_shardings(tree))

    def shapes(self, state: PyTree) -> PyTree:
        """The shapes of a state, each with its place: what a checkpoint is read into."""
        place = lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)
        return jax.tree.map(place, state, self.state_shardings(state))

    def init(self, create: Callable[..., PyTree], *args: PyTree) -> PyTree:
        """Runs create(*args) compiled, each leaf made where it will live; the memory of arguments
        behind the first becomes the result's. create: of `platforms.traced_for`.
        """
        shardings = self.state_shardings(jax.eval_shape(create, *args))
        lowered = jax.jit(
            create,
            out_shardings=shardings,
            donate_argnums=tuple(range(1, len(args))),
        ).lower(*args)
        # It runs once: on a CPU, LLVM's passes over a hundred random draws would cost five times
        # what they save.
        quick: dict[str, Any] | None = None
        if self.platform == "cpu":
            quick = {"xla_backend_optimization_level": 0}
        return lowered.compile(compiler_options=quick)(*args)

    def place(self, tree: PyTree, *spec: str | None) -> PyTree:
        """Puts a host tree that every process holds in full on all devices; spec: of `sharding`."""
        sharding = self.sharding(*spec)
        return jax.tree.map(lambda leaf: _put(leaf, sharding), tree)

    def place_state(self, tree: PyTree) -> PyTree:
        """The same, with every leaf where it would live in a state."""
        return jax.tree.map(_put, tree, self.state_shardings(tree))

    def place_rows(self, tree: PyTree) -> PyTree:
        """Divides arrays of rows, which every process holds in full, over the devices."""
        if self.kind != "pmap":
            return self.place(tree, AXIS)
        share = lambda leaf: np.split(np.asarray(leaf), self.processes)[jax.process_index()]
        return self._per_device(jax.tree.map(share, tree))

    def place_batch(self, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
        """Puts this process's rows of a batch on its devices; pmap's have a device axis first."""
        if self.kind == "pmap":
            return self._per_device(batch)
        sharding = self.sharding(AXIS)
        place = lambda rows: jax.make_array_from_process_local_data(sharding, rows)
        return jax.tree.map(place, batch)

    def row_shapes(self, tree: PyTree) -> PyTree:
        """Shapes of what place_rows and place_batch make of the rows of all processes.

        tree: arrays of rows, or their shapes.
        """
        local = len(self.local_devices)
        cut = lambda rows: (local, rows // len(self.devices)) if self.kind == "pmap" else (rows,)
        shape = lambda leaf: (*cut(leaf.shape[0]), *leaf.shape[1:])
        return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(shape(leaf), leaf.dtype), tree)

    def compile(self, step: Callable, state: PyTree) -> Callable:
        """The compiled step(state, constants, batch, key); the state given to it is donated."""
        step = platforms.traced_for(self.platform, step)
        if self.kind == "pmap":
            return jax.pmap(
                step,
                axis_name=AXIS,
                in_axes=(None, {"whole": None, "divided": 0, "weights": None}, 0, None),
                out_axes=(None, None),
                donate_argnums=0,
                devices=self.devices,
            )
        shardings = self.state_shardings(state)
        replicated = self.sharding()
        # of weights, which lie as `place_state` and `shapes` say
        constants = {"whole": replicated, "divided": self.sharding(AXIS), "weights": None}
        return jax.jit(
            step,
            in_shardings=(shardings, constants, self.sharding(AXIS), replicated),
            out_shardings=(shardings, replicated),
            donate_argnums=0,
        )

    def globalise(self, state: PyTree) -> PyTree:
        """A state as global arrays, which checkpoints need.

        pmap over several processes returns arrays of this host alone.
        """
        return self.place(state) if self.ravel else state

    def local_copy(self, tree: PyTree) -> PyTree:
        """The whole tree on this process's first device. Every process of the run must call it."""
        if self.kind == "sharded":
            tree = _gathering(self.sharding())(tree)
        return jax.tree.map(lambda leaf: leaf.addressable_data(0), tree)

    def _per_device(self, tree: PyTree) -> PyTree:
        """Rows [n, ...] of this process as [devices, n / devices, ...], one block on each."""
        local = self.local_devices
        sharding = NamedSharding(Mesh(np.asarray(local), (AXIS,)), PartitionSpec(AXIS))
        split = lambda v: v.reshape(len(local), v.shape[0] // len(local), *v.shape[1:])
        return jax.tree.map(lambda v: jax.device_put(split(v), sharding), tree)


@functools.cache
def _gathering(whole: NamedSharding) -> Callable[[PyTree], PyTree]:
    """One function for every call, so that it is compiled once for a tree."""
    return jax.jit(lambda tree: tree, out_shardings=whole)


def make_plan(kind: str, devices: int = 0) -> Plan:
    """The plan of a run on this machine or pod.

    Args:
      kind: one of PLANS.
      devices: how many devices to use; 0 = all.

    Raises:
      ConfigError: unknown kind, or more devices wanted than there are.
    """
    found = jax.devices()
    require(
        0 <= devices <= len(found),
        "parallel.devices",
        devices,
        f"at most the {len(found)} devices found (0 = all)",
    )
    require(
        devices in (0, len(found)) or jax.process_count() == 1,
        "parallel.devices",
        devices,
        "0 with several processes",
    )
    return plan_of(kind, found[: devices or len(found)])


def plan_of(kind: str, devices: Sequence[Any]) -> Plan:
    """The plan of a run on devices that need not be here, to compile for them.

    Raises:
      ConfigError: unknown kind.
    """
    require(kind in PLANS, "parallel.plan", kind, f"one of {', '.join(PLANS)}")
    return Plan(
        kind=kind, devices=tuple(devices), processes=len({d.process_index for d in devices})
    )


def check_batch(batch: int, accumulate: int, devices: int) -> int:
    """Images per device and round. Raises ConfigError where they do not come out even."""
    require(batch > 0, "data.batch", batch, "a positive number of images")
    require(accumulate > 0, "optim.accumulate", accumulate, "a positive number of rounds")
    require(
        batch % (devices * accumulate) == 0,
        "data.batch",
        batch,
        f"a multiple of {devices} devices x {accumulate} accumulation rounds (optim.accumulate)",
    )
    return batch // (devices * accumulate)


def _put(leaf: Any, sharding: NamedSharding) -> jax.Array:
    value = np.asarray(leaf)
    return jax.make_array_from_callback(value.shape, sharding, lambda index: value[index])


def _primes(n: int) -> list[int]:
    """The prime factors of n, smallest first."""
    least = next((p for p in range(2, math.isqrt(n) + 1) if n % p == 0), n)
    return [least, *_primes(n // least)] if n > 1 else []


def _divide(shape: tuple[int, ...], factors: Mapping[str, int]) -> list[tuple[str, ...]]:
    """For each axis of an array the factors, by name, of the number of devices that divide it:
    first the axis that takes the most of them, of equal ones the longest. Small arrays stay whole.
    """
    spec: list[tuple[str, ...]] = [()] * len(shape)
    if math.prod(shape) < 1024:
        return spec
    left = dict(factors)
    while left:
        found = [_taken(side, left) if not names else () for side, names in zip(shape, spec)]
        parts = [math.prod(left[name] for name in names) for names in found]
        best = max(range(len(shape)), key=lambda i: (parts[i], shape[i]))
        if not found[best]:
            break
        spec[best] = found[best]
        left = {name: factor for name, factor in left.items() if name not in found[best]}
    return spec


def _taken(side: int, factors: Mapping[str, int]) -> tuple[str, ...]:
    """As many of the factors as divide a side together."""
    names: tuple[str, ...] = ()
    for name, factor in factors.items():
        if side % factor == 0:
            side, names = side // factor, (*names, name)
    return names
