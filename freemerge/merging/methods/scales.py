"""Methods at other scales, for a search over λ."""

from __future__ import annotations

import dataclasses

from freemerge.merging.methods.base import MergeMethod
from freemerge.merging.methods.parameters import get_field, replace_fields


def has_scale(method: MergeMethod) -> bool:
    """Whether a method has a parameter `scale`, a number or one for each model."""
    fields = dataclasses.fields(method) if dataclasses.is_dataclass(method) else ()
    scale = getattr(method, "scale", None) if any(field.name == "scale" and field.init for field in fields) else None
    values = scale if isinstance(scale, (list, tuple)) else [scale]
    return all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in values)


def rescaled(method: MergeMethod, factor: float) -> MergeMethod:
    """The method at another scale.

    Args:
        method: one that has a scale.
        factor: the new scale. For a method with one scale per model, the factor that multiplies each of them, so that
            their ratios stay.
    """
    scale = get_field(method, "scale")
    each = isinstance(scale, (list, tuple))
    return replace_fields(method, {"scale": [factor * value for value in scale] if each else factor})


def is_linear(method: MergeMethod) -> bool:
    """Whether the method's class says that its results are proportional to its scale; see `linear_in_scale`.

    A class's value does not apply to its subclasses, which may process the result differently.
    """
    return vars(type(method)).get("linear_in_scale", False) is True
