"""Examines one case: compiles the model with fxsplit and compares it with the model itself."""

from __future__ import annotations

import copy
import re
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import fxsplit
from fxsplit.errors import FxsplitError, PlanError, WorkerError

from .cases import Batch, Call, Case
from .compare import (
    DOUBLE_TOLERANCE,
    GRADIENT_TOLERANCE,
    Mismatch,
    largest_difference,
    loss_of,
    require_same_keys,
    require_same_outputs,
    require_same_state,
    require_same_structure,
    without_caches,
)

CRITERIA = {
    "E": "outputs in evaluation mode",
    "T": "outputs and buffers in training mode, dropout seeded",
    "G": "gradients of all parameters",
    "B": "batches of 2, 6 and 1 after one of 4",
    "S": ".train() and .eval() after compiling, both ways",
    "K": "keys of the state_dict and their order",
    "O": "type and structure of the output",
    "M": "compiled with padding and run without, and the reverse",
    "L": "another sequence length",
    "N": "three and four stages, cut where fxsplit chooses",
}

SAMPLES = 4
OTHER_SAMPLES = (2, 6, 1)
SEED = 7
MORE_SEEDS = (8, 9, 10, 11)
TWO_DEVICES = ("cpu", "server/cpu")


class Outcome(StrEnum):
    """What a criterion came to."""

    ABSENT = "absent"  # does not apply to this model
    EXACT = "exact"
    REFUSED = "refused"  # fxsplit said no, with an error of its own
    CRASHED = "crashed"  # some other error, or no answer in time
    WRONG = "wrong"  # other numbers, keys or structure, and no error

    @property
    def failed(self) -> bool:
        """Whether the criterion applies and does not hold."""
        return self not in (Outcome.ABSENT, Outcome.EXACT)

    @property
    def badness(self) -> int:
        """Higher is worse."""
        return list(Outcome).index(self)


@dataclass
class Row:
    """What became of one case.

    Attributes:
        name: the case's.
        family: the case's.
        outcomes: criterion -> what it came to.
        failures: criterion -> the error, for those that failed.
        gradients_exact: whether all gradients were equal bit for bit.
        seconds: how long it took.
    """

    name: str
    family: str
    outcomes: dict[str, Outcome] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)
    tracebacks: dict[str, str] = field(default_factory=dict)
    gradients_exact: bool = False
    seconds: float = 0.0

    def note(self, letter: str, outcome: Outcome, error: BaseException | None = None) -> None:
        """Keeps the worst outcome of a criterion."""
        if letter in self.outcomes and self.outcomes[letter].badness >= outcome.badness:
            return
        self.outcomes[letter] = outcome
        if error is not None:
            self.failures[letter] = first_lines(error)
            self.tracebacks[letter] = "".join(traceback.format_exception(error))

    @property
    def passed(self) -> bool:
        """Whether every criterion that applies is exact."""
        return not any(self.outcomes[letter].failed for letter in CRITERIA)


