"""The time of day jumps, by days and both ways: no time-out, heartbeat or snapshot goes by it."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import nn

import fxsplit
from tests.faults.scripts import CHAIN, ROOT, assert_same, said_by, small_model, start, train

STEPS = 14
CUTS = ["4", "8"]


def watched(watch: Callable[[int], nn.Module]) -> nn.Module:
    """The small model, with one more module in each of its three stages."""
    layers = list(small_model().children())
    return nn.Sequential(*layers[:3], watch(0), *layers[3:6], watch(1), *layers[6:], watch(2))


SCRIPT = f"""
import os, signal, struct, sys, time
sys.path.insert(0, {str(ROOT)!r})
import fxsplit, torch
from pathlib import Path
from torch import nn
from tests.faults.scripts import *
from tests.faults.test_clocks import watched

clock, folder = Path(sys.argv[1]), Path(sys.argv[2])
directory, days = folder / "snapshots", 86400.0
torch.set_num_threads(1)

class Clock(nn.Module):
    "Notes the time of day, wherever it runs."
    def __init__(self, stage):
        super().__init__()
        self.path = str(folder / f"clock-{{stage}}")
    def forward(self, x):
        with open(self.path, "a") as file:
            file.write(f"{{time.time()}}\\n")
        return x

def jump(ahead_days):
    before_s, steady_s = time.time(), time.monotonic()
    with open(clock, "r+b") as file:
        file.write(struct.pack("=q", int(ahead_days * days)))
    assert abs(time.time() - before_s) > 2 * days, "the clock has not jumped"
    assert time.monotonic() - steady_s < days / 2, "a clock that nobody can set has jumped"

def pipeline(timeout_s):
    snapshots = fxsplit.Snapshots(directory, every=2, keep=2)
    return fxsplit.compile(watched(Clock), CHAIN, cuts={CUTS}, chunks=2, verify=False, timeout_s=timeout_s,
                           snapshots=snapshots)

def pids(pipe):
    return {{worker.name: worker.pid for worker in pipe.workers}}

seen = set()
def look(pipe):
    pipe._engine._snapshotter.wait(60.0)
    seen.update(path.parent.name for path in directory.glob("*/manifest.json"))

with pipeline(120.0) as pipe:  # much shorter than the jumps
    torch.manual_seed(1)
    began = None
    def at(step):
        global began
        look(pipe)
        if step == 1:
            began = pids(pipe)
        if step in (3, 6):
            jump(3 if step == 3 else -3)
    train(pipe, 8, at)
    assert pids(pipe) == began, "a worker was lost"
look(pipe)
kept = sorted(path.parent.name for path in directory.glob("*/manifest.json"))
assert kept == sorted(seen)[-2:], (kept, sorted(seen))
assert fxsplit.load(directory).step == int(kept[-1].partition("-")[2])

with pipeline(5.0) as pipe:  # from the newest by its step, which three days ago is not
    assert pipe.committed_steps == int(kept[-1].partition("-")[2])
    print("from", pipe.committed_steps, flush=True)
    def hang(step):
        if step in (9, 11):
            jump(3 if step == 9 else -3)
            os.kill(pids(pipe)["two"], signal.SIGSTOP)
    torch.save(train(pipe, {STEPS}, hang), folder / "state.pt")
"""


CLOCK = """
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

static volatile int64_t *ahead_s = MAP_FAILED;

__attribute__((constructor)) static void begin(void) {
    int file = open(getenv("JUMPING_CLOCK"), O_RDONLY);
    ahead_s = mmap(NULL, sizeof *ahead_s, PROT_READ, MAP_SHARED, file, 0);
    close(file);
}

static int64_t ahead(void) { return ahead_s == MAP_FAILED ? 0 : *ahead_s; }

int clock_gettime(clockid_t clock, struct timespec *now) {
    int failed = syscall(SYS_clock_gettime, clock, now);
    if (!failed && (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE)) now->tv_sec += ahead();
    return failed;
}

int gettimeofday(struct timeval *now, void *zone) {
    int failed = syscall(SYS_gettimeofday, now, zone);
    if (!failed && now) now->tv_sec += ahead();
    return failed;
}

time_t time(time_t *result) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    if (result) *result = now.tv_sec;
    return now.tv_sec;
}
"""


@pytest.mark.faults
@pytest.mark.timeout(300)
@pytest.mark.skipif(sys.platform != "linux" or shutil.which("cc") is None, reason="needs Linux and a C compiler")
def test_training_goes_on_when_the_clock_jumps(tmp_path: Path) -> None:
    """By three days forward and six back: nobody is lost, the newest snapshots stay, a worker that hangs is found.

    A library in front of the system's gives all processes, torch's threads among them, a time of day that a file
    says; clocks that nobody can set go on. Whoever waits until a time of day waits for days then, or not at all.
    """
    model = watched(lambda stage: nn.Identity())
    with fxsplit.compile(model, CHAIN, cuts=CUTS, chunks=2, verify=False, transport="in_process") as pipe:
        torch.manual_seed(1)
        expected = train(pipe, STEPS)
    clock, script, library = (tmp_path / name for name in ("clock", "script.py", "clock.so"))
    clock.write_bytes(bytes(8))
    script.write_text(SCRIPT)
    (tmp_path / "clock.c").write_text(CLOCK)
    subprocess.run(["cc", "-shared", "-fPIC", "-o", library, tmp_path / "clock.c"], check=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LD_PRELOAD", str(library))
        patch.setenv("JUMPING_CLOCK", str(clock))
        process = start(script, str(clock), str(tmp_path))
    said, errors = said_by(process, 280.0)
    assert process.returncode == 0, errors
    assert 6 <= int(said.split()[1]) <= 8
    assert errors.count("are started again") >= 2, errors
    assert_same(torch.load(tmp_path / "state.pt"), expected)
    for stage in range(3):
        times = [float(line) for line in (tmp_path / f"clock-{stage}").read_text().splitlines()]
        steps = [(after - before) / 86400.0 for before, after in pairwise(times)]
        assert max(steps) > 2.0 and min(steps) < -5.0, "the clock of each process has jumped"


def test_no_deadline_depends_on_the_time_of_day() -> None:
    """Nothing in the package reads it but monotonic clocks."""
    for folder in ("fxsplit", "runtime", "passes"):
        for path in (ROOT / folder).rglob("*.py"):
            text = path.read_text()
            assert "time.time(" not in text and "datetime.now(" not in text, path
