"""Pre-training of learned compressors on a worker: they imitate the identity on the activations of their cut.

The documents insert layers that were "finetuned to learn the activation memory" first: at random they would undo
what the model has learned. Here each cut's pair of modules is trained on the worker that makes the activation, so
that no activation crosses the link uncompressed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fxsplit.runtime import shipping
from fxsplit.stage import StageModule


@dataclass
class _Lesson:
    """One pair of modules that is being trained."""

    down: nn.Module
    up: nn.Module
    optimizer: torch.optim.Optimizer
    hook: Any = None
    seen: list[Tensor] = field(default_factory=list)

    def see(self, _: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        """Keeps what comes to the module in front of the cut."""
        self.seen.append(inputs[0].detach().clone())


class Imitation:
    """The pairs of modules that this worker trains."""

    def __init__(self) -> None:
        self._stages: Mapping[int, StageModule] = {}
        self._lessons: dict[str, _Lesson] = {}
        self.commands: Mapping[str, Callable[..., Any]] = {
            "imitation_begin": self.begin,
            "imitation_step": self.step,
            "imitation_end": self.end,
        }

    @property
    def is_watching(self) -> bool:
        """Whether a module of a stage has a hook."""
        return bool(self._lessons)

    def hold(self, stages: Mapping[int, StageModule]) -> None:
        """Takes the stages."""
        self._stages = stages

    def begin(self, name: str, data: bytes, tensors: Sequence[Tensor], lr: float) -> bool:
        """Begins to watch the module in front of a cut; false if it is not here.

        Args:
            name: of the pair, without `.down` and `.up`.
            data: the module behind the cut, as `shipping.dump` made it.
            tensors: its tensors.
            lr: learning rate of Adam.
        """
        for stage in self._stages.values():
            if f"{name}.down" in dict(stage.named_modules()):
                down = stage.get_submodule(f"{name}.down")
                up: nn.Module = shipping.load(data, tensors)
                up.to(next(down.parameters()).device)
                optimizer = torch.optim.Adam([*down.parameters(), *up.parameters()], lr)
                lesson = _Lesson(down, up, optimizer)
                lesson.hook = down.register_forward_pre_hook(lesson.see)
                self._lessons[name] = lesson
                return True
        return False

    def step(self, name: str) -> float:
        """One step on the activations seen since the last one; returns the relative error before it."""
        lesson = self._lessons[name]
        x = torch.cat(lesson.seen)
        lesson.seen.clear()
        gradients = [parameter.grad for parameter in lesson.down.parameters()]
        lesson.optimizer.zero_grad()
        with torch.enable_grad():
            wrong = (lesson.up(lesson.down(x)) - x).square().sum() / x.square().sum().clamp_min(1e-30)
            wrong.backward()
        lesson.seen.clear()
        lesson.optimizer.step()
        for parameter, gradient in zip(lesson.down.parameters(), gradients, strict=True):
            parameter.grad = gradient  # the user's own, if there are any
        return float(wrong.detach().sqrt())

    def end(self, name: str) -> dict[str, Tensor]:
        """Ends the watch; returns the state of both modules, on the CPU, for whoever else has them."""
        lesson = self._lessons.pop(name)
        lesson.hook.remove()
        both = (("down", lesson.down), ("up", lesson.up))
        return {f"{name}.{end}.{k}": v.detach().cpu() for end, m in both for k, v in m.state_dict().items()}
