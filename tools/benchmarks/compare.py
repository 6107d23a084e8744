"""Whether two programs have written the same model."""

from __future__ import annotations

from pathlib import Path


def differences(base: Path, first: Path, second: Path) -> tuple[float, float]:
    """The largest difference between two merged models, and the largest between the first and its base.

    Args:
        base: a file or a folder of safetensors.
        first: a merged model of it.
        second: another.

    Raises:
        SystemExit: names, shapes or dtypes differ.
    """
    places = [_places(path) for path in (base, first, second)]
    if len({frozenset(place) for place in places}) > 1:
        raise SystemExit(f"error: {first} and {second} do not hold the base's tensors both")
    between = change = 0.0
    for name in places[0]:
        stored = [place[name].get_tensor(name) for place in places]
        if len({(tuple(tensor.shape), tensor.dtype) for tensor in stored}) > 1:
            raise SystemExit(f"error: {first} and {second} hold '{name}' with other shapes or dtypes")
        reference, one, other = (tensor.double() for tensor in stored)
        between = max(between, float((one - other).abs().max()))
        change = max(change, float((one - reference).abs().max()))
    return between, change


def _places(model: Path) -> dict[str, object]:
    """Tensor's name → the open file that holds it."""
    from safetensors import safe_open

    paths = sorted(model.glob("*.safetensors")) if model.is_dir() else [model]
    return {name: file for file in (safe_open(path, "pt") for path in paths) for name in file.keys()}  # noqa: SIM118
