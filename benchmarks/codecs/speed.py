"""Time and memory of encode and decode, as multiples of a plain copy of the tensor in the same run."""

from __future__ import annotations

import datetime
import os
import platform
import time
import warnings
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fxsplit.spec import TensorSpec

from .data import made
from .first_use import FIRST_USED, measure_first_use
from .subjects import Subject, subjects
from .timing import FRESH, extra_bytes, on_one_core, regime, regimes, seconds

COPY, COPY_INTO = "copy to a new tensor", "copy into a tensor"
MAP = (32, 112, 112)
"""Channels, height and width of one sample."""

MOST_SETS = 32

Found = dict[str, Any]
"""What was measured, as JSON: see `measure_speed`."""


def measure_speed(
    device: torch.device,
    mib: float,
    spellings: Sequence[str],
    kind: str = "gaussian",
    repeats: int = 15,
    limit_s: float = 4.0,
    first_used: Sequence[str] = FIRST_USED,
) -> Found:
    """Measures all subjects on a tensor [B, 32, 112, 112] of float32.

    Args:
        device: a CPU, of which one core is used, or a GPU.
        mib: about the size of the tensor.
        spellings: of compressors.
        kind: of the data, see `data.made`.
        repeats: how often each is timed.
        limit_s: a subject that has taken so many seconds is timed no more, but three times at least.
        first_used: compressors whose first use is measured; on a GPU others are in use before.

    Raises:
        CompressorError: no compressor is called so.
        ValueError: there is no such kind of data.

    Returns:
        A dictionary for JSON: what was measured where, and, by the subject's name, "wire" and "error"
        (shares of the tensor's bytes and norm), "memory" (extra bytes over the tensor's, of encode and of
        decode), "first_use" (seconds), "failures", and "speed", by regime: of each subject, for encode and
        decode, quartiles of the multiple of the copy, and the median seconds.
    """
    warnings.filterwarnings("ignore", message=".*quantize")  # torch's quantized tensors are about to go
    shape = (max(1, round(mib * 2**20 / (4 * np.prod(MAP)))), *MAP)
    chosen, failures = subjects(spellings, TensorSpec(shape, torch.float32)), dict[str, str]()
    first_use = measure_first_use(first_used, device)
    if device.type == "cpu":
        on_one_core()
    x = made(kind, shape).to(device)
    wire, error, memory = dict[str, float](), dict[str, float](), dict[str, dict[str, float]]()
    for subject in chosen:
        try:
            wire[subject.name], error[subject.name], memory[subject.name] = _facts(subject, x)
        except Exception as reason:  # that something does not run here is a result, too
            failures[subject.name] = f"{type(reason).__name__}: {str(reason).strip().partition(chr(10))[0]}"
    chosen = [subject for subject in chosen if subject.name not in failures]
    return {
        **_about(device),
        "shape": list(shape),
        "kind": kind,
        "repeats": repeats,
        "wire": wire,
        "error": error,
        "memory": memory,
        "first_use": first_use,
        "failures": failures,
        "speed": {name: _timed(name, chosen, x, repeats, limit_s) for name in regimes(device)},
    }


def _facts(subject: Subject, x: Tensor) -> tuple[float, float, dict[str, float]]:
    """Wire ratio, relative error, and extra memory relative to the tensor; compiles what is to be compiled."""
    with regime(FRESH, x.device):
        subject.decode(subject.encode(x))
        payload = subject.encode(x)
        decoded = subject.decode(payload)
        error = float((decoded.double() - x.double()).norm() / x.double().norm())
        size = subject.wire_bytes(payload)
        shared = payload[0].data_ptr() == x.data_ptr()
        del decoded
        memory = {
            "encode": extra_bytes(subject.encode, x, 0 if shared else size, x.device) / x.nbytes,
            "decode": extra_bytes(subject.decode, payload, 0 if shared else x.nbytes, x.device) / x.nbytes,
        }
    return size / x.nbytes, error, memory


def _timed(name: str, chosen: Sequence[Subject], x: Tensor, repeats: int, limit_s: float) -> Found:
    """The times of all subjects in a regime, in turn; each beside a copy of its own."""
    device = x.device
    samples: dict[str, dict[str, list[float]]] = {subject.name: {} for subject in chosen}
    with regime(name, device):
        inputs = _sets(x, x.nbytes)
        outputs = [torch.empty_like(each) for each in inputs]
        for number in range(repeats + 1):
            for subject in chosen:
                of_it = samples[subject.name]
                spent = sum(of_it.get("encode", [])) + sum(of_it.get("decode", []))
                if len(of_it.get("encode", [])) < 3 or spent * len(inputs) < limit_s:
                    found = _once(subject, inputs, outputs, name)
                    for key, value in found.items() if number else ():  # the first round is not counted
                        of_it.setdefault(key, []).append(value)
    return {
        "copy_s": _median([each for of_it in samples.values() for each in of_it["copy"]]),
        "copy_into_s": _median([each for of_it in samples.values() for each in of_it["copy into"]]),
        "subjects": {name: _summary(of_it) for name, of_it in samples.items()},
    }


def _once(subject: Subject, inputs: Sequence[Tensor], outputs: Sequence[Tensor], name: str) -> dict[str, float]:
    device, pairs = inputs[0].device, list(zip(outputs, inputs, strict=True))
    found = {
        "copy": seconds(torch.clone, inputs, device),
        "copy into": seconds(lambda pair: pair[0].copy_(pair[1]), pairs, device),
        "encode": seconds(subject.encode, inputs, device),
    }
    payload = subject.encode(inputs[0])
    payloads = [[part.clone() for part in payload] for _ in range(_count(subject.wire_bytes(payload), device))]
    del payload
    return {**found, "decode": seconds(subject.decode, payloads, device)}


def _summary(of_it: dict[str, list[float]]) -> Found:
    base = np.array(of_it["copy"])
    return {
        key: {
            "multiple": [round(float(each), 3) for each in np.quantile(of_it[key] / base, (0.25, 0.5, 0.75))],
            "seconds": _median(of_it[key]),
            "samples": len(of_it[key]),
        }
        for key in ("encode", "decode")
    }


def _median(values: Sequence[float]) -> float:
    return float(np.median(values))


def _sets(x: Tensor, nbytes: int) -> list[Tensor]:
    """Copies of a tensor, so many that a GPU's second-level cache holds a third of them at most."""
    return [x, *(x.clone() for _ in range(_count(nbytes, x.device) - 1))]


def _count(nbytes: int, device: torch.device) -> int:
    if device.type == "cpu":
        return 1
    cache: int = torch.cuda.get_device_properties(device).L2_cache_size
    return min(MOST_SETS, max(4, -(-3 * cache // max(1, nbytes))))


def _about(device: torch.device) -> Found:
    is_cpu = device.type == "cpu"
    return {
        "device": device.type,
        "machine": f"one core, {_processor()}" if is_cpu else torch.cuda.get_device_name(device),
        "date": datetime.date.today().isoformat(),
        "python": platform.python_version(),
        "torch": version("torch"),
        "load": round(os.getloadavg()[0], 1),
        "began": time.strftime("%H:%M"),
    }


def _processor() -> str:
    """The name that the system gives the processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.machine()
