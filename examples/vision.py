"""Trains MobileNetV2 on CIFAR-10, CIFAR-100, Food-101 or digits over a client and a server, as the documents do.

The client has the first convolution with its batch norm, and the classifier; the server has the rest. SGD with a
momentum of 0.1, a cosine schedule and images of 224 x 224 are the documents'; everything is an option.

    python examples/vision.py cifar10 --data ~/data --compressor sortquant8 --log out/sortquant8
    python examples/vision.py cifar10 --data ~/data --compressor sortquant --bits 4 --split 2 --chunks 8
    python examples/vision.py digits --image-size 48 --epochs 2 --compare out/sortquant8/log.jsonl

A run that was stopped goes on with the same command. torchvision loads the data (CIFAR and Food-101 are downloaded
with --download); scikit-learn's digits need no download.
"""

from __future__ import annotations

from collections.abc import Iterator
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from experiment import Batch, Log, Task, console, draw, index_batches, spelled, summary, train
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset
from torchvision import datasets
from torchvision.models import MobileNet_V2_Weights, mobilenet_v2
from torchvision.transforms import v2 as transforms

import fxsplit

CUTS = ("features.0.2", "classifier")
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


class Name(StrEnum):
    """The datasets."""

    CIFAR10 = "cifar10"
    CIFAR100 = "cifar100"
    FOOD101 = "food101"
    DIGITS = "digits"


CLASSES = {Name.CIFAR10: 10, Name.CIFAR100: 100, Name.FOOD101: 101, Name.DIGITS: 10}


def load(name: Name, data: Path | None, size: int, download: bool) -> tuple[Dataset[Any], Dataset[Any]]:
    """Training images, cropped at random and mirrored, and validation images: [3, size, size] each."""
    if name is Name.DIGITS:
        return digits(size)
    if data is None:
        raise typer.BadParameter("the folder of the data is needed", param_hint="--data")
    to_tensor = [transforms.ToImage(), transforms.ToDtype(torch.float32, scale=True)]
    normal = transforms.Normalize(MEAN, DEVIATION)
    crop = transforms.RandomResizedCrop(size, scale=(0.6, 1.0), antialias=True)
    augmented = transforms.Compose([*to_tensor, crop, transforms.RandomHorizontalFlip(), normal])
    plain = transforms.Compose([*to_tensor, transforms.Resize((size, size), antialias=True), normal])
    try:
        if name is Name.FOOD101:
            return (
                datasets.Food101(data, "train", transform=augmented, download=download),
                datasets.Food101(data, "test", transform=plain, download=download),
            )
        kind = datasets.CIFAR10 if name is Name.CIFAR10 else datasets.CIFAR100
        return (
            kind(data, train=True, transform=augmented, download=download),
            kind(data, train=False, transform=plain, download=download),
        )
    except RuntimeError as error:  # torchvision found no data there
        raise typer.BadParameter(f"{error} (--download fetches it)", param_hint="--data") from error


def digits(size: int) -> tuple[Dataset[Any], Dataset[Any]]:
    """scikit-learn's handwritten digits, scaled up; every fourth is for validation."""
    from sklearn.datasets import load_digits

    found = load_digits()
    grey = torch.tensor(found.images, dtype=torch.float32)[:, None] / 8 - 1
    images = torch.nn.functional.interpolate(grey, (size, size), mode="bilinear").repeat(1, 3, 1, 1)
    labels = torch.tensor(found.target)
    held_out = torch.arange(len(labels)) % 4 == 0
    return TensorDataset(images[~held_out], labels[~held_out]), TensorDataset(images[held_out], labels[held_out])


def batches(data: Dataset[Any], size: int, workers: int, generator: torch.Generator | None) -> Iterator[Batch]:
    """Images and labels; see `index_batches`."""
    indices = index_batches(len(data), size, generator)  # type: ignore[arg-type]
    for images, labels in DataLoader(data, batch_sampler=indices, num_workers=workers):
        yield {"x": images}, labels


def task_of(name: Name, data: tuple[Dataset[Any], Dataset[Any]], batch_size: int, workers: int) -> Task:
    """The task."""

    def logits(output: Tensor) -> Tensor:
        return output

    return Task(
        f"MobileNetV2 on {name.value}",
        partial(batches, data[0], batch_size, workers),
        partial(batches, data[1], batch_size, workers, None),
        logits,
        cross_entropy,
    )


