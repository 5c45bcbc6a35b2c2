"""The plan itself: invariants, JSON in and out, files, and how it prints."""

from __future__ import annotations

import dataclasses
import io
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from fxsplit.costs import CostTable, NodeCost, Value
from fxsplit.errors import PlanError
from fxsplit.planning import Cut, Edge, Part, Plan, document, parse_devices, plan
from fxsplit.planning.parts import edges_across, is_local
from fxsplit.spec import TensorSpec


def toy(modules: tuple[str, ...] = ("stem", "body", "head")) -> CostTable:
    """A chain of one node a module."""
    nodes = tuple(NodeCost(f"n{i}", name, "Conv2d", 10**8, 3200, 4000) for i, name in enumerate(modules))
    spec = TensorSpec((8, 100), torch.float32)
    values = tuple(Value(f"v{i}", i, (i + 1,), spec, i >= 0) for i in range(-1, len(modules)))
    return CostTable("Toy", "f00d", 8, nodes, values, {name: i for i, name in enumerate(modules)})


PLAN = plan(toy(), ["cpu", "server/cuda:0", "cpu"], compressor="sortquant8", gradient_compressor="uniform8")
FILE: dict[str, Any] = json.loads(PLAN.to_json())

words = st.text(st.characters(categories=("L", "N", "P", "S")), max_size=12)
counts = st.integers(0, 2**63 - 1)
bytes_ = st.integers(0, 2**60)  # those of six edges, summed, still fit a document
seconds = st.floats(0, 1e9)
codecs = st.sampled_from(["none", "uniform8", "sortquant8(split=4)"])
dtypes = st.sampled_from([torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.float8_e4m3fn])
shapes = st.lists(st.integers(0, 1000), max_size=4).map(tuple)
specs = st.none() | st.builds(TensorSpec, shapes, dtypes)


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    """Any plan whose fields do not contradict each other."""
    others = st.sampled_from(["cpu", "cuda", "a/cuda:0", "b.c/cpu"])
    devices = ("cpu", *draw(st.lists(others, max_size=4)))
    placements = parse_devices(devices)
    stages, workers = len(devices), tuple(placement.worker for placement in placements)
    parts = tuple(
        Part(
            stage, placement.spelling, placement.worker, draw(st.lists(words, max_size=3).map(tuple)),
            draw(counts), draw(counts), draw(counts), draw(counts),
            draw(seconds), draw(seconds), draw(seconds), draw(seconds),
        )
        for stage, placement in enumerate(placements)
    )  # fmt: skip
    ends = st.tuples(words, st.integers(-1, stages - 1), st.integers(0, stages))
    edges = []
    for value, source, target in sorted(draw(st.sets(ends.filter(lambda end: end[1] < end[2]), max_size=6))):
        spec = draw(specs)
        raw = spec.nbytes if spec is not None else 0
        local = is_local(source, target, workers)
        wire = (0, 0, "none", "none") if local else (draw(bytes_), draw(bytes_), draw(codecs), draw(codecs))
        edges.append(Edge(value, source, target, spec, raw, *wire))
    cuts = tuple(Cut(draw(words), stage, edges_across(stage, edges, workers)) for stage in range(1, stages))
    recomputed = tuple(draw(st.lists(words, max_size=2).map(tuple)) for _ in devices)
    return Plan(
        draw(words), draw(words), draw(st.integers(1, 2**40)), devices, cuts, parts, tuple(edges), recomputed,
        draw(st.integers(1, 999)), "gpipe", draw(codecs), draw(codecs), draw(seconds), draw(seconds),
        draw(st.booleans()), draw(words),
    )  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(plans())
def test_json_round_trip(found: Plan) -> None:
    assert Plan.from_json(found.to_json()) == found
    assert str(found) and found._repr_html_()


def test_a_plan_is_a_value() -> None:
    assert pickle.loads(pickle.dumps(PLAN)) == PLAN and hash(PLAN) == hash(Plan.from_json(PLAN.to_json()))
    changing: Any = PLAN
    with pytest.raises(dataclasses.FrozenInstanceError):
        changing.chunks = 2


def test_the_document_is_what_other_programs_read() -> None:
    assert [part["device"] for part in FILE["parts"]] == ["cpu", "server/cuda:0", "cpu"]
    assert {"macs", "parameter_bytes", "step_s", "modules"} <= set(FILE["parts"][0])
    cut = FILE["cuts"][0]
    assert (cut["name"], cut["raw_bytes"], cut["compressor"]) == ("body", 3200, "sortquant8")
    assert cut["wire_bytes"] == PLAN.cuts[0].wire_bytes < 1600
    assert FILE["edges"][1]["spec"] == {"shape": [8, 100], "dtype": "float32"}


