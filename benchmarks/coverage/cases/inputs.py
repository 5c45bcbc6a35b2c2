"""Makers of inputs: images, clips, detection targets, tokens with real padding, audio."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .base import Batch, Call, Inputs

VOCABULARY = 128
LENGTH = 12
OTHER_LENGTH = 9


def images(size: int = 64) -> Inputs:
    """A tensor of square colour images."""

    def make(batch: Batch) -> Call:
        return Call((torch.randn(batch.samples, 3, size, size, generator=batch.generator()),))

    return make


def clips(frames: int, size: int) -> Inputs:
    """A tensor of videos."""

    def make(batch: Batch) -> Call:
        return Call((torch.randn(batch.samples, 3, frames, size, size, generator=batch.generator()),))

    return make


def image_pairs(size: int) -> Inputs:
    """Two tensors of images, as optical flow takes them."""

    def make(batch: Batch) -> Call:
        generator = batch.generator()
        return Call(tuple(torch.randn(batch.samples, 3, size, size, generator=generator) for _ in range(2)))

    return make


def scenes(size: int, masks: bool = False, keypoints: int = 0) -> Inputs:
    """A list of images for detection and, in training, a list of targets."""

    def target() -> dict[str, Tensor]:
        boxes = torch.tensor([[4.0, 4.0, 60.0, 70.0], [20.0, 30.0, 90.0, 90.0]])
        made = {"boxes": boxes, "labels": torch.tensor([1, 1] if keypoints else [1, 2])}
        if masks:
            made["masks"] = torch.zeros(2, size, size, dtype=torch.uint8)
            for mask, (left, top, right, bottom) in zip(made["masks"], boxes.int().tolist(), strict=True):
                mask[top:bottom, left:right] = 1
        if keypoints:
            places = boxes[:, None, :2] + 1 + torch.arange(keypoints)[None, :, None]
            made["keypoints"] = torch.cat([places, torch.ones(2, keypoints, 1)], dim=2)
        return made

    def make(batch: Batch) -> Call:
        generator = batch.generator()
        pictures = [torch.rand(3, size, size, generator=generator) for _ in range(batch.samples)]
        return Call((pictures, [target() for _ in pictures])) if batch.training else Call((pictures,))

    return make


def token_ids(batch: Batch) -> Tensor:
    """Random tokens, `[samples, length]`."""
    return torch.randint(5, VOCABULARY, (batch.samples, batch.length or LENGTH), generator=batch.generator())


def padding_mask(ids: Tensor) -> Tensor:
    """Ones for tokens, zeros for padding: none in the first sample, two in the second, three in the third..."""
    mask = torch.ones_like(ids)
    for sample in range(len(ids)):
        if sample % 3:
            mask[sample, -1 - sample % 3 :] = 0
    return mask


def class_labels(batch: Batch) -> Tensor:
    """One of two classes for each sample."""
    return torch.arange(batch.samples) % 2


def tokens(labels: str | None = None, mask: bool = True, **more: Any) -> Inputs:
    """Tokens by keyword, with a padding mask and labels.

    Args:
        labels: "token" (the tokens themselves), "tag" (a class a token), "class" (a class a sample) or None.
        mask: whether the model takes a padding mask.
        more: further keyword arguments, as they are.
    """

    def make(batch: Batch) -> Call:
        ids = token_ids(batch)
        kwargs: dict[str, Any] = {"input_ids": ids}
        if mask:
            kwargs["attention_mask"] = padding_mask(ids)
        if labels is not None:
            kwargs["labels"] = {"token": ids.clone(), "tag": ids % 2, "class": class_labels(batch)}[labels]
        return Call(kwargs={**kwargs, **more})

    return make


def pixels(size: int = 32, labels: bool = True) -> Inputs:
    """Images by keyword, as transformers takes them."""

    def make(batch: Batch) -> Call:
        kwargs = {"pixel_values": torch.randn(batch.samples, 3, size, size, generator=batch.generator())}
        return Call(kwargs={**kwargs, "labels": class_labels(batch)} if labels else kwargs)

    return make


def spectrograms(bands: int, frames: int, labels: int) -> Inputs:
    """Audio features for a model that writes text."""

    def make(batch: Batch) -> Call:
        generator = batch.generator()
        features = torch.randn(batch.samples, bands, frames, generator=generator)
        target = torch.randint(5, VOCABULARY, (batch.samples, labels), generator=generator)
        return Call(kwargs={"input_features": features, "labels": target})

    return make
