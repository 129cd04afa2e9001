"""The run as one table: a row for each case, and the ratios that say how good the figures are."""

from collections.abc import Mapping
from typing import Any

Cases = Mapping[str, Mapping[str, Any]]
PLAIN = "plain-bfloat16"
DEFAULT, COMPILED = "torch-eager-float32", "torch-compile-autocast"


def lines(results: Mapping[str, Cases], not_run: Mapping[str, str]) -> list[str]:
    """Markdown of {part: {case: answer}} and {"part.case": why not}."""
    rows = [("part", "case", "figures"), ("---", "---", "---")]
    for part, found in results.items():
        shown = (
            _exact(found)
            if part == "exact"
            else [(n, figures(part, n, v, results)) for n, v in found.items()]
        )
        rows += [(part, name, text) for name, text in shown]
    rows += [("ratio", name, f"{value:.2f}") for name, value in ratios(results).items()]
    rows += [(*name.split(".", 1), f"not run: {why}") for name, why in not_run.items()]
    return [f"| {' | '.join(text.replace('|', '/') for text in row)} |" for row in rows]


def ratios(results: Mapping[str, Cases]) -> dict[str, float]:
    """Times of the same work, always so that more is better for ours; only of what was measured."""
    train, sampling = results.get("train", {}), results.get("sampling", {})
    found = {}
    for kind in ("bfloat16", "float32"):
        ours = _speed(train.get(f"plain-{kind}"))
        rivals = [
            n for n in train if n.startswith("torch-") and "adm64" not in n and "product" not in n
        ]
        rivals = [n for n in rivals if kind == "bfloat16" or n.endswith("float32")]
        _add(
            found,
            f"train: ours {kind} / PyTorch's default (eager float32)",
            ours,
            _speed(train.get(DEFAULT)),
        )
        _add_best(found, f"train: ours {kind} / PyTorch's best", ours, train, rivals)
        ours = _speed(sampling.get(f"heun-{kind}"))
        rivals = [
            n
            for n in sampling
            if n.startswith("torch-") and (kind == "bfloat16" or n.endswith("float32"))
        ]
        _add(
            found,
            f"Heun: ours {kind} / PyTorch float32",
            ours,
            _speed(sampling.get("torch-heun-float32")),
        )
        _add_best(found, f"Heun: ours {kind} / PyTorch's best", ours, sampling, rivals)
    plain, product = train.get(PLAIN, {}), train.get("product", {})
    _add(
        found,
        "train: share of the bfloat16 product's rate",
        plain.get("tflop_per_second"),
        _rate(product),
    )
    _add_best(
        found,
        "ADM 64: ours / PyTorch",
        _speed(train.get("adm64-bfloat16")),
        train,
        ["torch-adm64-autocast"],
    )
    for name in ("ogdm-euler", "ogdm-heun", "stf-full", "sp"):
        _add(
            found,
            f"time of the step: {name} / plain",
            train.get(name, {}).get("ms"),
            plain.get("ms"),
        )
    guided = {n: sampling.get(f"ddim-{n}", {}).get("ms") for n in ("unguided", "dps", "dsg")}
    _add(found, "time: DPS / unguided", guided["dps"], guided["unguided"])
    _add(found, "time: DSG / unguided", guided["dsg"], guided["unguided"])
    _add(found, "time: DSG / DPS", guided["dsg"], guided["dps"])
    return found


def _add(found: dict[str, float], name: str, over: float | None, under: float | None) -> None:
    if over and under:
        found[name] = over / under


def _add_best(
    found: dict[str, float], name: str, ours: float | None, cases: Cases, rivals: list[str]
) -> None:
    measured = {n: speed for n in rivals if (speed := _speed(cases.get(n)))}
    if measured:
        best = max(measured, key=measured.get)
        _add(found, f"{name} ({best.removeprefix('torch-')})", ours, measured[best])


def _speed(answer: Mapping[str, Any] | None) -> float | None:
    return (answer or {}).get("images_per_second")


def _rate(answer: Mapping[str, Any]) -> float | None:
    return answer.get("bfloat16_tflop_per_second")


def _exact(found: Cases) -> list[tuple[str, str]]:
    """One line for what passed, one for each case that did not."""
    passed = [name for name, answer in found.items() if answer.get("passed")]
    rows = [(f"{len(passed)} of {len(found)} passed", ", ".join(passed))]
    told = lambda a: (
        a.get("error") or a.get("why") or str({k: v for k, v in a.items() if k != "passed"})
    )
    return rows + [(name, f"FAILED: {told(a)}") for name, a in found.items() if not a.get("passed")]


def figures(part: str, name: str, answer: Mapping[str, Any], results: Mapping[str, Cases]) -> str:
    text = []
    if "images_per_second" in answer and "ms" in answer:
        text.append(
            f"{answer['images_per_second']:,.0f} images/s, {answer['ms']:.1f} ms of "
            f"{answer['batch']}"
        )
        rate = answer.get("tflop_per_second") or _torch_rate(part, name, answer, results)
        text += [f"{rate:.1f} TFLOP/s"] if rate else []
        peak = answer.get("peak_bytes") or answer.get("memory_bytes")
        text += [f"{peak / 2**30:.1f} GiB"] if peak else []
        text += [f"in {answer['accumulate']} rounds"] if answer.get("accumulate", 1) > 1 else []
        text += (
            [f"traced {answer['trace_s']:.0f} s, compiled {answer['compile_s']:.0f} s"]
            if "trace_s" in answer
            else []
        )
        text += [] if "trace_s" in answer else [f"first call {answer['first_ms'] / 1000:.0f} s"]
        text += [] if answer.get("finite", True) else ["NOT FINITE"]
    for kind in ("bfloat16", "float32"):
        if f"{kind}_tflop_per_second" in answer:
            text.append(
                f"{kind} {answer[f'{kind}_tflop_per_second']:.1f} TFLOP/s at {answer['size']}^3"
            )
    if "images_seen" in answer:
        speed = ", ".join(f"{m} {v:,.0f}" for m, v in answer["images_per_second"].items())
        text.append(
            f"{answer['steps']} steps, {answer['images_seen']:,} images each; images/s {speed}"
        )
    for cell in answer.get("cells", ()):
        text.append(
            f"{cell['method']} {cell['solver']} {cell['nfe']}: {cell['fd']:.1f} (floor "
            f"{cell['floor']:.1f})"
        )
    if "kinds" in answer:
        text.append(f"{answer['device_ms'] / answer['steps']:.1f} ms of device time a step")
        text += [f"{row['name']} {100 * row['share']:.1f} %" for row in answer["kinds"]]
    text += [f"FAILED: {answer['error']}"] if "error" in answer else []
    return "; ".join(text)


def _torch_rate(
    part: str, name: str, answer: Mapping[str, Any], results: Mapping[str, Cases]
) -> float | None:
    """PyTorch's rate by the operations of our own step: the same network, counted once."""
    ours = results.get(part, {}).get("adm64-bfloat16" if "adm64" in name else PLAIN, {})
    if part != "train" or not ours.get("tflop"):
        return None
    return ours["tflop"] / ours["batch"] * answer["images_per_second"]
