"""Finds the weights in what a file holds: at any depth, under any prefix, averaged ones first.

People keep weights in dictionaries, lists and objects, beside optimisers, averages and settings. A
`Part` is one set of tensors by name; its `entry` is the way to it, keys joined by dots, and a
prefix of names is a step of that way like any other.
"""

import dataclasses
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from ogdm_jax.interop import recognise
from ogdm_jax.interop.inert import Budget, Module, Odd, UnsafeFileError, quote
from ogdm_jax.interop.torch_globals import PARTIAL
from ogdm_jax.interop.torch_records import NumpyArray, Tensor

MAX_NAME = 512  # characters of a tensor's or module's name
MAX_ENTRIES = 50_000  # tensors of a part; modules and what they name
MAX_DEPTH = 64  # of modules in modules
_MAX_OBJECTS = 200_000  # dictionaries, lists and objects of a file
_MAX_STEPS = 10  # keys from the root to a part
_LISTED = 12  # parts or names that a message shows
# Where a checkpoint of several parts keeps the weights to use, the likeliest first.
PREFERRED = "ema ema_model params_ema state_dict model_state_dict model net network".split()
_AVERAGED = re.compile(r"emas?\d*|avg|averag\w*|swa|shadow|polyak")
_NO_WEIGHTS = re.compile(
    r"(^|_)(optim|optimi[sz]ers?|opts?|adamw?|exp_avgs?|exp_avg_sqs?|moments?|momentum(?=$|_buffer)|"
    r"grads?|gradients?|schedulers?|scaler|collected(_params)?|backup|callbacks|loops)(_|$)"
)
# wrappers that stand inside names
_WRAPPERS = re.compile(r"(^|(?<=\.))(_orig_mod|_(fsdp|checkpoint)_wrapped_module|_fpw_module)\.")
_PER_CHILD = 100  # bytes, about
_MOST_PARTS = 500  # that are looked at closely, those with the most tensors
_MOST_PREFIXES = 64  # of a part, with a known network under each
_SHARDS = ("ShardedTensor", "DTensor")
_GROUPS = ("_parameters", "_buffers", "_modules")  # attributes of an nn.Module
Leaf = Tensor | Odd


@dataclasses.dataclass(frozen=True)
class Part:
    """A set of tensors.

    Attributes:
      path: keys from the root, joined by dots; "": the root.
      prefix: of the names there under which the network lies; ends in a dot unless it is "".
      kind: of the network, one of recognise.KINDS; None: unknown.
      names: name without the prefix -> tensor.
      node: the object that has them.
      beside: names there that do not lie under the prefix, with all that they hold.
    """

    path: str
    prefix: str
    kind: str | None
    names: Mapping[str, Leaf]
    node: Any = None
    beside: tuple[str, ...] = ()

    @property
    def entry(self) -> str:
        """The way to it, which `choose` takes; "": the whole file."""
        return ".".join(filter(None, (self.path, self.prefix.rstrip("."))))

    @property
    def averaged(self) -> bool:
        """Whether a step of the way, or a count beside them, says that these are averages."""
        return "n_averaged" in self.beside or _says_averaged(self.entry)