def first_lines(error: BaseException) -> str:
    """An error in one line: its kind, its first line and, of fxsplit's own, where and what."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [""]
    if isinstance(error, FxsplitError):
        lines = [lines[0], *(line for line in lines[1:] if line.startswith(("where:", "found:")))]
    else:
        lines = lines[:1]
    text = f"{type(error).__name__}: {'; '.join(lines)}"
    return re.sub(r'File "[^"]*/site-packages/', 'File "', text)[:400]


def outcome_of(error: BaseException) -> Outcome:
    """Whether an error is a wrong result, a refusal, or a crash."""
    if isinstance(error, Mismatch):
        return Outcome.WRONG
    refused = isinstance(error, FxsplitError) and not isinstance(error, WorkerError)
    return Outcome.REFUSED if refused else Outcome.CRASHED


class Examination:
    """One case under examination.

    Args:
        case: the case.
        report: called with the row after every part of the examination, so that a crash loses little.
    """

    def __init__(self, case: Case, report: Callable[[Row], None] = lambda row: None) -> None:
        self.row = Row(case.name, case.family)
        self._case = case
        self._report = report
        torch.manual_seed(0)
        self._model = case.build()
        self._reference = without_caches(copy.deepcopy(self._model))
        self._full = without_padding(self._call())
        self._inapplicable = ("L" if case.other_length is None else "") + ("M" if self._full is None else "")
        for letter in self._inapplicable:
            self.row.note(letter, Outcome.ABSENT)

    def run(self) -> Row:
        """Examines everything."""
        for part in (self._evaluation, self._training, self._masks, self._stages):
            part()
            self._report(self.row)
        return self.row

    # ------------------------------------------------------------------ parts

    def _evaluation(self) -> None:
        """Compiled in evaluation mode."""
        pipe = self._compile("EBSKOLM", training=False)
        if pipe is None:
            return
        with pipe:
            self._check("E", lambda: self._compare(pipe, self._call()))
            for samples in OTHER_SAMPLES:
                self._check("B", partial(self._compare, pipe, self._call(samples)))
            self._check("K", lambda: require_same_keys(pipe.state_dict(), self._model.state_dict()))
            self._check("O", lambda: self._compare_structure(pipe))
            if self._case.other_length is not None:
                other = self._case.inputs(Batch(SAMPLES, length=self._case.other_length))
                self._check("L", lambda: self._compare(pipe, other))
            if self._full is not None:
                self._check("M", partial(self._compare, pipe, self._full))
            self._check("S", lambda: self._compare(pipe.train(), self._call(training=True), training=True))

    def _training(self) -> None:
        """Compiled in training mode: one step forth and back, then evaluation."""
        pipe = self._compile("TGS", training=True)
        if pipe is not None:
            with pipe:
                self._check("T", lambda: self._compare_step(pipe))
                for seed in MORE_SEEDS:
                    self._check("T", partial(self._compare, pipe, self._call(training=True), True, seed))
                self._check("S", lambda: self._compare(pipe.eval(), self._call()))

    def _masks(self) -> None:
        """Compiled without padding, run with it."""
        pipe = None if self._full is None else self._compile("M", training=False, example=self._full)
        if pipe is not None and self._full is not None:
            with pipe:
                for call in (self._full, self._call()):
                    self._check("M", partial(self._compare, pipe, call))

    def _stages(self) -> None:
        """Over more stages, compiled in training mode; then evaluation at another batch size."""
        for stages in (3, 4):
            devices = ["cpu", *(f"worker{i}/cpu" for i in range(1, stages))]
            pipe = self._compile("N", training=True, cuts=None, devices=devices)
            if pipe is not None:
                with pipe:
                    for training, samples in ((True, SAMPLES), (False, OTHER_SAMPLES[0])):
                        pipe.train(training)
                        self._check("N", partial(self._compare, pipe, self._call(samples, training), training))
        if "N" not in self.row.outcomes:
            self.row.note("N", Outcome.ABSENT)

    # ------------------------------------------------------------------ steps

    def _compile(
        self,
        letters: str,
        training: bool,
        cuts: Sequence[str] | None = (),
        devices: Sequence[str] = TWO_DEVICES,
        example: Call | None = None,
    ) -> fxsplit.Pipeline | None:
        """A pipeline, by default cut where the case says; if it cannot be had, the criteria `letters` fail."""
        self._model.train(training)
        self._reference.load_state_dict(self._model.state_dict())
        example = example or self._call(training=training)
        try:
            return self._pipeline(self._model, example, [self._case.cut] if cuts == () else cuts, devices)
        except Exception as error:
            if not (isinstance(error, PlanError) and "fewer places to cut" in error.what):
                for letter in letters:
                    if letter not in self._inapplicable:
                        self.row.note(letter, outcome_of(error), error)
            return None

    def _pipeline(
        self, model: nn.Module, example: Call, cuts: Sequence[str] | None, devices: Sequence[str] = TWO_DEVICES
    ) -> fxsplit.Pipeline:
        inputs = example.kwargs or example.args
        return fxsplit.compile(model, devices, cuts=cuts, transport="in_process", example_inputs=inputs)

    def _check(self, letter: str, step: Callable[[], None]) -> None:
        if self.row.outcomes.get(letter, Outcome.EXACT).failed:
            return
        try:
            step()
        except Exception as error:
            self.row.note(letter, outcome_of(error), error)
        else:
            self.row.note(letter, Outcome.EXACT)

    def _call(self, samples: int = SAMPLES, training: bool = False) -> Call:
        return self._case.inputs(Batch(samples, training))

    def _compare(self, pipe: Any, call: Call, training: bool = False, seed: int = SEED) -> None:
        self._reference.train(training)
        with torch.no_grad():
            require_same_outputs(seeded(pipe, call, seed), seeded(self._reference, call, seed))

    def _compare_structure(self, pipe: Any) -> None:
        """Against the model as it is, with its caches on."""
        call = self._call()
        with torch.no_grad():
            require_same_structure(seeded(pipe, call), seeded(self._model, call))

    def _compare_step(self, pipe: Any) -> None:
        call = self._call(training=True)
        self._reference.train()
        self._reference.zero_grad(set_to_none=True)
        found, expected = seeded(pipe, call), seeded(self._reference, call)
        require_same_outputs(found, expected)
        require_same_state(pipe.state_dict(), self._reference.state_dict())
        self._check("G", lambda: self._compare_gradients(pipe, found, expected))

    def _compare_gradients(self, pipe: Any, found: Any, expected: Any) -> None:
        difference = gradient_difference(pipe, found, self._reference, expected)
        self.row.gradients_exact = difference == 0.0
        if difference > GRADIENT_TOLERANCE:
            self._compare_double_gradients(f"gradients differ by {difference:.2g}, relatively")

    def _compare_double_gradients(self, finding: str) -> None:
        """The step again in double precision, which tells sums in another order from errors."""
        model = copy.deepcopy(self._model).double().train()
        reference = without_caches(copy.deepcopy(model))
        call = in_double(self._call(training=True))
        with self._pipeline(model, call, [self._case.cut]) as pipe:
            difference = gradient_difference(pipe, seeded(pipe, call), reference, seeded(reference, call))
        if difference > DOUBLE_TOLERANCE:
            raise Mismatch(f"{finding}, and in double precision by {difference:.2g}")


def seeded(model: Any, call: Call, seed: int = SEED) -> Any:
    """The output with the random numbers of a seed, numpy's as well: some models of speech use them."""
    torch.manual_seed(seed)
    np.random.seed(seed)
    return model(*call.args, **call.kwargs)


def gradient_difference(pipe: Any, found: Any, model: nn.Module, expected: Any) -> float:
    """How much the gradients of all parameters differ after a step back from both outputs."""
    for output in (found, expected):
        loss_of(output).backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return largest_difference(pipe.gradients(), gradients)


def in_double(call: Call) -> Call:
    """The same call with every floating point tensor in double precision."""

    def convert(leaf: Any) -> Any:
        return leaf.double() if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf

    return Call(pytree.tree_map(convert, call.args), pytree.tree_map(convert, call.kwargs))


def without_padding(call: Call) -> Call | None:
    """The same call with padding masks of ones; None if it has no padding mask."""
    masks = {
        name: torch.ones_like(value)
        for name, value in call.kwargs.items()
        if name.endswith("attention_mask") and isinstance(value, Tensor)
    }
    return replace(call, kwargs={**call.kwargs, **masks}) if masks else None