def test_every_truncation_is_refused() -> None:
    text = PLAN.to_json()
    for length in range(len(text)):
        with pytest.raises(PlanError, match="damaged"):
            Plan.from_json(text[:length])


def every_path(data: object, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths to all values inside a JSON value."""
    inner = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    return [path] * bool(path) + [deep for key, value in inner for deep in every_path(value, (*path, key))]


@pytest.mark.parametrize("path", every_path(FILE), ids=lambda path: ".".join(map(str, path)))
def test_every_field_is_checked(path: tuple[Any, ...]) -> None:
    *outer, last = path
    wrong: list[Any] = [None, True, -2, 1.5, "\x1b[31m", [[]], {"a": 1}, 2**70]
    for value in wrong:
        data = json.loads(PLAN.to_json())
        place = data
        for key in outer:
            place = place[key]
        if type(place[last]) is type(value) or (value == 1.5 and "_s" in str(last)):
            continue  # of the right type, and for a time of the right range
        if value is None and last == "spec":
            continue  # a value that is no tensor; its bytes are refused, which another test holds
        place[last] = value
        with pytest.raises(PlanError, match="damaged") as caught:
            Plan.from_json(json.dumps(data))
        assert str(path[0]) in str(caught.value)
    if isinstance(last, str):
        del place[last]
        with pytest.raises(PlanError, match=f"no key '{last}'"):
            Plan.from_json(json.dumps(data))


def changed(change: Callable[[dict[str, Any]], object]) -> str:
    data = json.loads(PLAN.to_json())
    change(data)
    return json.dumps(data)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda data: data.update(version=4), r"newer version[^$]*plan version 4[^$]*allowed: 3"),
        (lambda data: data.update(version=1), r"older version[^$]*plan version 1[^$]*plan again"),
        (lambda data: data["hops"][0].update(source=5), r"plan\.hops\[0\]"),
        (lambda data: data["links"][0].update(bytes_per_s=0), r"plan\.links\[0\]\.bytes_per_s"),
        (lambda data: data.update(version=0), r"plan\.version"),
        (lambda data: data.update(extra=1), r"unknown key 'extra'"),
        (lambda data: data.pop("chunks"), r"no key 'chunks'"),
        (lambda data: data.update(chunks=0), r"plan\.chunks[^$]*1 or more"),
        (lambda data: data.update(schedule="2f2b"), r"plan\.schedule[^$]*gpipe"),
        (lambda data: data.update(compressor="zip"), r"plan\.compressor[^$]*unknown compressor"),
        (lambda data: data.update(devices=["cpu", "tpu", "cpu"]), r"plan\.devices[^$]*tpu"),
        (lambda data: data.update(devices=["cpu", "cpu"]), "3 parts and 2 cuts"),
        (lambda data: data["edges"][0].update(wire_bytes=1), "within one worker"),
        (lambda data: data.update(devices=["cpu", "cpu", "cpu"]), r"plan\.parts\[1\]"),
        (lambda data: data["parts"].pop(), "damaged"),
        (lambda data: data["parts"][1].update(stage=2), r"plan\.parts\[1\]"),
        (lambda data: data["parts"][1].update(worker="other"), r"plan\.parts\[1\]"),
        (lambda data: data["cuts"][1].update(stage=1), r"plan\.cuts\[1\]"),
        (lambda data: data["cuts"][0].update(wire_bytes=7), r"plan\.cuts\[0\]\.wire_bytes[^$]*its edges"),
        (lambda data: data["edges"].append(data["edges"][0]), "the same edge twice"),
        (lambda data: data["edges"][1].update(source=2), r"plan\.edges\[1\][^$]*forward"),
        (lambda data: data["edges"][1].update(target=9), r"plan\.edges\[1\][^$]*forward"),
        (lambda data: data["edges"][1].update(raw_bytes=1), r"raw_bytes[^$]*float32\[8, 100\]"),
        (lambda data: data["edges"][1].update(spec=None), r"raw_bytes[^$]*None"),
        (lambda data: data["edges"][1]["spec"].update(dtype="nn"), r"spec\.dtype"),
        (lambda data: data["edges"][1]["spec"].update(shape=[2**40, 2**40]), "less than"),
    ],
)
def test_contradictions_are_refused(change: Callable[[dict[str, Any]], object], says: str) -> None:
    with pytest.raises(PlanError, match=says):
        Plan.from_json(changed(change))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "line 1, column 1"),
        ("null", "an object"),
        ("[]", "an object"),
        ("[" * 100_000, "damaged"),
        ("1" * 10_000, "damaged"),
        ('{"version": NaN}', "finite"),
        ('{"version": 1, "version": 2}', "each key once"),
        ('{"version": 99, "anything": "new"}', "newer version"),
    ],
)
def test_what_is_no_plan_is_refused(text: str, says: str) -> None:
    with pytest.raises(PlanError, match=says):
        Plan.from_json(text)


def test_too_large_a_document_is_not_parsed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(document, "SIZE_LIMIT", 100)
    PLAN.save(tmp_path / "plan.json")
    with pytest.raises(PlanError, match="too large"):
        Plan.load(tmp_path / "plan.json")
    with pytest.raises(PlanError, match="damaged"):
        Plan.from_json(PLAN.to_json())


def test_files(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text("old")
    PLAN.save(path)
    assert Plan.load(path) == Plan.load(str(path)) == PLAN
    assert [file.name for file in tmp_path.iterdir()] == ["plan.json"]


def test_a_failed_save_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "plan.json"
    path.write_text("old")

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(PlanError, match=r"cannot be written[^$]*No space"):
        PLAN.save(path)
    assert path.read_text() == "old" and len(list(tmp_path.iterdir())) == 1


def test_bad_files(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    for bad in (path, tmp_path):
        with pytest.raises(PlanError, match="cannot be read"):
            Plan.load(bad)
    with pytest.raises(PlanError, match="cannot be written"):
        PLAN.save(tmp_path / "no" / "plan.json")
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(PlanError, match="UTF-8"):
        Plan.load(path)
    path.write_text("{")
    with pytest.raises(PlanError, match=r"plan\.json, line 1"):
        Plan.load(path)


def test_a_plan_knows_its_model() -> None:
    PLAN.check_model(toy())
    PLAN.check_model(dataclasses.replace(toy(), batch_size=2))
    with pytest.raises(PlanError, match=r"another model[^$]*Toy \(f00d\)[^$]*Other \(beef\)"):
        PLAN.check_model(dataclasses.replace(toy(), model="Other", fingerprint="beef"))
    with pytest.raises(PlanError, match="not in the model"):
        PLAN.check_model(dataclasses.replace(toy(), cut_points={"stem": 0, "head": 2}))


def test_fields_that_contradict_each_other_make_no_plan() -> None:
    with pytest.raises(PlanError, match="2 parts and 2 cuts"):
        dataclasses.replace(PLAN, parts=PLAN.parts[:2])
    with pytest.raises(PlanError, match=r"plan\.cuts\[0\]"):
        dataclasses.replace(PLAN, cuts=(dataclasses.replace(PLAN.cuts[0], edges=()), PLAN.cuts[1]))


def test_it_prints_as_a_table() -> None:
    assert str(PLAN).splitlines() == [
        "Toy, batch 8: gpipe, chunks 1, sortquant8 / uniform8",
        "",
        "  stage   device          modules     MACs   parameters   over cut   on wire   gradients       time",
        " ───────────────────────────────────────────────────────────────────────────────────────────────────",
        "      0   cpu (client)    stem      1.00e8      4.00 kB                                    ~12.0 ms",
        "      1   server/cuda:0   body      1.00e8      4.00 kB    3.20 kB     832 B       808 B   ~80.0 us",
        "      2   cpu (client)    head      1.00e8      4.00 kB    3.20 kB     832 B       808 B   ~12.0 ms",
        "",
        "predicted step 26.6 ms (optimal)",
        "beside it: all on server/cuda:0 643 us, the raw input sent 13.8 ms, no compression 25.7 ms, all on",
        "cpu 36.1 ms",
        "cuts chosen; estimated: cpu 2.50e10 MACs/s, cuda 5.00e12 MACs/s; links 1.00 GB/s, 300 us (estimated)",
    ]


def test_names_cannot_break_out_of_the_table() -> None:
    odd = plan(toy(("[bold]<b>x", "<script>", "&amp;")), ["cpu", "a/cpu", "cpu"])
    assert "[bold]<b>x" in str(odd) and "<script>" in str(odd)
    html = odd._repr_html_()
    assert "<script>" not in html and "&lt;script&gt;" in html and "&amp;amp;" in html
    console = Console(width=200, file=io.StringIO())
    with console.capture() as printed:
        console.print(odd)
    assert "[bold]<b>x" in printed.get()
