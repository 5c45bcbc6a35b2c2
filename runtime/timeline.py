"""A trace of what was measured, for Perfetto (https://ui.perfetto.dev) and chrome://tracing."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fxsplit.errors import PipelineError
from fxsplit.runtime.report import Span

_THREADS = {"encode": 1, "decode": 2}
_NAMES = {0: "compute", 1: "encode", 2: "decode"}
_FIRST_LINK = 10
_CLOCK_CALLS = 8


def events(reports: Iterable[tuple[str, Sequence[Span]]], offsets_s: Mapping[str, float]) -> list[dict[str, Any]]:
    """The events of the trace event format.

    Args:
        reports: what each worker did, by its own clock.
        offsets_s: of each worker's clock against the client's.
    """
    reports = list(reports)
    workers = list(dict.fromkeys(worker for worker, _ in reports))
    begin = min((s.start_s - offsets_s.get(w, 0.0) for w, spans in reports for s in spans), default=0.0)
    links: dict[tuple[str, str], int] = {}
    found: list[dict[str, Any]] = []
    for worker, spans in reports:
        for span in spans:
            thread = _THREADS.get(span.kind, 0)
            if span.kind == "send":
                thread = links.setdefault((worker, span.peer), _FIRST_LINK + len(links))
            event = {
                "name": _name(span),
                "cat": span.kind,
                "ph": "X",
                "pid": workers.index(worker),
                "tid": thread,
                "ts": (span.start_s - offsets_s.get(worker, 0.0) - begin) * 1e6,
                "dur": span.seconds * 1e6,
                "args": {"stage": span.source, "micro-batch": span.micro_batch},
            }
            if span.wire_bytes:
                event["args"] = {"from": span.source, "to": span.target, "wire_bytes": span.wire_bytes}
            found.append(event)
    return [*_labels(workers, links), *sorted(found, key=lambda event: event["ts"])]


def clock_offsets_s(workers: Iterable[str], clock: Callable[[str], float]) -> dict[str, float]:
    """By how much each worker's clock is ahead of this one's: of some calls there and back the fastest.

    Args:
        workers: their names.
        clock: what a worker's clock says now.
    """
    offsets = {}
    for worker in workers:
        tries = []
        for _ in range(_CLOCK_CALLS):
            start = time.perf_counter()
            there = clock(worker)
            end = time.perf_counter()
            tries.append((end - start, there - (start + end) / 2))
        offsets[worker] = min(tries)[1]
    return offsets


def _name(span: Span) -> str:
    if span.kind in ("encode", "decode", "send"):
        return f"{span.kind} {span.source}->{span.target}.{span.micro_batch}"
    return f"{span.kind}{' ' if len(span.kind) > 1 else ''}{span.source}.{span.micro_batch}"


def _labels(workers: Sequence[str], links: Mapping[tuple[str, str], int]) -> list[dict[str, Any]]:
    threads = [(number, thread, name) for number in range(len(workers)) for thread, name in _NAMES.items()]
    threads += [(workers.index(source), thread, f"link to {target}") for (source, target), thread in links.items()]
    names = [{"name": "process_name", "pid": n, "args": {"name": worker}} for n, worker in enumerate(workers)]
    names += [{"name": "thread_name", "pid": n, "tid": t, "args": {"name": name}} for n, t, name in threads]
    return [{**label, "ph": "M"} for label in names]


def write(path: str | os.PathLike[str], found: Sequence[Mapping[str, Any]]) -> None:
    """Writes events as one JSON object.

    Raises:
        PipelineError: nothing was measured yet, or the file cannot be written.
    """
    if not found:
        raise PipelineError("there is nothing to trace", found="no step yet", hint="run a step first")
    try:
        Path(path).write_text(json.dumps({"traceEvents": list(found), "displayTimeUnit": "ms"}))
    except OSError as error:
        raise PipelineError("the trace cannot be written", where=str(path), found=str(error)) from error