def _spaced(words: str) -> str:
    """In small letters, netEma as net_ema."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", words).lower()


def _says_averaged(entry: str) -> bool:
    words = re.split(r"[^a-z0-9]+", _spaced(entry))
    online = _spaced(entry.rpartition(".")[2]).startswith("online")
    return any(map(_AVERAGED.fullmatch, words)) and not online


def choose(
    root: Any, budget: Budget, entry: str | None = None, kind: str | None = None
) -> tuple[Part, list[Part]]:
    """The part of a parsed file that holds the weights, and the parts that could be meant, too.

    Known networks come before unknown tensors, denoisers before other networks, averaged weights
    before others, then the names of PREFERRED. Parts of optimisers are never taken unless the entry
    names one.

    Args:
      root: what open_torch read.
      budget: of the file.
      entry: the way to the part; None finds it.
      kind: of the network that is wanted; None: any.

    Raises:
      UnsafeFileError: there is no such part, or several without an entry that chooses one.
    """
    parts = list(_parts(root, budget, everything=entry is not None))
    if len(parts) > _MOST_PARTS:  # of an optimiser under a name of its own
        least = sorted(len(part.names) for part in parts)[-_MOST_PARTS]
        parts = [p for p in parts if len(p.names) > least or _leads(p.path, entry)][:_MOST_PARTS]
    found = [candidate for part in parts for candidate in _candidates(part)]
    found, unmatched = _averages(found)
    if entry is not None:
        found = _below(found, parts, entry)
        if not found:
            there = _listing(root, list(_parts(root, budget)))
            raise UnsafeFileError(f"it has no part {quote(entry)} with tensors (there is: {there})")
    pool = _most_likely(found, kind)
    averaged = [part for part in pool if part.averaged]
    if unmatched and not averaged and entry is None:
        raise UnsafeFileError(
            f"its average {quote(unmatched[0])} is a list that does not fit the order of the "
            f"parameters; choose the weights as trained with entry=... (--entry): {_entries(pool)}"
        )
    pool = averaged or pool
    if not pool:
        raise UnsafeFileError(f"it holds no dictionary of tensors (there is: {_listing(root, [])})")
    ranks = [_rank(part) for part in pool]
    chosen = pool[ranks.index(min(ranks))]
    if ranks.count(min(ranks)) > 1 and not all(_same(part, chosen) for part in pool):
        raise UnsafeFileError(
            "it holds several parts with tensors, choose one with entry=... (--entry on a command "
            f"line; there is: {_entries(pool)})"
        )
    if chosen.kind is None and any(
        "flat_param" in name.rpartition(".")[2] for name in chosen.names
    ):
        raise UnsafeFileError(
            "its tensors are FSDP's flattened ones; save it with StateDictType.FULL_STATE_DICT"
        )
    return chosen, [part for part in found if part is not chosen and part.kind == chosen.kind]


def _leads(path: str, entry: str | None) -> bool:
    """Whether one of them is on the way to the other."""
    ways = f"{path}.", f"{entry}."
    return entry is not None and (ways[0].startswith(ways[1]) or ways[1].startswith(ways[0]))


def _same(part: Part, other: Part) -> bool:
    """Whether both are the same objects."""
    return part.names.keys() == other.names.keys() and all(
        leaf is other.names[name] for name, leaf in part.names.items()
    )


def _rank(part: Part) -> int:
    word = part.entry.rpartition(".")[2]
    return PREFERRED.index(word) if word in PREFERRED else len(PREFERRED)


def _most_likely(found: list[Part], kind: str | None) -> list[Part]:
    """Known networks of the wanted kind, else denoisers, else any, else the unknown tensors."""
    for kinds in ((kind,) if kind else (), recognise.DENOISERS, recognise.KINDS):
        if known := [part for part in found if part.kind in kinds]:
            return known
    ways = [(part, f"{part.path}." if part.path else "") for part in found]
    return [  # a few tensors beside a part with many are not the weights
        part
        for part, way in ways
        if not any(
            other.path.startswith(way) and len(other.names) >= 4 * len(part.names)
            for other in found
            if other.path != part.path
        )
    ]


def _entries(parts: Iterable[Part]) -> str:
    entries = [quote(part.entry) or "(all)" for part in parts]
    more = f", and {len(entries) - _LISTED} more" if len(entries) > _LISTED else ""
    return ", ".join(entries[:_LISTED]) + more


def _listing(root: Any, parts: list[Part]) -> str:
    if any(part.path for part in parts):
        return _entries(parts)
    if isinstance(root, dict):
        return ", ".join(quote(str(key)) for key in list(root)[:_LISTED]) or "an empty dictionary"
    return f"one {quote(root.name if isinstance(root, Module) else root)} without a name"


# the parts of a file


def _parts(root: Any, budget: Budget, everything: bool = False) -> Iterator[Part]:
    """Every set of tensors of an object, from the top down; shared ones once."""
    seen, tensors = set(), 0
    pending: list[tuple[str, Any, int]] = [("", root, 0)]
    while pending:
        path, node, depth = pending.pop()
        if id(node) in seen:
            continue
        seen.add(id(node))
        if len(seen) > _MAX_OBJECTS:
            raise UnsafeFileError(f"it holds more than {_MAX_OBJECTS} objects")
        names = dict(_leaves(node))
        tensors += len(names)
        if tensors > 4 * MAX_ENTRIES:
            raise UnsafeFileError(f"it names more than {4 * MAX_ENTRIES} tensors")
        budget.charge(sum(map(len, names)), "names unfold")
        if names:
            yield Part(path, "", None, names, node)
        if depth == _MAX_STEPS:
            continue
        below = []
        for key, value in _children(node):
            if everything or not _unwanted(key, value):
                budget.charge(len(path) + len(key) + _PER_CHILD)
                below.append((f"{path}.{key}" if path else key, value, depth + 1))
        pending.extend(reversed(below))


def _unwanted(key: str, value: Any) -> bool:
    """Whether this is an optimiser, its moments, or what else keeps tensors that are no weights."""
    keys = set(value) if isinstance(value, dict) and len(value) < MAX_NAME else set()
    return bool(_NO_WEIGHTS.search(_spaced(key))) or {"state", "param_groups"} <= keys


def _items(node: Any) -> Iterable[tuple[Any, Any]]:
    """What lies in an object, by key; of an nn.Module nothing but what it was made of."""
    if isinstance(node, dict):
        return node.items()
    if isinstance(node, list | tuple):
        return enumerate(node)
    if isinstance(node, Module):
        inside = () if _is_network(node) else node.state.items()
        return [*inside, *enumerate(node.items)]
    return enumerate(node.items) if isinstance(node, NumpyArray) else ()


def _children(node: Any) -> Iterator[tuple[str, Any]]:
    """The containers in a container, by key."""
    for key, value in _items(node):
        holds = isinstance(value, dict | list | tuple | Module | NumpyArray)
        if holds and isinstance(key, str | int):
            yield str(key)[:MAX_NAME], value


def _leaves(node: Any) -> Iterator[tuple[str, Leaf]]:
    """(name, tensor) of the tensors that lie in an object itself."""
    if isinstance(node, Module) and _is_network(node):
        yield from _module_leaves(node)
        return
    for name, value in _items(node):
        if (leaf := _leaf(value)) is None:
            continue
        if not isinstance(name, str | int) or (isinstance(name, str) and len(name) > MAX_NAME):
            raise UnsafeFileError(
                f"a tensor is named by a {quote(name)}, no text of {MAX_NAME} letters"
            )
        yield str(name), leaf


def _leaf(value: Any) -> Leaf | None:
    """The tensor that a value is."""
    if isinstance(value, Module) and value.name in _SHARDS:
        return Odd(PARTIAL.format(value.name))
    value = value.value if isinstance(value, NumpyArray) else value
    return value if isinstance(value, Leaf) else None


def _is_network(node: Module) -> bool:
    return any(node.state.get(group) for group in _GROUPS)


def _module_leaves(part: Module) -> Iterator[tuple[str, Leaf]]:
    """In the order of PyTorch's state_dict: parameters, buffers that persist, then the children."""
    seen = 0  # modules and what they name: shared ones count each time, as their tensors would
    pending: list[tuple[str, str, Any, int]] = [("", "", part, 0)]
    while pending:
        parent, own, module, depth = pending.pop()
        prefix = f"{parent}{own}." if depth else ""
        groups = {group: _named(module, group, MAX_NAME - len(prefix)) for group in _GROUPS}
        seen += 1 + sum(map(len, groups.values()))
        if seen > MAX_ENTRIES or depth > MAX_DEPTH:
            raise UnsafeFileError(
                f"its modules are nested too deeply or in a circle, or more than {MAX_ENTRIES}"
            )
        skipped = module.state.get("_non_persistent_buffers_set")
        skipped = skipped if isinstance(skipped, set) else ()
        buffers = {n: value for n, value in groups["_buffers"].items() if n not in skipped}
        for name, value in [*groups["_parameters"].items(), *buffers.items()]:
            if (leaf := _leaf(value)) is not None:
                yield f"{prefix}{name}", leaf
        children = [(prefix, name, c, depth + 1) for name, c in groups["_modules"].items()]
        pending.extend(child for child in reversed(children) if isinstance(child[2], Module))


