"""What was measured, as tables for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .speed import Found
from .subjects import ALGORITHM_1, TORCH_QUANTIZE, TORCH_UNIFORM

HIVEMIND = {"NONE": 0.1060711, "FLOAT16": 0.0738440, "UNIFORM_8BIT": 0.1345637, "QUANTILE_8BIT": 0.2878164}
"""Seconds that hivemind's authors state for 10 million floats, there and back; see the README."""

HIVEMIND_ELEMENTS = 10_000_000

COMPARED = {
    "FLOAT16": ("fp16",),
    "UNIFORM_8BIT": ("uniform8", TORCH_UNIFORM, TORCH_QUANTIZE),
    "QUANTILE_8BIT": ("fastquant8", "sortquant8", ALGORITHM_1),
}
"""What does about the same as each of hivemind's codecs."""


def about(found: Found) -> str:
    """Date, machine, tensor and command of a speed run."""
    shape = " x ".join(map(str, found["shape"]))
    return (
        f"{found['date']}; {found['machine']}; Python {found['python']}, torch {found['torch']}; load average "
        f"{found['load']}. Float32 [{shape}], {found['kind']}; {found['repeats']} rounds. `{found['command']}`"
    )


def speed_tables(runs: Sequence[Found]) -> str:
    """Multiples of a copy side by side, one row a subject, and what a copy takes."""
    columns = [(found, regime) for found in runs for regime in found["speed"]]
    names = [f"{way}, {place(found, regime)}" for found, regime in columns for way in ("encode", "decode")]
    lines = [f"| | {' | '.join(names)} |", "|---|" + "--:|" * len(names)]
    for subject in dict.fromkeys(name for found in runs for name in found["wire"]):
        cells = [
            _multiple(found["speed"][regime]["subjects"].get(subject, {}).get(way))
            for found, regime in columns
            for way in ("encode", "decode")
        ]
        lines.append(f"| {subject} | {' | '.join(cells)} |")
    copies = ["| a copy takes, ms | to a new tensor | into a tensor at hand |", "|---|--:|--:|"]
    for found, regime in columns:
        speed = found["speed"][regime]
        times = " | ".join(f"{1000 * speed[key]:.3f}" for key in ("copy_s", "copy_into_s"))
        copies.append(f"| {place(found, regime)} | {times} |")
    failed = [
        f"{subject} fails on {found['machine']}: {why}."
        for found in runs
        for subject, why in found["failures"].items()
    ]
    return "\n".join([*lines, "", *copies, *([""] if failed else []), *failed])


def cost_tables(runs: Sequence[Found]) -> str:
    """Memory beside the result, wire and error, one row a subject; then the first uses."""
    names = [f"{way}, {device_name(found)}" for found in runs for way in ("encode", "decode")]
    lines = [f"| | wire | error | {' | '.join(names)} |", "|---|" + "--:|" * (2 + len(names))]
    for subject in dict.fromkeys(name for found in runs for name in found["wire"]):
        first = next(found for found in runs if subject in found["wire"])
        cells = [f"{first['wire'][subject]:.3f}", f"{first['error'][subject]:.4f}"]
        for found in runs:
            extra = found["memory"].get(subject)
            cells += ["", ""] if extra is None else [f"{extra[way]:.1%}" for way in ("encode", "decode")]
        lines.append(f"| {subject} | {' | '.join(cells)} |")
    uses = ["| first use, s | nothing compiled before | compiled by another process |", "|---|--:|--:|"]
    for found in runs:
        for codec, each in found["first_use"].items():
            uses.append(f"| {codec}, {device_name(found)} | {each['empty']:.2f} | {each['cached']:.2f} |")
    return "\n".join([*lines, "", *uses])


def target_lines(targets: Mapping[str, bool]) -> str:
    """One line a target: met or missed."""
    return "\n".join(f"- {'met' if met else '**missed**'}: {target}" for target, met in targets.items())


