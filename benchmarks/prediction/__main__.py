"""Step times that the planner predicts, beside those that are measured, on links of two machines.

python -m benchmarks.prediction                 # all that is not in results.json yet; needs root
python -m benchmarks.prediction --report        # the tables of what is there, into the README
"""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

import fxsplit
from benchmarks.prediction.report import report
from benchmarks.prediction.tasks import CHUNKS, CODECS, DEVICES, LINKS, NAMES, task
from benchmarks.readme import fill
from benchmarks.two_machines.hosts import ADDRESSES, on_host, two_hosts
from fxsplit.opening import trace_for_planning
from fxsplit.planning import Guard, Plan, Profile
from fxsplit.planning.calibration import CLIENT, WORKER, Calibration
from fxsplit.planning.link_file import load_links
from fxsplit.trace import Arguments

RESULTS = Path(__file__).parent / "results.json"
WARM_UP, ROUNDS = 3, 7
CHOICE = "chosen"
SCHEDULE = "gpipe"


@dataclass
class Running:
    """The processes of one plan."""

    client: subprocess.Popen[str]
    server: subprocess.Popen[str] | None
    seconds: list[float] = field(default_factory=list)

    @classmethod
    def start(cls, name: str, plan: Plan, path: Path, port: int) -> Running:
        """Starts them; they wait for the first step."""
        plan.save(path)
        module = "benchmarks.prediction.client"
        client, server = _pair(
            [sys.executable, "-m", module, name, str(path), str(port)], port, len(plan.parts) > 1
        )
        return cls(client, server)

    def step(self) -> float:
        """Seconds of a step."""
        assert self.client.stdin is not None and self.client.stdout is not None
        self.client.stdin.write("step\n")
        self.client.stdin.flush()
        line = self.client.stdout.readline()
        if not line:
            raise RuntimeError(f"the client ended with status {self.client.wait()}")
        return float(json.loads(line)["step_s"])

    def end(self) -> None:
        """Ends both."""
        assert self.client.stdin is not None
        self.client.stdin.close()
        _end(self.client, self.server)


def _pair(command: Sequence[str], port: int, with_server: bool) -> tuple[Any, Any]:
    quiet = {
        **os.environ,
        "FXSPLIT_TOKEN": secrets.token_hex(8),
        "OMP_NUM_THREADS": "1",
        "PYTHONWARNINGS": "ignore",
    }
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    client = subprocess.Popen(on_host(0, *command), text=True, env=quiet, **pipes)
    if not with_server:
        return client, None
    join = ["worker", "--join", f"{ADDRESSES[0]}:{port}", "--name", "server", "--patience", "120"]
    silent: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    server = subprocess.Popen(on_host(1, sys.executable, "-m", "fxsplit", *join), env=quiet, **silent)
    return client, server


def _end(*processes: Any) -> None:
    for process in processes:
        if process is None:
            continue
        try:
            process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def plans_of(name: str, links: Mapping[Any, Any], measured: Mapping[str, Calibration]) -> dict[str, Plan]:
    """The plans with a given cut, one for each compressor, and the one that the planner chooses."""
    found = task(name)
    example = Arguments.of(found.batch)
    traced = trace_for_planning(found.model, example, verify=False)
    costs = fxsplit.analyze(traced, example)
    profile = Profile.of(costs, measured, links)
    common: dict[str, Any] = {"schedule": SCHEDULE, "profile": profile}
    plans = {
        codec: fxsplit.plan(
            costs, DEVICES, cuts=[found.cut], compressor=codec, gradient_compressor="same", chunks=CHUNKS, **common
        )
        for codec in CODECS
    }
    free: dict[str, Any] = {"compressor": "auto", "guard": Guard(CODECS[1:]), "placement": "auto"}
    plans[CHOICE] = fxsplit.plan(costs, DEVICES, chunks="auto", **free, **common)
    return plans


def _measured_links(rate: str | None, folder: Path) -> dict[Any, Any]:
    with two_hosts(rate):
        path = folder / "links.json"
        _end(*_pair([sys.executable, "-m", "benchmarks.prediction.prober", str(path), "29700"], 29700, True))
        return dict(load_links(path))


def measure(
    name: str, link: str, links: Mapping[Any, Any], measured: Mapping[str, Calibration], folder: Path
) -> dict[str, Any]:
    """Steps of all plans in turns."""
    plans = plans_of(name, links, measured)
    with two_hosts(LINKS[link]), ExitStack() as stack:
        running = {}
        for number, (label, plan) in enumerate(plans.items()):
            one = Running.start(name, plan, folder / f"{label}.json", 29701 + number)
            stack.callback(one.end)
            for _ in range(WARM_UP):
                one.step()
            running[label] = one
        for _ in range(ROUNDS):
            for one in running.values():
                one.seconds.append(one.step())
    rows = {
        label: {
            "cuts": list(plan.cut_names),
            "devices": list(plan.devices),
            "compressor": plan.compressor,
            "gradient_compressor": plan.gradient_compressor,
            "chunks": plan.chunks,
            "predicted_s": plan.predicted_step_s,
            "measured_s": running[label].seconds,
        }
        for label, plan in plans.items()
    }
    rates = {f"{a} -> {b}": [each.bytes_per_s, each.latency_s] for (a, b), each in links.items()}
    return {"plans": rows, "links": rates, "date": time.strftime("%Y-%m-%d")}


def _calibrated(name: str, role: str, folder: Path) -> Calibration:
    """What was measured in a process of its own, in a role, by this run."""
    path = folder / f"{name} {role}.json"
    if not path.exists():
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
        command = [sys.executable, "-m", "benchmarks.prediction.calibrator", name, role, str(path)]
        subprocess.run(command, env=environment, check=True)
    return Calibration.load(path)


def main(
    only: Annotated[str, typer.Option(help="Model names with commas.")] = ",".join(NAMES),
    links: Annotated[str, typer.Option(help="Links with commas.")] = ",".join(LINKS),
    as_report: Annotated[bool, typer.Option("--report", help="Measure nothing.")] = False,
) -> None:
    """Measures what is missing; prints the tables, and fills them into the README."""
    torch.set_num_threads(1)
    results: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    with tempfile.TemporaryDirectory() as folder:
        for link in links.split(","):
            wanted = [name for name in only.split(",") if f"{name} {link}" not in results]
            if as_report or not wanted:
                continue
            rates = _measured_links(LINKS[link], Path(folder))
            for name in wanted:
                measured = {
                    device: _calibrated(name, role, Path(folder))
                    for device, role in zip(DEVICES, (CLIENT, WORKER), strict=True)
                }
                results[f"{name} {link}"] = measure(name, link, rates, measured, Path(folder))
                RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    print(report(results))
    fill(RESULTS.with_name("README.md"), "results", report(results))


if __name__ == "__main__":
    typer.run(main)