def _named(module: Module, group: str, longest: int) -> dict[str, Any]:
    """A group of a module's attributes, by names of at most so many characters."""
    items = module.state.get(group, {})
    plain = isinstance(items, dict) and all(
        isinstance(name, str) and len(name) <= longest for name in items
    )
    if not plain:
        raise UnsafeFileError(
            f"the {group} of {quote(module.name)} are not a dictionary by name of at most "
            f"{MAX_NAME} letters"
        )
    return items


# the networks of a part


def _candidates(part: Part) -> Iterator[Part]:
    """The part once for each place where a known network lies in it; as it is where none does."""
    names = {_WRAPPERS.sub("", name): leaf for name, leaf in part.names.items()}
    names = names if len(names) == len(part.names) else dict(part.names)
    places = recognise.places(names)
    if not places:
        yield dataclasses.replace(part, names=names)
    if len(places) > _MOST_PREFIXES:
        raise UnsafeFileError(f"known networks lie under {len(places)} prefixes of its names")
    for prefix, kind in places:
        inner = (
            f"{prefix}model." if any(n.startswith(f"{prefix}model.enc.") for n in names) else prefix
        )
        own = {
            name.removeprefix(prefix): leaf
            for name, leaf in names.items()
            if name.startswith(inner) or name == f"{prefix}u"
        }
        elsewhere = tuple(p for p, _ in places if p and p != prefix)
        outside = tuple(
            name
            for name in names
            if name.removeprefix(prefix) not in own and not name.startswith(elsewhere)
        )
        yield Part(part.path, prefix, kind, own, _inside(part.node, prefix), outside)
        yield from _without_dots(part, names, prefix, kind, own)


