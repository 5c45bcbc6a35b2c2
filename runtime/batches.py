"""The batch of one call: checked, and cut into micro-batches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fxsplit.errors import InputError
from fxsplit.trace.call import Arguments, batch_size, is_batched


def check_batch(arguments: Arguments, client: torch.device, chunks: int) -> None:
    """Refuses a batch that cannot be cut into so many chunks, or that is not on the client's device.

    Raises:
        InputError: names the input, and what to do about it.
    """
    named, _ = pytree.tree_flatten_with_path((arguments.args, dict(arguments.kwargs)))
    tensors = [(pytree.keystr(path[1:]), leaf) for path, leaf in named if isinstance(leaf, Tensor)]
    for name, tensor in tensors:
        if (tensor.device.type, tensor.device.index or 0) != (client.type, client.index or 0):
            raise InputError(
                f"input {name} is on another device than the client",
                found=str(tensor.device),
                allowed=f"{client} (the first of the devices)",
                hint=f"pass it with .to('{client}')",
            )
    samples = batch_size([tensor for _, tensor in tensors])
    if samples == 0:
        raise InputError("the batch is empty", found="0 samples", allowed=f"at least {chunks}")
    if samples < chunks:
        raise InputError(
            "the batch has fewer samples than chunks",
            found=f"{samples} samples",
            allowed=f"at least {chunks}, one for each chunk",
            hint="drop the last batch (drop_last=True), or compile with fewer chunks",
        )


def cut_batch(leaves: Sequence[Any], samples: int, chunks: int) -> list[list[Any]]:
    """The inputs of each micro-batch; sizes differ by at most one, the larger ones first."""
    columns = [
        list(torch.tensor_split(leaf, chunks)) if is_batched(leaf, samples) and chunks > 1 else [leaf] * chunks
        for leaf in leaves
    ]
    return [list(row) for row in zip(*columns, strict=True)]
