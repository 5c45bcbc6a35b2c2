"""Measures a model in a role, and writes it to a file."""

from __future__ import annotations

from pathlib import Path

import torch
import typer

import fxsplit
from benchmarks.prediction.tasks import CHUNKS, CODECS, task


def main(name: str, role: str, path: Path) -> None:
    """With one thread, as the workers have."""
    torch.set_num_threads(1)
    found = task(name)
    fxsplit.calibrate(found.model, found.batch, chunks=CHUNKS, compressors=CODECS[1:], role=role).save(path)


if __name__ == "__main__":
    typer.run(main)
