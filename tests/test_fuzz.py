"""Whatever a file, a text or a stranger says: an error of fxsplit's own, in time, or a result that holds."""

from __future__ import annotations

import contextlib
import json
import math
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

import fxsplit
from fxsplit.cli import app
from fxsplit.commands.inputs import parse_inputs
from fxsplit.commands.planning import read_budget, read_guard, read_prices
from fxsplit.compressors import compressor
from fxsplit.compressors.spelling import parse_spelling
from fxsplit.errors import FxsplitError
from fxsplit.model_source import load_model
from fxsplit.planning import parse_devices
from fxsplit.planning.calibration import Calibration, MeasuredCodec, MeasuredNode
from fxsplit.planning.link_file import load_links
from fxsplit.planning.units import parse_bandwidth, parse_bytes, parse_count, parse_seconds
from fxsplit.runtime.checkpointing import parse_policies
from fxsplit.runtime.handshake import Identity, parse_address, receive_message, send_message
from fxsplit.runtime.place import Place
from fxsplit.snapshots.manifest import FORMAT, Manifest

PARSERS: dict[str, Callable[[str], Any]] = {
    "bytes": parse_bytes,
    "bandwidth": parse_bandwidth,
    "seconds": parse_seconds,
    "count": parse_count,
    "spelling": parse_spelling,
    "compressor": compressor,
    "devices": lambda text: parse_devices(text.split(",")),
    "address": lambda text: parse_address(text, "here"),
    "inputs": lambda text: parse_inputs([text]),
    "policies": lambda text: parse_policies(text, 3),
    "plan": fxsplit.Plan.from_json,
    "calibration": Calibration.from_json,
    "budget": lambda text: read_budget(text.split(","), [text], [text]),
    "prices": lambda text: read_prices(text.split(",")),
    "guard": read_guard,
    "model": load_model,
}
PIECES = st.sampled_from(
    [
        "uniform8",
        "sortquant",
        "(",
        ")",
        ",",
        "=",
        "+",
        "rank=",
        "1e999",
        "-1",
        "nan",
        "GB",
        "Mbit/s",
        "ms",
        "cpu",
        "/",
        ":",
    ]
)
TEXTS = st.one_of(st.text(max_size=60), st.lists(PIECES, max_size=8).map("".join))
JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8)),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=8), inner, max_size=4)),
    max_leaves=12,
)


@pytest.mark.parametrize("name", PARSERS)
@settings(max_examples=150, deadline=None)
@given(text=TEXTS)
def test_no_text_breaks_a_parser(name: str, text: str) -> None:
    with contextlib.suppress(FxsplitError):
        found = PARSERS[name](text)
        if isinstance(found, float):
            assert math.isfinite(found) and found >= 0


def test_no_file_has_a_name_that_long() -> None:
    for name in ("x" * 5000, "x:" + "y" * 5000, "a/" * 3000 + "b.py"):
        with pytest.raises(FxsplitError, match=r"there is no such model file|models are not loaded from"):
            load_model(name)


MANIFEST: dict[str, Any] = {
    "format": FORMAT,
    "step": 3,
    "model": "M",
    "keys": ["a"],
    "ties": {"a": "a"},
    "split": "s",
    "optimizers": [{"kind": "k", "groups": [{"options": {"lr": 0.1}, "parameters": ["a"]}]}],
    "loop": {"passes": 1, "batches": 2, "kept": {"scheduler": {"last_epoch": 3}}},
    "parts": [
        {"worker": "w", "file": "part-000.safetensors", "size_bytes": 0, "sha256": "0" * 64, "values": {"a": 1}}
    ],
    "versions": {"torch": "2"},
}


