"""The models of the study, with a batch and a cut."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torchvision
import transformers
from torch import nn

CHUNKS = 4


@dataclass(frozen=True)
class Task:
    """What is trained.

    Attributes:
        model: the model.
        batch: its inputs, by name or one tensor.
        cut: where the plans that are given are cut.
    """

    model: nn.Module
    batch: Any
    cut: str


def task(name: str) -> Task:
    """The same for every process and every run.

    Raises:
        KeyError: an unknown name.
    """
    torch.manual_seed(0)
    if name == "roberta":
        config = transformers.RobertaConfig(
            num_hidden_layers=4, hidden_size=256, num_attention_heads=4, intermediate_size=1024, vocab_size=5000
        )
        ids = torch.randint(5, 5000, (16, 128))
        model = transformers.RobertaForSequenceClassification(config)
        return Task(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, "roberta.encoder.layer.1")
    make, samples, cut = {
        "mobilenet": (torchvision.models.mobilenet_v2, 16, "features.2"),
        "resnet": (torchvision.models.resnet50, 8, "layer2"),
    }[name]
    return Task(make(num_classes=10), torch.randn(samples, 3, 112, 112), cut)


NAMES = ("mobilenet", "resnet", "roberta")
LINKS = {"50mbit": "50mbit", "200mbit": "200mbit", "1gbit": "1gbit", "unshaped": None}
CODECS = ("none", "uniform8", "sortquant8")
DEVICES = ("cpu", "server/cpu")
