"""What was measured, as tables for people."""

from __future__ import annotations

from .speed import Found


def speed_table(found: Found) -> str:
    """One row a subject: multiples of a copy with their quartiles, by regime, then wire, error and memory."""
    names = list(found["speed"])
    lines = [_heading(names), "|---|" + "--:|" * (2 * len(names) + 4)]
    for subject in found["wire"]:
        cells = [
            _multiple(found["speed"][name]["subjects"][subject][way]["multiple"])
            for name in names
            for way in ("encode", "decode")
        ]
        extra = found["memory"][subject]
        cells += [f"{found['wire'][subject]:.3f}", f"{found['error'][subject]:.4f}"]
        cells += [f"{extra[way]:.1%}" for way in ("encode", "decode")]
        lines.append(f"| {subject} | {' | '.join(cells)} |")
    copies = [
        f"a copy to a new tensor takes {1000 * speed['copy_s']:.3f} ms{_in(name, names)}, "
        f"one into a tensor at hand {1000 * speed['copy_into_s']:.3f} ms"
        for name, speed in found["speed"].items()
    ]
    first = [
        f"First use of {codec}: {each['empty']:.2f} s, {each['cached']:.2f} s once compiled."
        for codec, each in found["first_use"].items()
    ]
    failed = [f"{subject} fails: {reason}." for subject, reason in found["failures"].items()]
    return "\n".join([about(found), "", *lines, "", f"{'; '.join(copies).capitalize()}.", *first, *failed])


def about(found: Found) -> str:
    """Date, machine, tensor and command."""
    shape = " x ".join(map(str, found["shape"]))
    return (
        f"{found['date']}; {found['machine']}; Python {found['python']}, torch {found['torch']}; load average "
        f"{found['load']}. Float32 [{shape}], {found['kind']}. `{found['command']}`"
    )


def _heading(names: list[str]) -> str:
    cells = [f"{way}{_in(name, names)}" for name in names for way in ("encode", "decode")]
    return f"| | {' | '.join([*cells, 'wire', 'error', 'extra, encode', 'extra, decode'])} |"


def _in(name: str, names: list[str]) -> str:
    return f", {name} memory" if len(names) > 1 else ""


def _multiple(quartiles: list[float]) -> str:
    low, middle, high = quartiles
    return f"{middle:.2f} ({low:.2f} - {high:.2f})"
