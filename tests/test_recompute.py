"""Values that are computed again instead of being sent: which, and that nothing changes by it."""

from __future__ import annotations

import itertools
import random

import pytest
import torch
from torch import Tensor, nn

import fxsplit
from fxsplit.costs import CostTable, NodeCost, Value
from fxsplit.planning import parse_devices
from fxsplit.planning.links import Link, Links
from fxsplit.planning.recompute import Flow, Needs, Uses, least_needs
from fxsplit.spec import TensorSpec
from fxsplit.trace.effects import is_repeatable
from tests.models import tokens, transformer

SLOW = fxsplit.Budget(bandwidth="50Mbit/s")
DEVICES = ["cpu", "server/cpu", "cpu"]


class Masked(nn.Module):
    """A mask made from the input's shape and a float table, used on both sides of two cuts."""

    table: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 64)
        self.register_buffer("table", torch.linspace(0, 1, 64))

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.a(x)
        mask = torch.ones_like(hidden).tril() * self.table
        hidden = self.b(hidden * mask)
        return self.c(hidden * mask)  # type: ignore[no-any-return]


def test_only_the_layout_crosses() -> None:
    """The mask has the activation's shape and nothing of its numbers; the compressed activation is not touched."""
    torch.manual_seed(0)
    model, x = Masked(), torch.randn(64, 64)
    with fxsplit.compile(
        model, DEVICES, cuts=["b", "c"], example_inputs=x, budget=SLOW, transport="in_process"
    ) as pipe:
        assert pipe.plan.recomputed[1] == ("ones_like", "tril", "mul")
        crossing = {edge.value: edge.wire_bytes for edge in pipe.plan.edges if edge.target == 1}
        assert crossing == {"mul_1": x.nbytes, "a_layout": 0}
        for batch in (x, torch.randn(5, 64)):
            assert torch.equal(pipe(batch), model(batch))
        loss = pipe(x).square().mean()
        loss.backward()
        model(x).square().mean().backward()
        found = pipe.gradients()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        assert torch.equal(found[name], parameter.grad), name


CUTS = {"bert": "bert.encoder.layer.1", "llama": "model.layers.1", "gpt2": "transformer.h.1"}


@pytest.mark.parametrize("name", CUTS)
def test_masks_and_rotary_tables_are_made_where_they_are_used(name: str) -> None:
    model, batch = transformer(name).eval(), tokens(16, 64)
    with fxsplit.compile(
        model, ["cpu", "a/cpu"], cuts=[CUTS[name]], example_inputs=batch, budget=SLOW, transport="in_process"
    ) as pipe:
        plan = pipe.plan
        assert any("mask" in node for node in plan.recomputed[1])
        crossing = [edge.spec for edge in plan.edges if edge.target == 1 and edge.spec is not None]
        assert sum(spec.is_floating_point for spec in crossing) == 1, crossing
        assert all(spec.numel <= 16 * 64 for spec in crossing if not spec.is_floating_point)
        for other in (batch, tokens(3, 20), tokens(5, 64, padded=False)):
            assert torch.equal(pipe(**other).logits, model(**other).logits)
        assert plan == fxsplit.Plan.from_json(plan.to_json())


class Impure(nn.Module):
    """Float tables that may not be made twice: random, changed later, or made from what the forward changes."""

    count: Tensor

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.a, self.b = nn.Linear(64, 64), nn.Linear(64, 64)
        self.register_buffer("count", torch.zeros(64))

    def forward(self, x: Tensor) -> Tensor:
        table = torch.ones_like(x)
        if self.kind == "random":
            table = torch.rand_like(x)
        elif self.kind == "written":
            table[:, 0] = 2.0
        elif self.kind == "through a view":
            table.t()[0].fill_(2.0)
        elif self.kind == "buffer":
            self.count += 1
            table = table * self.count
        elif self.kind == "parameter":
            with torch.no_grad():
                table = table * self.a.bias
        return self.b(self.a(x)) * table  # type: ignore[no-any-return]


def test_a_pure_table_is_made_again() -> None:
    x = torch.randn(64, 64)
    traced = fxsplit.trace(Impure("none"), x, cuts=["b"])
    plan = fxsplit.plan(fxsplit.analyze(traced, x), ["cpu", "a/cpu"], cuts=["b"], budget=SLOW)
    assert plan.recomputed == ((), ("ones_like",))


