"""Training saved to files and read back: safetensors for tensors, JSON for the rest, nothing unpickled."""

from fxsplit.snapshots.checkpoint import Checkpoint, load
from fxsplit.snapshots.settings import Snapshots

__all__ = ["Checkpoint", "Snapshots", "load"]
