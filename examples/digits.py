"""Trains MobileNetV2 on handwritten digits, split over two processes, without and with compression.

The client, which is this process, keeps the images, the first convolution, the classifier, the labels and the
loss. The server, a process of its own, holds everything between. Both runs begin with the same weights and see
the same batches; the second one compresses what crosses between the processes, values and gradients alike.

    python examples/digits.py
    python examples/digits.py --compressor fastquant6 --epochs 10

The status is 1 if a run misses an accuracy or the compressed one moves too many bytes; `--help` has the limits.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, NamedTuple

import torch
import typer
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor
from torch.nn.functional import cross_entropy, interpolate, pad
from torchvision.models import mobilenet_v2

import fxsplit
from fxsplit.planning.units import format_bytes, format_seconds
from fxsplit.runtime.metrics import Metrics

DEVICES = ("cpu", "server/cpu", "cpu")
CUTS = ("features.0.2", "classifier")
PEAK_LEARNING_RATE = 0.01
EVALUATION_BATCH = 128
BACKGROUND = -1.0
COLOURS = ("#1f4e79", "#d9730d")

ROWS = (
    "test accuracy",
    "client to server",
    "server to client",
    "values, both ways",
    "gradients, both ways",
    "ratio to uncompressed",
    "compute time",
    "encode and decode time",
    "total time",
)

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
console = Console()


class Data(NamedTuple):
    """Images [N, 3, size, size] and labels [N]."""

    images: Tensor
    labels: Tensor


@dataclass
class Run:
    """One training, and what was measured in it.

    Attributes:
        name: of the compressor.
        losses: mean training loss by epoch.
        accuracies: test accuracy in percent by epoch.
        metrics: bytes and times of the last epoch's training batches.
    """

    name: str
    losses: list[float] = field(default_factory=list)
    accuracies: list[float] = field(default_factory=list)
    metrics: Metrics = field(default_factory=Metrics)

    def bytes_from(self, source: str) -> int:
        """Bytes that a worker sent, values and gradients."""
        return sum(link.wire_bytes for link in self.metrics.links.values() if link.source == source)

    def bytes_of(self, backward: bool) -> int:
        """Bytes of all gradients, or of all values, both ways."""
        return sum(link.wire_bytes for link in self.metrics.links.values() if link.backward == backward)


@dataclass(frozen=True)
class Settings:
    """What both runs have in common."""

    epochs: int
    chunks: int
    batch_size: int
    seed: int


def load_data(image_size: int, samples: int, seed: int) -> tuple[Data, Data]:
    """Training and test data, three to one: 8x8 grey images from -1 to 1, scaled up, in three equal channels."""
    digits = load_digits()
    grey = torch.tensor(digits.images[:samples], dtype=torch.float32)[:, None] / 8 - 1
    images = interpolate(grey, size=(image_size, image_size), mode="bilinear").repeat(1, 3, 1, 1)
    labels = torch.tensor(digits.target[:samples])
    rows = train_test_split(range(len(labels)), test_size=0.25, stratify=labels, random_state=seed)
    train, test = (Data(images[chosen], labels[chosen]) for chosen in rows)
    return train, test


def batches(data: Data, size: int, generator: torch.Generator) -> Iterator[Data]:
    """The data in random order and place, in batches of one size; the rest that fills no batch is left out."""
    order = torch.randperm(len(data.labels), generator=generator)
    for chosen in order[: len(order) // size * size].split(size):
        yield Data(shifted(data.images[chosen], generator), data.labels[chosen])


def shifted(images: Tensor, generator: torch.Generator) -> Tensor:
    """Each image moved by up to a sixteenth of its size, which is half a pixel of the original."""
    size = images.shape[-1]
    most = size // 16
    places = torch.randint(0, 2 * most + 1, (len(images), 2), generator=generator).tolist()
    framed = pad(images, (most, most, most, most), value=BACKGROUND)
    moved = [i[:, y : y + size, x : x + size] for i, (y, x) in zip(framed, places, strict=True)]
    return torch.stack(moved)


def train(compressor: str | None, data: tuple[Data, Data], settings: Settings, progress: Progress) -> Run:
    """Trains a new model through a pipeline and tests it after each epoch."""
    training, test = data
    torch.manual_seed(settings.seed)
    shuffle = torch.Generator().manual_seed(settings.seed)
    model = mobilenet_v2(weights=None, num_classes=10)
    steps = len(training.labels) // settings.batch_size
    run = Run(compressor or "none")
    task = progress.add_task(f"{run.name:<12}", total=settings.epochs * steps, loss=float("nan"), accuracy=0.0)
    with fxsplit.compile(
        model,
        devices=DEVICES,
        cuts=CUTS,
        chunks=settings.chunks,
        compressor=compressor,
        example_inputs=training.images[: settings.batch_size],
    ) as pipe:
        optimizer = pipe.optimizer(torch.optim.AdamW, lr=PEAK_LEARNING_RATE)
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, PEAK_LEARNING_RATE, epochs=settings.epochs, steps_per_epoch=steps
        )
        for _ in range(settings.epochs):
            pipe.train()
            pipe.metrics.reset()
            total = 0.0
            for images, labels in batches(training, settings.batch_size, shuffle):
                loss = cross_entropy(pipe(images), labels)
                loss.backward()
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
                total += loss.item()
                progress.update(task, advance=1, loss=loss.item())
            run.losses.append(total / steps)
            run.metrics = copy.deepcopy(pipe.metrics)
            run.accuracies.append(accuracy(pipe, test))
            progress.update(task, accuracy=run.accuracies[-1])
    return run


@torch.no_grad()
def accuracy(pipe: fxsplit.Pipeline, data: Data) -> float:
    """The percentage of the data that the pipeline classifies right."""
    pipe.eval()
    parts = -(-len(data.labels) // EVALUATION_BATCH)
    guesses = [pipe(images).argmax(dim=1) for images in data.images.tensor_split(parts)]
    return (torch.cat(guesses) == data.labels).float().mean().item() * 100


def table(plain: Run, compressed: Run) -> Table:
    """Accuracies, bytes and times of both runs, side by side."""
    result = Table(title="MobileNetV2 on digits, client - server - client")
    result.add_column("a training batch", no_wrap=True)
    for run in (plain, compressed):
        result.add_column(run.name, justify="right", no_wrap=True)
    for name, *cells in zip(ROWS, measures(plain), measures(compressed), strict=True):
        result.add_row(name, *cells)
    result.caption = "means of the last epoch; compute, encode and\ndecode are summed over both processes"
    return result


def measures(run: Run) -> tuple[str, ...]:
    """What the table says of a run, in the order of `ROWS`."""
    metrics, calls = run.metrics, run.metrics.calls
    coding_s = sum(worker.encode_s + worker.decode_s for worker in metrics.workers.values())
    moved = run.bytes_from("client"), run.bytes_from("server"), run.bytes_of(False), run.bytes_of(True)
    spent = metrics.compute_s, coding_s, metrics.total_s
    return (
        f"{run.accuracies[-1]:.1f} %",
        *(format_bytes(count / calls) for count in moved),
        f"{metrics.ratio:.3f}",
        *(format_seconds(seconds / calls) for seconds in spent),
    )


def plot(plain: Run, compressed: Run, path: Path) -> None:
    """Writes both learning curves as a picture."""
    figure = Figure(figsize=(10, 4), dpi=160, layout="constrained")
    left, right = figure.subplots(1, 2)
    for run, colour, style in zip((plain, compressed), COLOURS, ("-", "--"), strict=True):
        labels = f"{run.name}: {run.accuracies[-1]:.1f} %", f"{run.name}: {run.metrics.ratio:.2f} of the bytes"
        for axes, values, label in zip((left, right), (run.accuracies, run.losses), labels, strict=True):
            epochs = range(1, len(values) + 1)
            axes.plot(epochs, values, color=colour, linestyle=style, marker="o", markersize=4, label=label)
    left.set_ylim(0, 103)
    right.set_ylim(bottom=0)
    decorate(left, "Test accuracy in %")
    decorate(right, "Training loss")
    figure.suptitle("MobileNetV2 on digits, split over two processes", x=0.01, ha="left", weight="bold")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def decorate(axes: Axes, title: str) -> None:
    """Title, grid and legend, and nothing else."""
    axes.set_title(title, loc="left", fontsize=12)
    axes.set_xlabel("epoch")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(color="#e4e4e4", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)


def misses(plain: Run, compressed: Run, min_accuracy: float, max_difference: float, max_ratio: float) -> list[str]:
    """What the runs promise and do not keep."""
    found = [
        f"{run.name}: test accuracy {run.accuracies[-1]:.1f} %, less than {min_accuracy:g} %"
        for run in (plain, compressed)
        if run.accuracies[-1] < min_accuracy
    ]
    difference = abs(plain.accuracies[-1] - compressed.accuracies[-1])
    if difference > max_difference:
        found.append(f"the accuracies are {difference:.1f} points apart, more than {max_difference:g}")
    if compressed.metrics.ratio > max_ratio:
        found.append(
            f"{compressed.name} moves {compressed.metrics.ratio:.3f} of the bytes, more than {max_ratio:g}"
        )
    return found


@app.command()
def main(
    epochs: Annotated[int, typer.Option(min=1, help="Epochs of each run.")] = 8,
    compressor: Annotated[str, typer.Option(help="Compressor of the second run.")] = "sortquant8",
    chunks: Annotated[int, typer.Option(min=1, help="Micro-batches of a batch.")] = 4,
    image_size: Annotated[int, typer.Option(min=32, help="Pixels to which the 8x8 images are scaled up.")] = 48,
    batch_size: Annotated[int, typer.Option(min=8, help="Samples of a training batch.")] = 64,
    samples: Annotated[int, typer.Option(min=100, help="How many of the images to use; 1797 are all.")] = 1797,
    seed: Annotated[int, typer.Option(help="Seed of weights, split, order and dropout.")] = 0,
    out: Annotated[Path, typer.Option(help="The picture of the learning curves.")] = Path("out/digits.png"),
    min_accuracy: Annotated[float, typer.Option(help="Test accuracy in percent that both must reach.")] = 95.0,
    max_difference: Annotated[float, typer.Option(help="Points by which accuracies may differ.")] = 1.0,
    max_ratio: Annotated[float, typer.Option(help="Part of the bytes that compression may leave.")] = 0.26,
) -> None:
    """Train MobileNetV2 on digits over two processes, uncompressed and compressed; compare the two."""
    torch.set_num_threads(1)  # the worker takes this over; operations this small do not gain from more
    try:
        fxsplit.compressor(compressor)
    except fxsplit.FxsplitError as error:
        raise typer.BadParameter(str(error), param_hint="--compressor") from error
    data = load_data(image_size, samples, seed)
    if not chunks <= batch_size <= len(data[0].labels):
        allowed = f"{chunks} (the chunks) to {len(data[0].labels)} (the training samples)"
        raise typer.BadParameter(f"{batch_size}, where {allowed} are allowed", param_hint="--batch-size")
    settings = Settings(epochs, chunks, batch_size, seed)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.3f}, test accuracy {task.fields[accuracy]:.1f} %"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console) as progress:
        plain = train(None, data, settings, progress)
        compressed = train(compressor, data, settings, progress)
    console.print(table(plain, compressed))
    plot(plain, compressed, out)
    console.print(f"learning curves: {out}", soft_wrap=True)
    missed = misses(plain, compressed, min_accuracy, max_difference, max_ratio)
    for line in missed:
        console.print(f"missed: {line}", style="bold red", soft_wrap=True)
    if missed:
        raise typer.Exit(1)


if __name__ == "__main__":
    app()