@pytest.mark.parametrize(
    ("kind", "sent"),
    [("random", "rand_like"), ("written", "ones_like"), ("through a view", "ones_like"), ("parameter", "call_in")],
)
def test_what_is_not_repeatable_is_sent(kind: str, sent: str) -> None:
    torch.manual_seed(0)
    model, x = Impure(kind), torch.randn(64, 64)
    traced = fxsplit.trace(model, x, cuts=["b"])
    plan = fxsplit.plan(fxsplit.analyze(traced, x), ["cpu", "a/cpu"], cuts=["b"], budget=SLOW)
    assert plan.recomputed == ((), ())
    assert sent in {edge.value for edge in plan.edges if edge.target == 1}
    nodes = {node.name: node for node in traced.primary.module.graph.nodes}
    assert not is_repeatable(nodes[sent])


def test_what_the_forward_counts_is_sent_after_it_was_counted() -> None:
    """The buffer changes at each call, so it is counted once; the large table that follows from it is not sent."""
    model, x = Impure("buffer"), torch.randn(64, 64)
    with fxsplit.compile(
        model, ["cpu", "a/cpu"], cuts=["b"], example_inputs=x, budget=SLOW, transport="in_process"
    ) as pipe:
        assert pipe.plan.recomputed == ((), ("ones_like", "mul"))
        for _ in range(3):
            assert torch.equal(pipe(x), model(x))
        assert torch.equal(pipe.state_dict()["count"], model.count)


# ---------------------------------------------------------------------- the choice is the cheapest there is


def random_costs(seed: int) -> CostTable:
    """A random graph of cheap nodes and activations, four of them used behind the cut."""
    draw = random.Random(seed)
    count = draw.randint(3, 8)
    nodes, inputs = [], []
    for index in range(count + 1):
        made = [f"n{i}" for i in range(index)]
        used = draw.sample(["input", *made], k=min(draw.randint(0, 2), index + 1)) if index < count else made
        if index == count:
            used = draw.sample(made, k=min(4, count))
        layouts = tuple(name for name in used if draw.random() < 0.3)
        inputs.append(used)
        nodes.append(
            NodeCost(
                f"n{index}", "", "op", draw.choice([0, 10**6]), draw.choice([0, 1000]), 0,
                draw.choice([1, 20, 100]), draw.random() < 0.8, layouts,
            )
        )  # fmt: skip
    spec = TensorSpec((draw.choice([1, 10**4, 10**6]),), torch.float32)
    values = []
    for index in range(-1, count):
        name = "input" if index < 0 else f"n{index}"
        consumers = tuple(i for i, used in enumerate(inputs) if name in used)
        if consumers:
            values.append(Value(name, index, consumers, spec, index >= 0 and draw.random() < 0.2))
    return CostTable("Random", "0", 1, tuple(nodes), tuple(values), {f"n{count}": count}, ())


def seconds(flow: Flow, needs: Needs, free: frozenset[str], link: Link) -> float:
    """What one choice costs, counted plainly."""
    from fxsplit.planning.profile import PACKET_S
    from fxsplit.planning.recompute import _compute_s

    sent = sum(PACKET_S + flow.values[n].nbytes / link.bytes_per_s for n in needs.values - free)
    layouts = PACKET_S * len(needs.layouts)
    makers = [flow.maker(name) for name in needs.recomputed]
    return sent + layouts + sum(_compute_s(flow, m, 1 / 2.5e10) for m in makers if m is not None)


def test_the_choice_is_the_cheapest() -> None:
    """Against every subset of the nodes, on 200 random graphs."""
    link = Link(1e8, 0.0)
    placements = parse_devices(["cpu", "a/cpu"])
    chosen = 0
    for seed in range(200):
        costs = random_costs(seed)
        stage_of = [0] * (len(costs) - 1) + [1]
        flow = Flow(costs)
        needs = least_needs(costs, placements, stage_of, Links(link))[1]
        used = Uses.of(costs, 1, stage_of)
        cheap = [
            v.name for v in costs.values
            if v.producer >= 0 and costs.nodes[v.producer].is_repeatable and not v.is_activation
        ]  # fmt: skip
        free = frozenset(used.whole - set(cheap))
        best = min(
            seconds(flow, flow.needs(used, frozenset(subset), frozenset()), free, link)
            for size in range(len(cheap) + 1)
            for subset in itertools.combinations(cheap, size)
        )
        assert seconds(flow, needs, free, link) == pytest.approx(best, abs=1e-8), seed
        chosen += bool(needs.recomputed)
    assert chosen > 20
