"""CIFAR-10: decoded once, kept whole on the device, cropped and flipped there."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchvision.io import ImageReadMode, decode_jpeg

PADDING = 4
MEAN = (125.3, 123.0, 113.9)
DEVIATION = (63.0, 62.1, 66.7)
"""Of CIFAR-10's training images, by colour."""


@dataclass(frozen=True)
class Images:
    """Images of one split.

    Attributes:
        pixels: uint8 `[N, H, W, 3]`; with a border of zeros where they are to be cropped.
        labels: int64 `[N]`.
    """

    pixels: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def first(self, count: int | None) -> Images:
        """The first `count` of them, or all."""
        return Images(self.pixels[:count], self.labels[:count])

    def to(self, device: torch.device) -> Images:
        """The same on a device."""
        return Images(self.pixels.to(device), self.labels.to(device))

    def padded(self) -> Images:
        """With a border of zeros around each image."""
        pad = (0, 0, PADDING, PADDING, PADDING, PADDING)
        return Images(torch.nn.functional.pad(self.pixels, pad), self.labels)


def load(path: Path, folder: Path) -> tuple[Images, Images]:
    """Training and test images of a file of JPEGs, decoded once into a file in a folder.

    The file is an npz with `{train,test}_bytes` (uint8, all JPEGs behind each other), `_offsets` (`[N + 1]`) and
    `_labels`.
    """
    kept = folder / f"{path.stem}-{path.stat().st_size}.pt"
    if not kept.exists():
        folder.mkdir(parents=True, exist_ok=True)
        _save({split: decoded(path, split) for split in ("train", "test")}, kept)
    found = torch.load(kept, weights_only=True)
    return Images(*found["train"]), Images(*found["test"])


def _save(content: Any, path: Path) -> None:
    """The file appears whole or not at all: several processes may want it."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
    os.close(handle)
    try:
        torch.save(content, temporary)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def decoded(path: Path, split: str, count: int | None = None) -> tuple[Tensor, Tensor]:
    """Pixels and labels of the first `count` images of a split, or of all; see `load` for the file."""
    with np.load(path) as file:
        content = torch.from_numpy(file[f"{split}_bytes"])
        offsets, labels = file[f"{split}_offsets"].tolist(), torch.from_numpy(file[f"{split}_labels"][:count])

    def pixels(index: int) -> Tensor:
        # A copy of the bytes: the decoder may read them in place.
        image: Tensor = decode_jpeg(content[offsets[index] : offsets[index + 1]].clone(), ImageReadMode.RGB)
        return image.permute(1, 2, 0)

    with ThreadPoolExecutor() as pool:
        return torch.stack(list(pool.map(pixels, range(len(labels)), chunksize=256))), labels.long()


def training_batches(images: Images, size: int, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
    """One epoch in random order, cropped and flipped at random; the rest that fills no batch is left out.

    Args:
        images: padded ones.
        size: images in a batch.
        generator: on the images' device.
    """
    order = torch.randperm(len(images), generator=generator, device=generator.device)
    for chosen in order[: len(order) // size * size].split(size):
        yield augmented(images.pixels, chosen, generator), images.labels[chosen]


def test_batches(images: Images, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """All images in their order."""
    for pixels, labels in zip(images.pixels.split(size), images.labels.split(size), strict=True):
        yield normalized(pixels), labels


def augmented(pixels: Tensor, chosen: Tensor, generator: torch.Generator) -> Tensor:
    """Crops of the chosen padded images, half of them mirrored: float32 `[B, 3, H, W]`, channels last.

    Args:
        pixels: uint8 `[N, H + 2 * PADDING, W + 2 * PADDING, 3]`.
        chosen: int64 `[B]`.
        generator: on their device.
    """
    count, device = len(chosen), pixels.device
    height, width = (size - 2 * PADDING for size in pixels.shape[1:3])
    shift = torch.randint(2 * PADDING + 1, (2, count, 1), generator=generator, device=device)
    mirrored = torch.rand(count, 1, generator=generator, device=device) < 0.5
    across = torch.arange(width, device=device)
    rows = shift[0] + torch.arange(height, device=device)  # [B, H]
    columns = shift[1] + torch.where(mirrored, width - 1 - across, across)  # [B, W]
    return normalized(pixels[chosen[:, None, None], rows[:, :, None], columns[:, None, :]])


def normalized(pixels: Tensor) -> Tensor:
    """uint8 `[B, H, W, 3]` as float32 `[B, 3, H, W]`, channels last."""
    mean, deviation = _scale(pixels.device)
    return ((pixels - mean) / deviation).permute(0, 3, 1, 2)


@cache
def _scale(device: torch.device) -> tuple[Tensor, Tensor]:
    """Mean and deviation on a device; copying them there for each batch would wait for it each time."""
    return torch.tensor(MEAN, device=device), torch.tensor(DEVIATION, device=device)
