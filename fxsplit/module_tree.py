"""Parts of a module under their own qualified names."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn


def get_attribute(root: nn.Module, name: str) -> object:
    """The submodule, parameter, buffer or plain attribute of a qualified name ('' is the root itself)."""
    found: object = root
    for part in name.split(".") if name else ():
        found = getattr(found, part)
    return found


def graft(target: nn.Module, source: nn.Module, names: Iterable[str]) -> None:
    """Puts submodules, parameters, buffers and attributes of `source` into `target` under the same names.

    Nothing is copied: both hold the same objects. Modules on the way that are not wholly wanted become bare
    `nn.Module` containers. A buffer keeps its persistence, so that the state_dict's keys stay the model's own.
    """
    for name in sorted(set(names), key=lambda n: (n.count("."), n)):
        *path, last = name.split(".")
        holder, origin = target, source
        for part in path:
            origin = getattr(origin, part)
            if part not in holder._modules:
                holder.add_module(part, nn.Module())
            holder = getattr(holder, part)
            if holder is origin:
                break
        if holder is origin and holder is not target:
            continue  # inside a module that is here as a whole
        _attach(holder, last, getattr(origin, last), persistent=last not in origin._non_persistent_buffers_set)


def _attach(holder: nn.Module, name: str, value: object, persistent: bool) -> None:
    if isinstance(value, nn.Module):
        holder.add_module(name, value)
    elif isinstance(value, nn.Parameter):
        holder.register_parameter(name, value)
    elif isinstance(value, torch.Tensor):
        holder.register_buffer(name, value, persistent=persistent)
    else:
        setattr(holder, name, value)
