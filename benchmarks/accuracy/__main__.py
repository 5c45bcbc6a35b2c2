"""The command line: `python -m benchmarks.accuracy`."""

from __future__ import annotations

import signal
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from .configs import CONFIGS, Config, available, chosen
from .data import load
from .report import README, write_report
from .runner import Ended, append, jobs_of, read, run_all, without_done
from .train import Settings


def main(
    data: Annotated[Path | None, typer.Option(help="CIFAR-10 as JPEG: cifar10_jpeg.npz.")] = None,
    configs: Annotated[str, typer.Option(help="default, all, or names with commas between them.")] = "default",
    seeds: Annotated[str, typer.Option(help="Seeds, with commas between them.")] = "0,1,2",
    epochs: Annotated[int, typer.Option(min=1)] = 10,
    batch_size: Annotated[int, typer.Option(min=2)] = 256,
    learning_rate: Annotated[float, typer.Option(help="The peak of the one cycle.")] = 0.1,
    jobs: Annotated[int, typer.Option(min=1, help="Runs side by side.")] = 1,
    out: Annotated[Path, typer.Option(help="Folder for the results.")] = Path("out/accuracy"),
    cache: Annotated[Path | None, typer.Option(help="Folder for the decoded images (184 MB); OUT.")] = None,
    limit_s: Annotated[float | None, typer.Option(help="Seconds for everything.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Leave out what is in OUT already.")] = False,
    device: Annotated[str, typer.Option(help="cuda, cpu or auto.")] = "auto",
    graph: Annotated[bool, typer.Option(help="Replay the part between the cuts as a CUDA graph.")] = True,
    tune: Annotated[bool, typer.Option(help="Let cuDNN try its algorithms.")] = False,
    threads: Annotated[int, typer.Option(min=1, help="Of the CPU, a run.")] = 1,
    width: Annotated[float, typer.Option(help="Factor of the model's widths.")] = 1.0,
    train_images: Annotated[int | None, typer.Option(help="Only the first so many.")] = None,
    test_images: Annotated[int | None, typer.Option(help="Only the first so many.")] = None,
    list_configs: Annotated[bool, typer.Option("--list", help="Print the configurations.")] = False,
    report: Annotated[
        Path | None, typer.Option(help="Put the results of this folder into README and picture, and do no more.")
    ] = None,
    readme: Annotated[Path, typer.Option(help="The README for --report; the picture goes beside it.")] = README,
) -> None:
    """Train MobileNetV2 on CIFAR-10 through each codec, and collect the accuracies."""
    begun = time.monotonic()
    if list_configs:
        print("\n".join(_line(config) for config in CONFIGS))
        return
    if report is not None:
        from .plot import draw  # matplotlib may be missing where runs are made

        draw(write_report(read(report), readme), readme.with_name("accuracy.png"))
        return
    if data is None:
        raise typer.BadParameter("the path of cifar10_jpeg.npz is needed", param_hint="--data")
    try:
        wanted, refused = available(chosen(configs))
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--configs") from error
    for name, reason in refused.items():
        print(f"skipped {name}: {reason}", flush=True)
    folder = cache or out
    settings = Settings(
        data=data, cache=folder, epochs=epochs, batch_size=batch_size, learning_rate=learning_rate, width=width,
        train_images=train_images, test_images=test_images, device=device, graph=graph, tune=tune, threads=threads,
    )  # fmt: skip
    out.mkdir(parents=True, exist_ok=True)
    todo = jobs_of(wanted, [int(seed) for seed in seeds.split(",")])
    if resume:
        todo = without_done(todo, read(out), settings)
    load(data, folder)  # decoded here, once
    gpus = torch.cuda.device_count() if settings.found_device().type == "cuda" else 0
    left = None if limit_s is None else max(limit_s - (time.monotonic() - begun), 0.0)
    for number, ended in enumerate(run_all(todo, settings, jobs, left, gpus), 1):
        if ended.row is not None:
            append(out, ended.row)
        print(f"{number:3}/{len(todo)} {time.monotonic() - begun:6.1f} s  {told(ended)}", flush=True)


def told(ended: Ended) -> str:
    """A run in one line, or the traceback of one that crashed."""
    name = f"{ended.job.config.name} seed {ended.job.seed}"
    if ended.row is None:
        return f"{name}: {ended.reason}"
    row: dict[str, Any] = ended.row
    found = f"failed: {row['error']}" if row["error"] else f"{row['accuracy']:.2f} %"
    step = f"{row['step_ms'][-1]:.1f} ms a step" if row["step_ms"] else "no epoch"
    graph = "graphed" if row["graphed"] else "eager"
    note = f", {row['note']}" if row["note"] else ""
    ratios = f"{row['activation_ratio']:.3f} / {row['gradient_ratio']:.3f}"
    return f"{name}: {found}, wire {ratios}, losses {row['losses']}, {row['seconds']:.0f} s, {step}, {graph}{note}"


def _line(config: Config) -> str:
    mark = "*" if config.is_default else " "
    return f"{mark} {config.name:22} {config.activation} | {config.gradient} | {config.reason}"


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the runs are ended too
    typer.run(main)
