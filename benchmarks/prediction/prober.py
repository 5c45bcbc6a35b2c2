"""Measures the link to the worker `server`, and writes it to a file."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
import typer

import fxsplit
from benchmarks.prediction.tasks import DEVICES
from benchmarks.two_machines.hosts import ADDRESSES
from fxsplit.planning.link_file import save_links


def main(path: Path, port: int) -> None:
    """Over the address of the first host."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    save_links(fxsplit.probe(DEVICES, listen=f"{ADDRESSES[0]}:{port}"), path)


if __name__ == "__main__":
    typer.run(main)
