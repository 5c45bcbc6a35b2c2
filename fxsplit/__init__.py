"""fxsplit: split an unmodified PyTorch model over uneven devices and slow links.

    pipe = fxsplit.compile(model, devices=["cpu", "cuda"], compressor="sortquant8")
    loss_fn(pipe(x), y).backward()

Each step of the road can be called alone: `trace`, `analyze`, `plan`, `rewrite`, `split`.
"""

from fxsplit.analyze import analyze
from fxsplit.compile import compile
from fxsplit.compressors import Compressor, compressor
from fxsplit.costs import CostTable
from fxsplit.errors import FxsplitError
from fxsplit.measure import calibrate
from fxsplit.passes import rewrite
from fxsplit.planning import Budget, Guard, Plan, Profile, plan
from fxsplit.runtime.pipeline import Pipeline
from fxsplit.runtime.probe import probe
from fxsplit.runtime.torchrun import serve
from fxsplit.snapshots import Checkpoint, Snapshots, load
from fxsplit.split import split
from fxsplit.trace import TracedModel, trace

__all__ = [
    "Budget",
    "Checkpoint",
    "Compressor",
    "CostTable",
    "FxsplitError",
    "Guard",
    "Pipeline",
    "Plan",
    "Profile",
    "Snapshots",
    "TracedModel",
    "analyze",
    "calibrate",
    "compile",
    "compressor",
    "load",
    "plan",
    "probe",
    "rewrite",
    "serve",
    "split",
    "trace",
]
