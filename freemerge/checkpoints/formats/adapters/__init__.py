"""PEFT adapters, read as exact differences to a base, one tensor at a time."""

from freemerge.checkpoints.formats.adapters.opening import open_adapter

__all__ = ["open_adapter"]
