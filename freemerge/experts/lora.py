"""Low-rank experts as LoRA adapters of PEFT (Hu et al., arXiv 2106.09685).

LoRA computes W·x + (α/r)·B·A·x. An expert's U and V are B and A with α = r, so the adapter is the same function. The
other changes of an expert are stored where PEFT has a place for them:

    weight of a linear, convolutional or embedding layer   factors; a whole change has those of full rank
    bias of such a layer                                   `lora_bias`, which is added to the layer's output
    other layers, if changed as a whole, such as norms     `modules_to_save`, the changed layer itself

The keys and shapes are those of PEFT's `adapter_model.safetensors`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from freemerge.experts.kinds.low_rank import LowRankExpert, matrix_shape
from freemerge.experts.tied import names_of_changes

_KEY = "base_model.model."


@dataclass(frozen=True)
class LoraAdapter:
    """A LoRA adapter as PEFT stores it.

    Args:
        config: the content of `adapter_config.json`, without the base model's name and the kind of task.
        tensors: the content of `adapter_model.safetensors`, in the dtypes of the layers.
    """

    config: dict[str, Any]
    tensors: dict[str, Tensor]

    @property
    def only_factors(self) -> bool:
        """Whether it has nothing but factors of linear layers, as servers of many adapters such as vLLM require."""
        sides = ("lora_A.weight", "lora_B.weight")
        return all(name.endswith(sides) and tensor.dim() == 2 for name, tensor in self.tensors.items())


def as_lora(model: nn.Module, expert: LowRankExpert) -> LoraAdapter:
    """Convert an expert to a LoRA adapter.

    Args:
        model: the merged model that the expert belongs to.
        expert: the expert.

    Returns:
        The adapter, which computes the same as the expert up to rounding.

    Raises:
        ValueError: if PEFT has no place for the change of a tensor.
    """
    changes = names_of_changes(model.state_dict(), expert.shapes)  # under all names of tied tensors
    layers: dict[str, dict[str, str]] = {}  # layer → its changed tensor → the expert's name
    for name, stored in changes.items():
        layers.setdefault(name.rpartition(".")[0], {})[name.rpartition(".")[2]] = stored
    every = [name for name, _ in model.named_modules()]
    homes: dict[int, str] = {}
    has_bias = any(_takes_factors(model.get_submodule(layer)) and "bias" in own for layer, own in layers.items())
    ranks: dict[str, int] = {}
    saved: list[str] = []
    tensors: dict[str, Tensor] = {}
    transposed = False
    for layer, own in layers.items():
        module = model.get_submodule(layer)
        if (first := homes.setdefault(id(module), layer)) != layer:
            raise _no_place(f"{layer}.{next(iter(own))}", f"is the same layer as {first!r}, and PEFT changes only one")
        parent = model.get_submodule(layer.rpartition(".")[0])
        if isinstance(parent, nn.MultiheadAttention) or isinstance(module, nn.MultiheadAttention):
            raise _no_place(f"{layer}.{next(iter(own))}", "is read by nn.MultiheadAttention itself")
        if _takes_factors(module) and own.keys() <= {"weight", "bias"} and not (_embeds(module) and has_bias):
            left, right = _factors(expert, own.get("weight"), module)
            tensors |= _as_stored(f"{_KEY}{layer}", module, left, right)
            ranks[layer] = right.shape[0]
            transposed |= type(module).__name__ == "Conv1D"
            if has_bias:
                change = expert.whole[own["bias"]] if "bias" in own else torch.zeros(_outputs(module))
                tensors[f"{_KEY}{layer}.lora_B.bias"] = change.to(_dtype(module))
        elif factored := [name for name, stored in own.items() if stored in expert.left and not _embeds(module)]:
            raise _no_place(f"{layer}.{factored[0]}".lstrip("."), f"is of a {type(module).__name__}, no linear layer")
        elif not any(module.children()) and layer:
            if twins := [other for other in every if other.endswith(layer) and other != layer]:
                why = f"is of a layer whose name ends like {twins[0]!r}, and PEFT would take both"
                raise _no_place(f"{layer}.{next(iter(own))}", why)
            saved.append(layer)
            for name, value in module.state_dict().items():
                tensors[f"{_KEY}{layer}.{name}"] = expert.added(own[name], value) if name in own else value
        else:
            raise _no_place(f"{layer}.{next(iter(own))}".lstrip("."), "belongs to a layer with other layers inside")
    return LoraAdapter(
        _config(ranks, saved, every, has_bias, transposed),
        # copies: the factors of tied layers are one tensor, which PEFT reads under each name
        {name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()},
    )


def _config(
    ranks: Mapping[str, int], saved: list[str], every: Sequence[str], has_bias: bool, transposed: bool
) -> dict[str, Any]:
    """The content of `adapter_config.json`; α = r in every layer."""
    rank = max(ranks.values(), default=1)
    # PEFT compares these names with the ends of the model's, unless one expression stands for all of them. Ranks are
    # those of the first end that fits, so the longest names come first.
    ambiguous = any(other.endswith(f".{layer}") for layer in ranks for other in every)
    others = {layer: own for layer, own in ranks.items() if own != rank or ambiguous}
    others = dict(sorted(others.items(), key=lambda each: -len(each[0]))) if ambiguous else others
    return {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": rank,
        "target_modules": "|".join(map(re.escape, ranks)) if ambiguous else list(ranks),
        "rank_pattern": others,
        "alpha_pattern": dict(others),
        "modules_to_save": saved or None,
        "lora_bias": has_bias,
        "bias": "none",
        "fan_in_fan_out": transposed,
        "lora_dropout": 0.0,
        "use_rslora": False,
        "use_dora": False,
        "inference_mode": True,
    }


def _takes_factors(module: nn.Module) -> bool:
    """Whether LoRA changes layers of this kind by factors."""
    if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        return module.groups == 1
    return isinstance(module, nn.Linear) or type(module) is nn.Embedding or type(module).__name__ == "Conv1D"


def _embeds(module: nn.Module) -> bool:
    """Whether it is an embedding, for which PEFT has no `lora_bias` in the same adapter."""
    return isinstance(module, nn.Embedding)


def _factors(expert: LowRankExpert, name: str | None, module: nn.Module) -> tuple[Tensor, Tensor]:
    """U (O, r) and V (r, I) of a weight's change; of full rank if it is whole, zeros if the weight is unchanged."""
    weight = module.get_parameter("weight")
    rows, columns = matrix_shape(tuple(weight.shape))
    if name is None:
        return torch.zeros(rows, 1), torch.zeros(1, columns)
    if name in expert.left:
        return expert.left[name], expert.right[name]
    change = expert.whole[name].reshape(rows, columns)
    return (torch.eye(rows), change) if rows <= columns else (change, torch.eye(columns))


