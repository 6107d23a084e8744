"""Experts as entries of a state dict, which hold the packed tensors without a copy.

    experts.layout              JSON as uint8: for each task, the data that rebuild its expert from its tensors
    experts.<task>.<part>       the packed tensors: codes, scales, gaps, …
    experts_shared.<i>.<name>   the task vectors that masked experts share

Torch's distributed checkpoints look up each key of a state dict as nested attributes, which `StateKeys` provides. The
tensors are not buffers, because `half()` would round the scales and DDP would broadcast buffers in each pass.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from freemerge.experts import PackedExpert

LAYOUT = "experts.layout"


def is_expert_key(key: str) -> bool:
    """Whether a key of a FreeModel's state dict belongs to its experts.

    Args:
        key: the key, without a prefix.
    """
    return key.startswith(("experts.", "experts_shared."))


class StateKeys:
    """Keys of a state dict as nested attributes: `keys.experts.a.codes` exists, an unknown name raises AttributeError.

    Args:
        keys: the keys.
        prefix: the part of a key that earlier attributes have resolved.
    """

    __slots__ = ("_state_keys", "_state_prefix")

    def __init__(self, keys: Collection[str], prefix: str = "") -> None:
        self._state_keys, self._state_prefix = keys, prefix

    def __getattribute__(self, name: str) -> Any:  # also for tasks with the names of object attributes
        get = object.__getattribute__
        keys, key = get(self, "_state_keys"), get(self, "_state_prefix") + name
        if any(other == key or other.startswith(f"{key}.") for other in keys):
            return StateKeys(keys, f"{key}.")
        return get(self, name)


def experts_to_state(experts: Mapping[str, PackedExpert]) -> dict[str, Tensor]:
    """Convert experts to entries of a state dict.

    Args:
        experts: task → expert.

    Returns:
        State key → tensor, not copied.

    Raises:
        ValueError: if the class of an expert has no `KIND` of its own.
    """
    state: dict[str, Tensor] = {}
    layouts: dict[str, dict[str, Any]] = {}
    shared: list[Mapping[str, Tensor]] = []
    for task, packed in experts.items():
        layouts[task] = packed.layout()
        state |= {f"experts.{task}.{name}": tensor for name, tensor in packed.tensors().items()}
        if packed.shared is not None:
            known = next((i for i, other in enumerate(shared) if other is packed.shared), len(shared))
            shared += [packed.shared] if known == len(shared) else []
            layouts[task]["shared"] = known
    state |= {f"experts_shared.{i}.{name}": t for i, vector in enumerate(shared) for name, t in vector.items()}
    text = json.dumps(layouts, ensure_ascii=False).encode()
    return {LAYOUT: torch.frombuffer(bytearray(text), dtype=torch.uint8), **state}


def experts_from_state(
    state: Mapping[str, Tensor], take: Callable[[Tensor], Tensor]
) -> tuple[dict[str, PackedExpert], list[str]]:
    """Convert entries of a state dict to experts: the inverse of `experts_to_state`.

    Args:
        state: state key → tensor, with `experts.layout`.
        take: a tensor of the state dict → the tensor that the model stores.

    Returns:
        Task → expert, and the missing keys. If keys are missing, there are no experts.

    Raises:
        ValueError: if tensors do not match the layout.
    """
    layouts = json.loads(state[LAYOUT].cpu().numpy().tobytes())
    vectors: dict[str, dict[str, Tensor]] = {}
    for key, tensor in state.items():
        if key.startswith("experts_shared."):
            _, index, name = key.split(".", 2)
            vectors.setdefault(index, {})[name] = take(tensor)
    wanted = {
        task: {name: f"experts.{task}.{name}" for name in ("codes", "scales", *layout["arrays"])}
        for task, layout in layouts.items()
    }
    lacking = [key for keys in wanted.values() for key in keys.values() if key not in state]
    for layout in layouts.values():
        if "shared" in layout:
            prefix, has = f"experts_shared.{layout['shared']}.", vectors.get(str(layout["shared"]), {})
            lacking += [prefix + name for name in layout["shapes"] if name not in has]
    if lacking:
        return {}, lacking
    experts = {}
    for task, layout in layouts.items():
        tensors = {name: take(state[key]) for name, key in wanted[task].items()}
        try:
            experts[task] = PackedExpert.from_layout(layout, tensors, vectors.get(str(layout.get("shared"))))
        except (ValueError, KeyError, RuntimeError) as error:
            raise ValueError(f"FreeModel: the expert of {task!r} cannot be loaded ({error})") from error
    return experts, []
