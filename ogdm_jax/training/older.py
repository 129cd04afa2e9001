"""Checkpoints of before. A state once had, in place of one `carry`, two trees by method:
"companions" (a network with its optimiser) and "memory" (small numbers).
"""

from collections.abc import Mapping
from typing import Any

from ogdm_jax.typing import PyTree

_PARTS = ("companions", "memory")


def is_older(stored: Mapping[str, Any]) -> bool:
    """Whether the stored tree of a state (its names matter, not its leaves) is of that layout."""
    return any(part in stored for part in _PARTS)


def as_older(state: Mapping[str, PyTree], stored: Mapping[str, Any]) -> dict[str, PyTree]:
    """A state's tree, which has "carry", in the layout of the stored one: what is read into."""
    older = {name: tree for name, tree in state.items() if name != "carry"}
    carry = state["carry"]
    return older | {
        part: {name: carry[name] for name in stored.get(part) or {} if name in carry}
        for part in _PARTS
    }


def as_newer(state: Mapping[str, PyTree]) -> dict[str, PyTree]:
    """The tree that was read, with "carry" again."""
    newer = {name: tree for name, tree in state.items() if name not in _PARTS}
    return newer | {"carry": {name: tree for part in _PARTS for name, tree in state[part].items()}}
