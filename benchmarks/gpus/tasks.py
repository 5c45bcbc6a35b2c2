"""What is trained: a model, a batch, a loss, and where a pipeline may cut."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

LEARNING_RATE = 0.001
MOMENTUM = 0.9


@dataclass(frozen=True)
class Task:
    """Model and batch.

    Attributes:
        model: on the CPU, in training mode.
        inputs: its keyword arguments.
        target: labels [batch].
        loss: of the model's output and labels.
        blocks: names of modules at which a stage may begin, in order; the first stage begins before all.
        first: the module that runs first.
    """

    model: nn.Module
    inputs: Mapping[str, Tensor]
    target: Tensor
    loss: Callable[[Any, Tensor], Tensor]
    blocks: tuple[str, ...]
    first: str


def mobilenet(batch: int, size: int = 224) -> Task:
    """MobileNetV2 for ten classes on random images."""
    import torchvision

    torch.manual_seed(0)
    model = torchvision.models.mobilenet_v2(num_classes=10)
    blocks = tuple(f"features.{i}" for i in range(1, len(model.features)))
    x = torch.randn(batch, 3, size, size)
    return Task(model.train(), {"x": x}, torch.randint(0, 10, (batch,)), F.cross_entropy, blocks, "features.0")


def roberta(batch: int, length: int = 128, layers: int = 12) -> Task:
    """RoBERTa-base for two classes on random tokens, with its usual dropout."""
    from transformers import RobertaConfig, RobertaForSequenceClassification

    torch.manual_seed(0)
    sizes = {"vocab_size": 50265, "max_position_embeddings": 514, "type_vocab_size": 1}
    model = RobertaForSequenceClassification(RobertaConfig(num_labels=2, num_hidden_layers=layers, **sizes))
    blocks = tuple(f"roberta.encoder.layer.{i}" for i in range(1, layers))
    ids = torch.randint(5, 50000, (batch, length))
    return Task(
        model.train(), {"input_ids": ids}, torch.randint(0, 2, (batch,)), logits_loss, blocks, "roberta.embeddings"
    )


def logits_loss(output: Any, target: Tensor) -> Tensor:
    """Cross entropy of a transformers output."""
    return F.cross_entropy(output.logits, target)


TASKS: dict[str, Callable[[], Task]] = {
    "mobilenet-64": lambda: mobilenet(64),
    "mobilenet-256": lambda: mobilenet(256),
    "roberta-32": lambda: roberta(32),
    "tiny": lambda: mobilenet(8, 64),
    "tiny-roberta": lambda: roberta(4, 16, 4),
}
"""By name; the tiny ones are for tests."""