def _as_stored(key: str, module: nn.Module, left: Tensor, right: Tensor) -> dict[str, Tensor]:
    """PEFT's tensors of a layer's factors."""
    left, right = left.to(_dtype(module)), right.to(_dtype(module))
    if _embeds(module):  # W is (V, D), and PEFT adds (B·A)ᵀ
        return {f"{key}.lora_embedding_A": left.mT, f"{key}.lora_embedding_B": right.mT}
    if type(module).__name__ == "Conv1D":  # transformers' linear layer whose W is (I, O)
        left, right = right.mT, left.mT
    if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        inner = (len(right), *module.weight.shape[1:])
        right, left = right.reshape(inner), left.reshape(*left.shape, *(1,) * len(module.kernel_size))
    return {f"{key}.lora_A.weight": right, f"{key}.lora_B.weight": left}


def _outputs(module: nn.Module) -> int:
    """The length of a layer's bias."""
    return module.get_parameter("weight").shape[-1 if type(module).__name__ == "Conv1D" else 0]


def _dtype(module: nn.Module) -> torch.dtype:
    return module.get_parameter("weight").dtype


def _no_place(name: str, why: str) -> ValueError:
    """The error for a change that PEFT cannot express."""
    pattern = re.sub(r"\.\d+\.", ".*.", name)  # of all layers
    return ValueError(
        f"tensor {name!r} {why}, so this expert cannot be a LoRA adapter; serve it with FreeModel, or leave the tensor "
        f"out of the experts (experts.arguments: {{exclude: ['{pattern}']}}) and train them again"
    )