def _inside(node: Any, prefix: str) -> Any:
    """The module in a module to which a prefix of names belongs."""
    for step in prefix.split(".")[:-1]:
        children = node.state.get("_modules") if isinstance(node, Module) else None
        node = children.get(step, node) if isinstance(children, dict) else node
    return node


def _without_dots(
    part: Part, names: Mapping[str, Leaf], prefix: str, kind: str, own: Mapping[str, Leaf]
) -> Iterator[Part]:
    """Averages that keep a.b.weight as model_ema.abweight (LitEma); buffers are the network's."""
    firsts = {name.partition(".")[0] for name in names if name.count(".") == 1}
    for first in sorted(filter(_says_averaged, firsts))[:_MOST_PREFIXES]:
        for depth in range(prefix.count(".") + 1):
            whole = ".".join(prefix.split(".")[depth:])
            theirs = {name: f"{first}.{(whole + name).replace('.', '')}" for name in own}
            if sum(name in names for name in theirs.values()) * 2 > len(own):
                mixed = {name: names.get(theirs[name], leaf) for name, leaf in own.items()}
                yield Part(part.path, f"{first}.", kind, mixed, part.node)
                break


def _averages(found: list[Part]) -> tuple[list[Part], list[str]]:
    """Completes averages: lists get the names of parameters in their order, and all get buffers.

    Returns:
      The parts, and the entries of lists that fit no part.
    """
    trained = [part for part in found if not part.averaged and not isinstance(part.node, list)]
    done, unmatched = [], []
    for part in found:
        if not part.averaged:
            done.append(part)
        elif isinstance(part.node, list | tuple):
            fitting = [t for t in trained if _shapes(_parameters(t.names)) == _shapes(part.names)]
            unmatched += [] if fitting else [part.entry]
            for like in fitting[:1]:
                own = dict(zip(_parameters(like.names), part.names.values(), strict=True))
                names = {name: own.get(name, leaf) for name, leaf in like.names.items()}
                done.append(dataclasses.replace(part, kind=like.kind, names=names))
        else:
            same = [t.names for t in trained if t.kind == part.kind and part.kind]
            left = {n: leaf for n, leaf in same[0].items() if n not in part.names} if same else {}
            names = {**part.names, **left} if left and not _parameters(left) else part.names
            done.append(dataclasses.replace(part, names=names))
    return done, unmatched


def _parameters(names: Mapping[str, Leaf]) -> dict[str, Leaf]:
    return {name: leaf for name, leaf in names.items() if not recognise.is_buffer(name)}


def _shapes(names: Mapping[str, Leaf]) -> list[Any]:
    return [getattr(leaf, "shape", None) for leaf in names.values()]


def _below(found: list[Part], parts: list[Part], entry: str) -> list[Part]:
    """The parts that an entry names: itself, those in it, or its names of a larger part."""
    exact = [part for part in found if part.entry == entry]
    inside = [part for part in found if f"{part.entry}.".startswith(f"{entry}.") or not entry]
    if exact or inside:
        return exact or inside
    for part in parts:
        way = f"{part.path}." if part.path else ""
        if entry.startswith(way):
            rest = f"{entry.removeprefix(way)}."
            cut = {n.removeprefix(rest): v for n, v in part.names.items() if n.startswith(rest)}
            if cut:
                node = _inside(part.node, rest)
                return list(_candidates(Part(entry, "", None, cut, node)))
    return []
