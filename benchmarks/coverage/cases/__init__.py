"""The cases, in two groups: the 58 that other tools were measured with, and more."""

from __future__ import annotations

from . import first_images, first_transformers, more_images, more_text, more_transformers
from .base import Batch, Call, Case

GROUPS: dict[str, tuple[Case, ...]] = {
    "58": (*first_images.CASES, *first_transformers.CASES),
    "more": (*more_images.CASES, *more_text.CASES, *more_transformers.CASES),
}

__all__ = ["GROUPS", "Batch", "Call", "Case"]