def hivemind_table(found: Found) -> str:
    """hivemind's published seconds beside a CPU run's, both there and back, an element and as multiples."""
    speed = found["speed"].get("recycled", next(iter(found["speed"].values())))
    elements = 1
    for size in found["shape"]:
        elements *= size
    published = {name: 1e9 * seconds / HIVEMIND_ELEMENTS for name, seconds in HIVEMIND.items()}
    lines = ["| | ns an element, there and back | of no compression |", "|---|--:|--:|"]
    lines += [f"| hivemind NONE, published | {published['NONE']:.1f} | 1.00 |"]
    copy = 1e9 * 2 * speed["copy_s"] / elements
    lines += [f"| two copies, here | {copy:.2f} | 1.00 |"]
    for name, subjects in COMPARED.items():
        lines.append(
            f"| hivemind {name}, published | {published[name]:.1f} | {published[name] / published['NONE']:.2f} |"
        )
        for subject in subjects:
            if subject in speed["subjects"]:
                both = sum(speed["subjects"][subject][way]["seconds"] for way in ("encode", "decode"))
                taken = 1e9 * both / elements
                lines.append(f"| {subject}, here | {taken:.2f} | {taken / copy:.2f} |")
    return "\n".join(lines)


def error_table(found: Mapping[str, Any]) -> str:
    """One row a codec, one column a kind of tensor; then bits an element."""
    kinds = list(found["shapes"])
    lines = [f"| codec | bits | {' | '.join(kinds)} |", "|---|--:|" + "--:|" * len(kinds)]
    rows: dict[str, dict[str, Any]] = {}
    for row in found["rows"]:
        rows.setdefault(row["codec"], {})[row["kind"]] = row
    for codec, by_kind in rows.items():
        bits = [row["bits"] for row in by_kind.values() if "bits" in row]
        spread = f"{min(bits):.2f}" if max(bits) - min(bits) < 0.005 else f"{min(bits):.2f} - {max(bits):.2f}"
        cells = [_error(by_kind[kind]) for kind in kinds]
        lines.append(f"| `{codec}` | {spread} | {' | '.join(cells)} |")
    return "\n".join(lines)


def error_about(found: Mapping[str, Any]) -> str:
    """Date, versions, data and command of an error run."""
    shapes = "; ".join(f"{kind} {shape}" for kind, shape in found["shapes"].items())
    return (
        f"{found['date']}; one CPU core, Python {found['python']}, torch {found['torch']}. Images: "
        f"{found['images']}, {found['steps']} steps of training before the recording. Shapes: {shapes}. "
        f"`{found['command']}`"
    )


def best_codecs(found: Mapping[str, Any], budgets: Sequence[float] = (2.1, 3.2, 4.1, 8.2)) -> str:
    """For each kind of tensor, the codec of least error within each budget of bits an element."""
    lines = [f"| | {' | '.join(f'at most {bits:g} bits' for bits in budgets)} |", "|---|" + "---|" * len(budgets)]
    for kind in found["shapes"]:
        rows = [row for row in found["rows"] if row["kind"] == kind and "bits" in row]
        cells = []
        for budget in budgets:
            best = min((row for row in rows if row["bits"] <= budget), key=lambda row: float(row["error"]))
            cells.append(f"`{best['codec']}` {_error(best)}")
        lines.append(f"| {kind} | {' | '.join(cells)} |")
    return "\n".join(lines)


def place(found: Found, regime: str) -> str:
    """The device, and the kind of memory where there are several."""
    return device_name(found) + (f", {regime} memory" if len(found["speed"]) > 1 else "")


def device_name(found: Found) -> str:
    """The device in a word or two."""
    return "CPU" if found["device"] == "cpu" else str(found["machine"]).removeprefix("NVIDIA ")


def _multiple(measured: Found | None) -> str:
    if measured is None:
        return "fails"
    low, middle, high = measured["multiple"]
    return f"{middle:.2f} ({low:.2f} - {high:.2f})"


def _error(row: Mapping[str, Any]) -> str:
    if "error" not in row:
        return "refused"
    value = float(row["error"])
    return f"{value:.4f}" if value < 1 else f"{value:.2f}"
