"""Adapters of PEFT, read as what they are: exact differences to a base, one tensor at a time."""

from freemerge.checkpoints.formats.adapters.opening import open_adapter

__all__ = ["open_adapter"]
