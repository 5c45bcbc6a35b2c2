"""The tables of the results."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from typing import Any


def report(results: Mapping[str, Any]) -> str:
    """Predicted beside measured for every plan, and the planner's choice beside the best that was measured."""
    lines = [
        "| model | link | plan | cut | chunks | predicted s | measured s | least - most | predicted / measured |",
        "|---|---|---|---|--:|--:|--:|--:|--:|",
    ]
    errors, choices = [], []
    for key, result in results.items():
        medians = {}
        for label, plan in result["plans"].items():
            seconds = plan["measured_s"]
            medians[label] = statistics.median(seconds)
            ratio = plan["predicted_s"] / medians[label]
            errors.append(abs(ratio - 1))
            codecs = " / ".join(dict.fromkeys((plan["compressor"], plan["gradient_compressor"])))
            name = label if label != "chosen" else f"chosen: {codecs}"
            cut = ", ".join(plan["cuts"]) or f"all on {plan['devices'][0]}"
            model, link = key.split(" ")
            lines.append(
                f"| {model} | {link} | {name} | {cut} | {plan['chunks']} | {plan['predicted_s']:.3f} | "
                f"{medians[label]:.3f} | {min(seconds):.3f} - {max(seconds):.3f} | {ratio:.2f} |"
            )
        choices.append(
            (key, medians["chosen"] / min(medians.values()), min(medians, key=lambda name: medians[name]))
        )
    if errors:
        median, worst = 100 * statistics.median(errors), 100 * max(errors)
        lines += [
            "",
            f"{len(errors)} plans: predicted within {median:.1f} % of measured (median), {worst:.0f} % at most.",
        ]
        lines += ["", "| | chosen / best measured | best |", "|---|--:|---|"]
        lines += [f"| {key} | {ratio:.2f} | {best} |" for key, ratio, best in choices]
    return "\n".join(lines)
