"""Compare the merged models that two programs have written."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple


class Difference(NamedTuple):
    """Differences between two merged models of one base."""

    largest: float  # difference between them
    change: float  # the largest difference between the first and its base, to compare with
    beyond: float  # fraction of the values that are further apart than one rounding step of their dtype


def compare(base: Path, first: Path, second: Path) -> Difference:
    """Compare two merged models value by value.

    Args:
        base: a file or a folder of safetensors.
        first: a merged model of it.
        second: another.

    Raises:
        SystemExit: names, shapes or dtypes differ.
    """
    import torch

    places = [_places(path) for path in (base, first, second)]
    if len({frozenset(place) for place in places}) > 1:
        raise SystemExit(f"error: {first} and {second} do not both hold the tensors of {base}")
    largest = change = 0.0
    beyond = total = 0
    for name in places[0]:
        stored = [place[name].get_tensor(name) for place in places]
        if len({(tuple(tensor.shape), tensor.dtype) for tensor in stored}) > 1:
            raise SystemExit(f"error: {first} and {second} hold '{name}' with other shapes or dtypes")
        reference, one, other = (tensor.float() for tensor in stored)
        apart = (one - other).abs()
        changed = float((one - reference).abs().max())
        # In float32, a value near zero after a subtraction is less accurate than its own rounding step.
        step = torch.finfo(stored[0].dtype).eps * torch.maximum(one.abs(), other.abs())
        beyond += int((apart > step + 4 * torch.finfo(torch.float32).eps * (reference.abs() + changed)).sum())
        total += apart.numel()
        largest, change = max(largest, float(apart.max())), max(change, changed)
    return Difference(largest, change, beyond / total)


def _places(model: Path) -> dict[str, object]:
    """Tensor's name → the open file that holds it."""
    from safetensors import safe_open

    paths = sorted(model.glob("*.safetensors")) if model.is_dir() else [model]
    return {name: file for file in (safe_open(path, "pt") for path in paths) for name in file.keys()}  # noqa: SIM118
