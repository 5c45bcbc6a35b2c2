"""Activations and gradients of models in training, recorded where fxsplit cuts them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, interpolate

import fxsplit
from benchmarks.accuracy.data import decoded, normalized
from fxsplit.compressors.nodes import Decode, Encode

BATCH, CLASSES = 32, 10
IMAGE_SIZE, TOKENS, VOCABULARY = 64, 64, 1000
MOBILENET_CUT, ROBERTA_CUT = "features.0.2", "roberta.encoder.layer.2"

CODEC = "uniform16"
"""What stands at the cut meanwhile, so that there is a place to listen at; it changes next to nothing."""

Batch = tuple[dict[str, Tensor], Tensor]
"""Inputs by name, and labels int64 `[B]`."""


@dataclass(frozen=True)
class Subject:
    """A model, its cut, what it learns, and how fast.

    Attributes:
        name: how it is called.
        build: makes the model, in training mode, with random weights.
        cut: where it is cut.
        batch: the training batch of a number, the same every time.
        learning_rate: of Adam.
    """

    name: str
    build: Callable[[], nn.Module]
    cut: str
    batch: Callable[[int], Batch]
    learning_rate: float


def recorded(cifar: Path | None, steps: int) -> dict[str, Tensor]:
    """What crosses the cut of each model and what comes back, after so many steps of training.

    Args:
        cifar: CIFAR-10 as `benchmarks.accuracy` takes it; images are made up if None.
        steps: of training; the batch after them is recorded, in training mode.

    Returns:
        "mobilenet activation" `[32, 32, 32, 32]`, "mobilenet gradient", "roberta activation" `[32, 64, 256]`
        and "roberta gradient"; float32.
    """
    found: dict[str, Tensor] = {}
    for subject in (_mobilenet(cifar, steps + 1), _roberta()):
        activation, gradient = _record(subject, steps)
        found |= {f"{subject.name} activation": activation, f"{subject.name} gradient": gradient}
    return found


def _record(subject: Subject, steps: int) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    model, (inputs, _) = subject.build(), subject.batch(0)
    traced = fxsplit.trace(model, inputs, cuts=[subject.cut])
    plan = fxsplit.plan(
        fxsplit.analyze(traced, inputs),
        ("cpu", "other/cpu"),
        cuts=[subject.cut],
        compressor=CODEC,
        gradient_compressor=CODEC,
    )
    rewritten = fxsplit.rewrite(traced, plan)
    module = rewritten.primary.module
    optimizer = torch.optim.Adam(module.parameters(), lr=subject.learning_rate)
    for step in range(steps):
        optimizer.zero_grad()
        _loss(rewritten, subject.batch(step)).backward()
        optimizer.step()
    heard: list[Tensor] = []
    for part in module.modules():
        if isinstance(part, Encode) and str(part.compressor) == CODEC:
            part.register_forward_hook(lambda _, given, __: heard.append(given[0].detach().clone()))
        if isinstance(part, Decode) and str(part.compressor) == CODEC:
            part.register_forward_hook(lambda _, __, made: _listen(made, heard))
    _loss(rewritten, subject.batch(steps)).backward()
    activation, gradient = heard
    return activation.contiguous(), gradient.contiguous()


def _listen(made: Tensor, heard: list[Tensor]) -> None:
    made.register_hook(lambda gradient: heard.append(gradient.detach().clone()))


def _loss(model: Callable[..., Any], batch: Batch) -> Tensor:
    inputs, labels = batch
    output = model(**inputs)
    return cross_entropy(output if isinstance(output, Tensor) else output.logits, labels)


def _mobilenet(cifar: Path | None, batches: int) -> Subject:
    """torchvision's, on CIFAR-10's first images or on made-up ones, at 64 by 64."""
    if cifar is not None:
        pixels, labels = decoded(cifar, "train", BATCH * batches)
        images = normalized(pixels).contiguous()
    else:  # a pattern of its own for each class, under noise
        generator = torch.Generator().manual_seed(0)
        labels = torch.randint(CLASSES, (BATCH * batches,), generator=generator)
        patterns = torch.randn(CLASSES, 3, 8, 8, generator=generator)
        images = interpolate(patterns, size=32, mode="bilinear")[labels]
        images = images + torch.randn(images.shape, generator=generator)

    def batch(number: int) -> Batch:
        chosen = slice(BATCH * number, BATCH * (number + 1))
        return {"x": interpolate(images[chosen], size=IMAGE_SIZE, mode="bilinear")}, labels[chosen]

    return Subject(
        "mobilenet",
        lambda: torchvision.models.mobilenet_v2(num_classes=CLASSES).train(),
        MOBILENET_CUT,
        batch,
        learning_rate=1e-3,
    )


def _roberta() -> Subject:
    """Four layers of width 256; each class of made-up texts prefers other words, and lengths differ."""

    def build() -> nn.Module:
        from transformers import RobertaConfig, RobertaForSequenceClassification

        config = RobertaConfig(
            num_hidden_layers=4, hidden_size=256, num_attention_heads=4, intermediate_size=1024,
            vocab_size=VOCABULARY, max_position_embeddings=TOKENS + 2, num_labels=CLASSES,
        )  # fmt: skip
        model: nn.Module = RobertaForSequenceClassification(config).train()
        return model

    def batch(number: int) -> Batch:
        generator = torch.Generator().manual_seed(number)
        labels = torch.randint(CLASSES, (BATCH,), generator=generator)
        frequency = 1.0 / torch.arange(1.0, VOCABULARY - 4)  # as words of a language: Zipf's law
        ranks = torch.multinomial(frequency.expand(BATCH, -1), TOKENS, replacement=True, generator=generator)
        words = 5 + (ranks + 97 * labels[:, None]) % (VOCABULARY - 5)
        lengths = torch.randint(TOKENS // 2, TOKENS + 1, (BATCH, 1), generator=generator)
        mask = (torch.arange(TOKENS) < lengths).long()
        return {"input_ids": words * mask + (1 - mask), "attention_mask": mask}, labels

    return Subject("roberta", build, ROBERTA_CUT, batch, learning_rate=3e-4)
