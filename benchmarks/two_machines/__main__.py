"""The command line: `python -m benchmarks.two_machines` (as root: it makes network namespaces)."""

from __future__ import annotations

import datetime
import json
import re
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.machine import machine

from .contest import WARM_UP, Contender, Row, contest

HERE = Path(__file__).parent
README = HERE / "README.md"
RESULTS = HERE / "results.json"
PEER = Contender(None, 4)
PAYLOAD_SHARE = 1448 / 1514
"""Of a full Ethernet frame. The shaper counts the headers of every segment, the interface those of merged ones."""
CONTENDERS: Mapping[str, Sequence[Contender]] = {
    "unshaped": (
        PEER,
        *(Contender("none", chunks) for chunks in (1, 4, 8)),
        *(Contender("sortquant8", chunks) for chunks in (1, 4, 8)),
    ),
    "200mbit": (PEER, *(Contender("sortquant8", chunks) for chunks in (1, 4, 8))),
    "50mbit": (
        PEER,
        *(Contender("sortquant8", chunks) for chunks in (1, 4, 8, 16)),
        *(Contender("sortquant4", chunks) for chunks in (1, 4, 8, 16)),
    ),
}


def main(
    link: Annotated[
        list[str] | None, typer.Option(help=f"Some of {', '.join(CONTENDERS)}; all if not given.")
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Counted steps of each contender.")] = 5,
    update: Annotated[bool, typer.Option("--update", help="Put what was found into the README here.")] = False,
) -> None:
    """Measure training steps over a link between two hosts, fxsplit and its peer in turns."""
    results: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for name in link or list(CONTENDERS):
        if name not in CONTENDERS:
            raise typer.BadParameter(f"{name}: none of {', '.join(CONTENDERS)}", param_hint="--link")
        found = contest(None if name == "unshaped" else name, CONTENDERS[name], rounds)
        results[name] = {
            "date": datetime.date.today().isoformat(),
            "machine": machine("torchvision"),
            "rounds": rounds,
            "rows": [summary(name, contender, rows, found[PEER]) for contender, rows in found.items()],
        }
        print(table(name, results[name]))
    if update:
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")
        text = "\n".join(table(name, results[name]) for name in CONTENDERS if name in results)
        marked = re.sub(r"(?s)(<!-- results -->\n).*(<!-- end -->)", rf"\1{text}\n\2", README.read_text())
        README.write_text(marked)


def summary(link: str, contender: Contender, rows: Sequence[Row], peer: Sequence[Row]) -> dict[str, Any]:
    """What the table says of a contender."""
    steps = [row["step_s"] for row in rows]
    median = {key: statistics.median(row.get(key, 0.0) for row in rows) for key in rows[0]}
    found = {
        "name": contender.name,
        "chunks": contender.chunks,
        "step_s": statistics.median(steps),
        "least_s": min(steps),
        "most_s": max(steps),
        "ratio": statistics.median(steps) / statistics.median(row["step_s"] for row in peer),
        "sent_bytes": median["sent_bytes"],
        "received_bytes": median["received_bytes"],
    }
    if contender.codec is not None:
        counted = sum(max(row["sent_bytes"], row["received_bytes"]) for row in rows)
        said = sum(max(row["wire_out_bytes"], row["wire_in_bytes"]) for row in rows)
        bounds = [bound_s(row, contender.chunks, link) for row in rows]
        found |= {
            "wire_over_counted": said / counted,
            "computation_s": statistics.median(row["client_compute_s"] + row["server_compute_s"] for row in rows),
            "bound_s": statistics.median(bounds),
            "over_bound": statistics.median(s / b for s, b in zip(steps, bounds, strict=True)),
        }
    return found


def bound_s(row: Row, chunks: int, link: str) -> float:
    """Seconds below which a step cannot come: of each resource its work, and what comes before and after it.

    A resource is the server's computation, or one direction of the link at its nominal rate with the bytes that
    the interface counted; before and after it comes what the first and the last micro-batch need. Nobody waits for
    the server's weight gradients, if its backwards are in two parts.
    """
    rate = float("inf") if link == "unshaped" else float(link.removesuffix("mbit")) * 1e6 / 8 * PAYLOAD_SHARE
    out, back = row["sent_bytes"] / rate, row["received_bytes"] / rate
    client, server = row["client_compute_s"], row["server_compute_s"]
    code_out = row["client_encode_s"] + row["server_decode_s"]
    code_back = row["server_encode_s"] + row["client_decode_s"]
    awaited = server - row["server_weight_s"]
    one = 1.0 / chunks
    ways = (
        out + one * (client + code_out + awaited + code_back + back),
        server + one * (client + code_out + out),
        awaited + one * (client + code_out + out + code_back + back),
        back + one * (client + code_out + out + awaited + code_back),
        client + one * (code_out + out + awaited + code_back + back),
    )
    return max(ways)


def table(link: str, result: Mapping[str, Any]) -> str:
    """One link's table in Markdown."""
    lines = [
        f"### {link}",
        "",
        f"{result['date']}, {result['machine']}; {result['rounds']} steps each, after {WARM_UP} not counted.",
        "",
        "| compressor | chunks | s / step | least - most | of the peer's | computation s "
        "| sent + received MB, counted | wire / counted | of the bound |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in result["rows"]:
        cells = [
            row["name"],
            str(row["chunks"]),
            f"{row['step_s']:.2f}",
            f"{row['least_s']:.2f} - {row['most_s']:.2f}",
            f"{row['ratio']:.3f}",
            f"{row['computation_s']:.2f}" if "computation_s" in row else "",
            f"{row['sent_bytes'] / 1e6:.2f} + {row['received_bytes'] / 1e6:.2f}",
            f"{row['wire_over_counted']:.4f}" if "wire_over_counted" in row else "",
            f"{row['over_bound']:.2f}" if "over_bound" in row else "",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    typer.run(main)
