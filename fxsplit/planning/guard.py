"""The accuracy guard: which compressors a planner may choose from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fxsplit.compressors import Compressor, compressor
from fxsplit.compressors.learned import split_learned
from fxsplit.errors import CompressorError
from fxsplit.spec import TensorSpec


@dataclass(frozen=True)
class Guard:
    """What `compressor="auto"` may choose.

    Attributes:
        compressors: spellings that may be chosen for activations; none at all is always among them.
        gradient_compressors: the same for gradients; those of the activations if not given.
        max_error: largest relative L2 error of what is decoded, |decode(encode(x)) - x| / |x|, on each of `data`.
        data: real activations and gradients to measure it on.

    Raises:
        CompressorError: an unknown or a learned compressor, or an error limit without data, or not in [0, 1].

    >>> [str(codec) for codec in Guard(("uniform8",)).allowed()]
    ['none', 'uniform8']
    """

    compressors: Sequence[str] = ("fastquant8", "sortquant8")
    gradient_compressors: Sequence[str] | None = None
    max_error: float | None = None
    data: Sequence[Tensor] = ()

    def __post_init__(self) -> None:
        for spelling in (*self.compressors, *(self.gradient_compressors or ())):
            if split_learned(compressor(spelling))[0] is not None:
                raise CompressorError(
                    "a learned compressor is trained with the model, and cannot be chosen by speed",
                    found=spelling,
                    hint="name it as `compressor` of the plan",
                )
        if self.max_error is not None and not 0.0 <= self.max_error <= 1.0:
            raise CompressorError("max_error is a relative error", found=self.max_error, allowed="0 to 1")
        if self.max_error is not None and not self.data:
            raise CompressorError("max_error needs data to be measured on", hint="data=[activations, gradients]")

    def allowed(self) -> tuple[Compressor, ...]:
        """The compressors for activations, 'none' first."""
        return self._filtered(self.compressors)

    def allowed_for_gradients(self) -> tuple[Compressor, ...]:
        """The compressors for gradients, 'none' first."""
        return self._filtered(self.compressors if self.gradient_compressors is None else self.gradient_compressors)

    def _filtered(self, spellings: Sequence[str]) -> tuple[Compressor, ...]:
        found = dict.fromkeys(compressor(spelling) for spelling in ("none", *spellings))
        limit = self.max_error
        if limit is None:
            return tuple(found)
        return tuple(codec for codec in found if all(relative_error(codec, x) <= limit for x in self.data))


def relative_error(codec: Compressor, x: Tensor) -> float:
    """Relative L2 error of a tensor that was encoded and decoded; 0 for a tensor of zeros that stays so."""
    with torch.no_grad():
        made = codec.decode(codec.encode(x), TensorSpec.of(x))
        error, size = (made.double() - x.double()).norm(), x.double().norm()
    return float(error / size) if size > 0 else float(error)
