"""Workers and clients killed at random moments: what is left of the training afterwards."""

from __future__ import annotations

import json
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch

import fxsplit

from .faults import MOMENTS, Killer
from .training import compiled, train, undisturbed

STEPS = 60


def kill_workers(kills: int) -> dict[str, Any]:
    """Kills workers, five in a run, one at each kind of moment; compares the end with an undisturbed run."""
    expected, _ = undisturbed(STEPS)
    moments = tuple(MOMENTS)
    deaths: list[tuple[str, str]] = []
    recovery_s: list[float] = []
    identical = runs = 0
    while len(deaths) < kills:
        asked = moments[: kills - len(deaths)]
        commits: list[float] = []
        with tempfile.TemporaryDirectory() as directory, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with compiled(fxsplit.Snapshots(directory, every=5)) as pipe:
                torch.manual_seed(1)
                killer = Killer(pipe, asked, seed=runs)
                killer.start()

                def log(number: int, loss: float, at: float, of: Any = (commits, killer)) -> None:
                    of[0].append(at)
                    of[1].committed()

                found = train(pipe, STEPS, log, lambda: False)
        runs += 1
        identical += found == expected
        deaths += [(moment, place) for moment, place, _ in killer.deaths]
        recovery_s += [min(at for at in commits if at > died) - died for _, _, died in killer.deaths]
        print(f"run {runs}: {len(killer.deaths)} killed, {'identical' if found == expected else 'DIFFERENT'}")
    return {
        "kills": len(deaths),
        "at": {place: sum(p.split(" ")[0] == place for _, p in deaths) for place in _words(deaths)},
        "runs": runs,
        "identical_runs": identical,
        "recovery_median_s": round(statistics.median(recovery_s), 2),
        "recovery_max_s": round(max(recovery_s), 2),
    }


def _words(deaths: list[tuple[str, str]]) -> list[str]:
    return sorted({place.split(" ")[0] for _, place in deaths})


def kill_clients(kills: int) -> dict[str, Any]:
    """Kills the client, five times in a run, and runs it again; compares the end with an undisturbed run."""
    expected, losses = undisturbed(STEPS)
    numbers = random.Random(0)
    done = runs = identical = 0
    resumed: list[int] = []
    repeated = 0
    while done < kills:
        with tempfile.TemporaryDirectory() as folder:
            log, state = Path(folder, "log"), Path(folder, "state")
            command = [sys.executable, "-m", "benchmarks.reliability.training", f"{folder}/snapshots", str(STEPS)]
            for life in range(min(5, kills - done) + 1):
                process = subprocess.Popen([*command, str(log), str(state)], stderr=subprocess.PIPE, text=True)
                if life == min(5, kills - done):
                    said = process.communicate(timeout=300)[1]
                    assert process.returncode == 0, said
                    break
                _await_step(log, life, numbers.randint(2, 9), process)
                time.sleep(numbers.random() * 0.5)
                process.send_signal(signal.SIGKILL)
                process.communicate()
            lines = [json.loads(line) for line in log.read_text().splitlines()]
            done += life
            runs += 1
            starts = [line[1] for line in lines if line[0] == "from"]
            resumed += starts[1:]
            steps = [line for line in lines if line[0] != "from"]
            repeated += len(steps) - STEPS
            same_losses = all(loss == losses[number] for number, loss, _ in steps)
            identical += state.read_text() == expected and same_losses
            print(f"run {runs}: began at steps {starts}, {'identical' if identical == runs else 'DIFFERENT'}")
    return {"kills": done, "runs": runs, "identical_runs": identical, "resumed_at": resumed, "repeated": repeated}


def _await_step(log: Path, life: int, steps: int, process: subprocess.Popen[str]) -> None:
    """Returns when a process has made so many steps of its own."""
    while process.poll() is None:
        lines = log.read_text().splitlines() if log.exists() else []
        starts = [index for index, line in enumerate(lines) if line.startswith('["from"')]
        if len(starts) > life and len(lines) - starts[life] - 1 >= steps:
            return
        time.sleep(0.01)
