"""What is trained: MobileNetV2 on random images, cut after its first block."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torchvision
from torch import Tensor, nn

CUT = "features.1"
LEARNING_RATE = 0.005
MOMENTUM = 0.1


@dataclass(frozen=True)
class Task:
    """Model and batch.

    Attributes:
        model: MobileNetV2 for ten classes.
        x: images [batch, 3, size, size].
        y: labels [batch].
    """

    model: nn.Module
    x: Tensor
    y: Tensor

    @classmethod
    def make(cls, batch: int, size: int) -> Task:
        """The same for every process and every run."""
        torch.manual_seed(0)
        model = torchvision.models.mobilenet_v2(num_classes=10)
        return cls(model, torch.randn(batch, 3, size, size), torch.randint(0, 10, (batch,)))
