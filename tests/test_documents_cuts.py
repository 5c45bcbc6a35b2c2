"""The cuts that the reference documents name: RoBERTa's conditions 1 to 4 and type 1, MobileNetV2's type 1."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers

import fxsplit
from tests.comparison import SANDWICH, assert_same_gradients, loss_of
from tests.models import TINY, tokens

LAYERS = "roberta.encoder.layer"
CONDITIONS = {
    "condition 1: embeddings and layer 0 / 1-10 / layer 11 and classifier": [f"{LAYERS}.1", f"{LAYERS}.11"],
    "condition 2: self-attention of layer 0 / to 10 / layer 11 and classifier": [
        f"{LAYERS}.0.attention.output",
        f"{LAYERS}.11",
    ],
    "condition 3: self-attention of layer 0 / all the rest / classifier": [
        f"{LAYERS}.0.attention.output",
        "classifier",
    ],
    "condition 4: embeddings / 0-11 / classifier": [f"{LAYERS}.0", "classifier"],
    "type 1: self-attention and dense / feed-forward and 1-11 / classifier": [
        f"{LAYERS}.0.intermediate",
        "classifier",
    ],
}
HOLDS = {
    "condition 1": (
        ["encoder.layer.0.output", "encoder.layer.11.output"],
        ["encoder.layer.1.", "encoder.layer.10."],
    ),
    "condition 2": (["layer.0.attention.self", "layer.11.output"], ["layer.0.attention.output", "layer.10."]),
    "condition 3": (["layer.0.attention.self", "classifier"], ["layer.0.attention.output", "layer.11."]),
    "condition 4": (["embeddings", "classifier"], ["layer.0.attention.self", "layer.11."]),
    "type 1": (["layer.0.attention.output", "classifier"], ["layer.0.intermediate", "layer.11."]),
}


@pytest.mark.parametrize("condition", CONDITIONS)
def test_roberta_with_twelve_layers(condition: str) -> None:
    """Each part is where the documents put it, and the numbers are the model's, bit for bit."""
    torch.manual_seed(0)
    config = transformers.RobertaConfig(
        **{**TINY, "num_hidden_layers": 12}, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
    )
    model = transformers.RobertaForSequenceClassification(config)
    reference, batch, labels = copy.deepcopy(model), tokens(4), torch.arange(4) % 2
    with fxsplit.compile(model, SANDWICH, cuts=CONDITIONS[condition], transport="in_process") as pipe:
        for training in (True, False):
            pipe.train(training)
            reference.train(training)
            output, expected = pipe(**batch), reference(**batch)
            assert torch.equal(output.logits, expected.logits)
            if training:
                loss_of(output, labels).backward()
                loss_of(expected, labels).backward()
                assert_same_gradients(pipe, reference)
        client = set(pipe._engine.call("client", "state"))
        server = set(pipe._engine.call("server", "state"))
        of_client, of_server = HOLDS[condition.partition(":")[0]]
        for part in of_client:
            assert any(part in key for key in client) and not any(part in key for key in server), part
        for part in of_server:
            assert any(part in key for key in server) and not any(part in key for key in client), part
        crossing = [edge.value for edge in pipe.plan.cuts[0].edges if edge.source == 0]
        assert crossing, "something crosses the first cut"