def paths(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The way to every value in a JSON document."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [at, *(path for key, entry in inner for path in paths(entry, (*at, key)))]


def changed(document: Any, path: tuple[Any, ...], value: Any, removes: bool) -> Any:
    """A copy in which what is at a path is another, or is not there."""
    copied = json.loads(json.dumps(document))
    holder = copied
    for key in path[:-1]:
        holder = holder[key]
    if removes:
        del holder[path[-1]]
    else:
        holder[path[-1]] = value
    return copied


@settings(max_examples=400, deadline=None)
@given(st.sampled_from(paths(MANIFEST)[1:]), JSON, st.booleans())
def test_no_manifest_is_taken_on_trust(path: tuple[Any, ...], value: Any, removes: bool) -> None:
    """One value anywhere is another, or is not there."""
    document = changed(MANIFEST, path, value, removes)
    assert Manifest.from_json(MANIFEST).step == 3
    with contextlib.suppress(FxsplitError):
        found = Manifest.from_json(document)
        assert all("/" not in part.file and ".." not in part.file for part in found.parts)
        assert all(0 <= part.size_bytes < 2**63 for part in found.parts)


CALIBRATION: dict[str, Any] = json.loads(
    Calibration(
        *("M", "0" * 16, "cpu", "here", "2", 1, "device", 2, 0.5, 0.5),
        nodes=(MeasuredNode("a", "b", 0.1, 0.2, 0.0, 0.0),),
        codecs=(MeasuredCodec("uniform8", 1e-9, 1e-9, 1e-6),),
    ).to_json()
)
LINKS: dict[str, Any] = {
    "version": 1,
    "links": [{"sender": "a", "receiver": "b", "bytes_per_s": 1e6, "latency_s": 0.1, "origin": "measured"}],
}


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.sampled_from([(kind, path) for kind in (0, 1) for path in paths((CALIBRATION, LINKS)[kind])[1:]]),
    JSON,
    st.booleans(),
)
def test_no_calibration_or_file_of_links_is_taken_on_trust(
    tmp_path: Path, place: tuple[int, tuple[Any, ...]], value: Any, removes: bool
) -> None:
    kind, path = place
    document = changed((CALIBRATION, LINKS)[kind], path, value, removes)
    file = tmp_path / "file.json"
    file.write_text(json.dumps(document))
    with contextlib.suppress(FxsplitError):
        if kind == 0:
            assert all(math.isfinite(node.forward_s) for node in Calibration.load(file).nodes)
        else:
            assert all(link.bytes_per_s > 0 and link.latency_s >= 0 for link in load_links(file).values())


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.binary(max_size=300))
def test_no_file_breaks_loading(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_bytes(data)
    with pytest.raises(FxsplitError):
        fxsplit.load(tmp_path)
    (tmp_path / "plan.json").write_bytes(data)
    for read in (fxsplit.Plan.load, Calibration.load, load_links):
        with pytest.raises(FxsplitError):
            read(tmp_path / "plan.json")


@settings(max_examples=100, deadline=None)
@given(st.one_of(st.binary(max_size=200), JSON.map(lambda value: json.dumps(value).encode())))
def test_no_message_breaks_the_handshake(data: bytes) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.settimeout(5.0)
        theirs.sendall(len(data).to_bytes(4, "big") + data)
        theirs.shutdown(socket.SHUT_WR)
        with contextlib.suppress(FxsplitError):
            message = receive_message(ours)
            assert isinstance(message, dict)
            Identity.from_json(message)


@given(JSON)
def test_no_sign_of_life_breaks_the_client(message: Any) -> None:
    place = Place.of_message(message)
    assert isinstance(str(place), str) and len(place.work) <= 200


@given(st.dictionaries(st.text(max_size=10), JSON, max_size=4))
def test_messages_arrive_as_they_were_sent(message: dict[str, Any]) -> None:
    message.pop("refused", None)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        thread = threading.Thread(target=send_message, args=(theirs, message))
        thread.start()
        found = receive_message(ours)
        thread.join()
    assert json.dumps(found) == json.dumps(message)


COMMANDS: dict[str, list[str]] = {
    "analyze": ["nowhere.py"],
    "trace": ["nowhere.py"],
    "bench": ["nowhere.py"],
    "calibrate": ["nowhere.py"],
    "probe": ["--devices=,"],
    "worker": ["--join=nowhere", "--name=a"],
}
"""What every command line ends with, so that nothing is run: these options count, whatever was said before."""


def valued_options(command: str) -> list[str]:
    """The options of a command that take a value."""
    group: Any = typer.main.get_command(app)
    assert set(group.commands) == set(COMMANDS), "each command has a line above"
    options = [each for each in group.commands[command].params if each.param_type_name == "option"]
    return [each.opts[0] for each in options if not each.is_flag]


LINES = st.sampled_from(sorted(COMMANDS)).flatmap(
    lambda command: st.tuples(
        st.just(command), st.lists(st.tuples(st.sampled_from(valued_options(command)), TEXTS), max_size=4)
    )
)


@settings(max_examples=300, deadline=None)
@given(LINES)
def test_no_command_line_gives_a_traceback(line: tuple[str, list[tuple[str, str]]]) -> None:
    """Any text for any option: an exit status and a message."""
    command, given = line
    options = [f"{option}={text}".replace("\0", "") for option, text in given]
    result = CliRunner().invoke(app, [command, *options, *COMMANDS[command]], env={"FXSPLIT_TOKEN": "t"})
    assert result.exit_code in (1, 2) and result.stderr
    assert isinstance(result.exception, SystemExit), result.exception


@settings(max_examples=60, deadline=None)
@given(st.sampled_from([*COMMANDS, "plan", ""]), st.lists(TEXTS, max_size=4))
def test_no_words_give_a_traceback(command: str, words: list[str]) -> None:
    """Any words behind a command, or behind none."""
    clean = [word.replace("\0", "") for word in words if not word.endswith(".py")]
    result = CliRunner().invoke(app, [command, *clean, "--no-such-option"])
    assert result.exit_code == 2 and isinstance(result.exception, SystemExit), result.exception


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from(["uniform8", "sortquant8", "fastquant4", "topk", "fp16", "none", "kmeans4"]),
    st.lists(st.integers(0, 6), min_size=1, max_size=4),
    st.sampled_from([0.0, 1.0, 1e-30, 1e30, -7.5]),
)
def test_codecs_send_what_they_say(spelling: str, shape: list[int], scale: float) -> None:
    codec = compressor(spelling)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(len(shape))) * scale
    spec = fxsplit.spec.TensorSpec.of(x)
    try:
        wire = codec.wire(spec)
    except FxsplitError:
        return
    if spelling == "fp16" and x.numel() and float(x.abs().max()) > 65520:
        with pytest.raises(FxsplitError, match="cannot hold values of this size"):
            codec.encode(x)
        return
    payload = codec.encode(x)
    assert [fxsplit.spec.TensorSpec.of(t) for t in payload] == list(wire)
    back = codec.decode(payload, spec)
    assert back.shape == x.shape and back.dtype == x.dtype and bool(torch.isfinite(back).all())