@app.command()
def main(
    dataset: Annotated[Name, typer.Argument(help="What is learned.")],
    data: Annotated[Path | None, typer.Option(help="Folder of the data, as torchvision keeps it.")] = None,
    download: Annotated[bool, typer.Option("--download", help="Download what is missing.")] = False,
    compressor: Annotated[str, typer.Option(help="Compressor of both cuts; none for none.")] = "none",
    bits: Annotated[int | None, typer.Option(help="Quantization bits, if not in the compressor's name.")] = None,
    split: Annotated[int | None, typer.Option(help="Split bits of sort and fast quantization.")] = None,
    chunks: Annotated[int, typer.Option(min=1, help="Micro-batches of a batch.")] = 4,
    devices: Annotated[
        str, typer.Option(help="Client, server and client, with commas; a/cpu+b/cpu: two servers.")
    ] = "cpu,server/cpu,cpu",
    epochs: Annotated[int, typer.Option(min=1)] = 40,
    batch_size: Annotated[int, typer.Option(min=2)] = 64,
    image_size: Annotated[int, typer.Option(min=32)] = 224,
    learning_rate: Annotated[float, typer.Option(help="At the beginning; it falls by a cosine.")] = 0.005,
    momentum: Annotated[float, typer.Option()] = 0.1,
    weight_decay: Annotated[float, typer.Option()] = 0.0,
    pretrained: Annotated[bool, typer.Option("--pretrained", help="Begin with ImageNet's weights.")] = False,
    images: Annotated[int | None, typer.Option(help="Only the first so many training images.")] = None,
    loaders: Annotated[int, typer.Option(min=0, help="Processes that load images.")] = 0,
    seed: Annotated[int, typer.Option(help="Of weights, order and augmentation.")] = 0,
    log: Annotated[Path, typer.Option(help="Folder of log, curves and checkpoint.")] = Path("out/vision"),
    compare: Annotated[list[Path] | None, typer.Option(help="Logs of other runs, for the curves.")] = None,
) -> None:
    """Train MobileNetV2 over a client and a server."""
    name = spelled(compressor, bits, split)
    training, validation = load(dataset, data, image_size, download)
    if images is not None:
        training = Subset(training, range(images))
    steps = len(training) // batch_size  # type: ignore[arg-type]
    if steps == 0 or chunks > batch_size:
        raise typer.BadParameter("a batch needs as many images as chunks, and the data at least a batch")
    settings = {
        "model": "mobilenet_v2", "dataset": dataset.value, "compressor": name, "chunks": chunks,
        "devices": devices, "batch_size": batch_size, "image_size": image_size,
        "learning_rate": learning_rate, "momentum": momentum,
        "weight_decay": weight_decay, "pretrained": pretrained, "images": images, "epochs": epochs, "seed": seed,
    }  # fmt: skip
    try:
        lines = Log(log, settings)
        torch.manual_seed(seed)
        model = mobilenet_v2(weights=MobileNet_V2_Weights.DEFAULT if pretrained else None)
        model.classifier[1] = torch.nn.Linear(model.last_channel, CLASSES[dataset])
        example = torch.randn(batch_size, 3, image_size, image_size)
        options: dict[str, Any] = {
            "cuts": CUTS,
            "chunks": chunks,
            "compressor": name,
            "example_inputs": {"x": example},
        }
        with fxsplit.compile(model, devices.split(","), **options) as pipe:
            optimizer = pipe.optimizer(
                torch.optim.SGD, lr=learning_rate, momentum=momentum, weight_decay=weight_decay
            )
            schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * steps)
            task = task_of(dataset, (training, validation), batch_size, loaders)
            train(pipe, task, optimizer, schedule, lines, settings, epochs, seed)
        console.print(summary(lines, None))
        draw([lines.path, *(compare or [])], task.name, log / "curves.png")
    except fxsplit.FxsplitError as error:
        console.print(str(error), style="red", soft_wrap=True)
        raise typer.Exit(1) from error
    console.print(f"log and curves: {log}", soft_wrap=True)


if __name__ == "__main__":
    app()
