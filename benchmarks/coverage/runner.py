"""Runs cases, each in a child process with a time limit, and keeps their rows."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from .cases import Case
from .harness import CRITERIA, Examination, Outcome, Row, outcome_of


@dataclass
class _Child:
    case: Case
    process: BaseProcess
    pipe: Connection
    started: float
    row: Row


def run(cases: Sequence[Case], jobs: int = 1, limit: float = 300.0) -> Iterator[Row]:
    """Examines cases, `jobs` at a time, and yields each one's row when it is there.

    Args:
        cases: what to examine.
        jobs: child processes at a time; each uses one thread.
        limit: seconds after which a child is ended.
    """
    torch.set_num_threads(1)
    waiting, running = list(reversed(cases)), list[_Child]()
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                running.append(_start(waiting.pop()))
            next_end = min(child.started + limit for child in running)
            ready = wait([child.pipe for child in running], timeout=max(next_end - time.monotonic(), 0.0))
            for child in list(running):
                if child.pipe in ready and _receive(child):
                    continue
                late = time.monotonic() > child.started + limit
                if late or child.pipe in ready:
                    running.remove(child)
                    yield _end(child, f"no answer within {limit:.0f} s" if late else "the process died")
    finally:
        for child in running:
            _end(child, "stopped")


def _start(case: Case) -> _Child:
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_examine, args=(case, sender))
    process.start()
    sender.close()
    return _Child(case, process, receiver, time.monotonic(), Row(case.name, case.family))


def _receive(child: _Child) -> bool:
    """Takes the child's next row; False when it has nothing more to say."""
    try:
        child.row = child.pipe.recv()
    except EOFError:
        return False
    return True


def _end(child: _Child, reason: str) -> Row:
    child.process.kill()  # it has said all, or is late
    child.process.join()
    child.pipe.close()
    child.row.seconds = time.monotonic() - child.started
    for letter in CRITERIA:
        if letter not in child.row.outcomes:
            child.row.outcomes[letter] = Outcome.CRASHED
            child.row.failures[letter] = reason
    return child.row


def _examine(case: Case, sender: Connection) -> None:
    """In the child: quiet, one thread, rows sent as they grow."""
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1)
    os.dup2(quiet, 2)
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    row = Row(case.name, case.family)
    try:
        row = Examination(case, sender.send).run()
    except Exception as error:
        for letter in CRITERIA:
            row.note(letter, outcome_of(error), error)
    sender.send(row)
    sender.close()


# ---------------------------------------------------------------------- results


def save(path: Path, rows: Sequence[Row], about: dict[str, str]) -> None:
    """Writes rows as JSON, without the times: a second run of the same code gives the same file."""
    document = {"about": about, "rows": [_plain(row) for row in rows]}
    path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def load(path: Path) -> dict[str, Row]:
    """Rows by name."""
    document: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    rows = {}
    for data in document["rows"]:
        outcomes = {letter: Outcome(value) for letter, value in data["outcomes"].items()}
        rows[data["name"]] = Row(
            data["name"],
            data["family"],
            outcomes,
            data["failures"],
            gradients_exact=data["gradients_exact"],
        )
    return rows


def _plain(row: Row) -> dict[str, Any]:
    return {
        "name": row.name,
        "family": row.family,
        "outcomes": {letter: str(row.outcomes[letter]) for letter in CRITERIA},
        "gradients_exact": row.gradients_exact,
        "failures": {letter: row.failures[letter] for letter in CRITERIA if letter in row.failures},
    }


def worse(row: Row, before: Row) -> list[str]:
    """What of a row got worse than it was."""
    lines = []
    for letter, now in row.outcomes.items():
        was = before.outcomes.get(letter, now)
        if (now.failed and now.badness > was.badness) or (now is Outcome.ABSENT and was is Outcome.EXACT):
            lines.append(f"{row.name}: {CRITERIA[letter]}: {now}, was {was}: {row.failures.get(letter, '')}")
    if before.gradients_exact and not row.gradients_exact:
        lines.append(f"{row.name}: gradients are no longer equal bit for bit")
    return lines
