"""Which data a compiled program sends between devices: read from the text of its HLO."""

import math
import re
from typing import Any

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
_OPERATION = re.compile(rf" = (\(.*?\)|\S+) ({'|'.join(KINDS)})(-start)?\(")
_ARRAY = re.compile(r"\b(pred|[a-z]+\d+[a-z0-9]*)\[([\d,]*)\]")
_BITS = re.compile(r"[a-z]+(\d+)")
_COMPUTATION = re.compile(r"^(?:ENTRY )?(%[\w.-]+) .*\{\n((?:.*\n)*?)\}", re.MULTILINE)
_CALLED = re.compile(r"\b(\w+)=\{?((?:%[\w.-]+(?:, )?)+)")
_LIMIT = re.compile(r" = s32\[\]\S* constant\((\d+)\)")


def collectives(hlo: str) -> dict[str, dict[str, int]]:
    """{kind: {"count": n, "bytes": b}}: operations of a program, and their results on one device.

    An operation on a tuple of arrays counts once, with the bytes of all of them, and one inside a
    loop as often as the loop runs. The asynchronous forms name their operand first and their result
    behind it (all-reduce: the result alone).
    """
    found: dict[str, dict[str, int]] = {}
    for text, times in _computations(hlo):
        for match in _OPERATION.finditer(text):
            shapes, kind, start = match.groups()
            entry = found.setdefault(kind, {"count": 0, "bytes": 0})
            entry["count"] += times
            entry["bytes"] += times * _bytes(shapes, halved=bool(start) and kind != "all-reduce")
    return found


def _computations(hlo: str) -> list[tuple[str, int]]:
    """(text, how often it runs) of a program's computations, of which callers stand last.

    A loop's rounds are the constant in its condition, as jax.lax.scan makes it.
    """
    texts = {match[1]: match[2] for match in _COMPUTATION.finditer(hlo)} or {"": hlo}
    times = dict.fromkeys(texts, 1)
    for name, text in reversed(texts.items()):
        for line in text.splitlines():
            calls = {key: called.split(", ") for key, called in _CALLED.findall(line)}
            limits = _LIMIT.findall(texts.get(calls.get("condition", [""])[0], ""))
            for called in (c for some in calls.values() for c in some if c in times):
                times[called] = times[name] * max(map(int, limits), default=1)
    return [(text, times[name]) for name, text in texts.items()]


def _bytes(shapes: str, halved: bool) -> int:
    arrays = _ARRAY.findall(shapes)
    if halved:  # (operands, results), and scalars that keep count
        arrays = [(kind, sides) for kind, sides in arrays if sides]
        arrays = arrays[len(arrays) // 2 :]
    return sum(_size(kind, sides) for kind, sides in arrays)


def _size(kind: str, sides: str) -> int:
    width = _BITS.match(kind)
    bits = int(width[1]) if width else 8  # pred has no number: a byte
    return math.prod(int(side) for side in filter(None, sides.split(","))) * bits // 8


def seconds(found: dict[str, dict[str, Any]], devices: int, link: float) -> float:
    """The seconds that these take at least, where each device sends `link` bytes a second.

    A ring sends 2 (n-1)/n of an all-reduce's bytes, (n-1)/n of what an all-gather makes, and (n-1)
    times what a reduce-scatter leaves.
    """
    share = (devices - 1) / devices
    factor = {"all-reduce": 2 * share, "reduce-scatter": devices - 1.0, "collective-permute": 1.0}
    return sum(entry["bytes"] * factor.get(kind, share) for kind, entry in found.items()) / link
