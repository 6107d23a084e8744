"""The kind of layer that a weight belongs to, and the orientation of its matrix."""

from __future__ import annotations

import re
from enum import Enum

from freemerge.checkpoints.checkpoint import Checkpoint

# Output embeddings count as linear layers.
_EMBEDDING = re.compile(r"(?:.*\.)?(?!embed_out|output_emb)(?:\w*emb\w*|w[tp]e|shared|relative_attention_bias)")
# The layers of GPT-2 and related models that store their weight as (inputs, outputs); they always have a bias.
_TURNED = re.compile(r"(?:.*\.)?(?:c_attn|c_proj|c_fc|q_attn)")


class Layer(Enum):
    """Kinds of layers, by how PEFT applies the factors."""

    LINEAR = "linear"  # ΔW = B·A
    TRANSPOSED = "transposed"  # a linear layer whose weight is stored as (inputs, outputs): ΔW = (B·A)ᵀ
    EMBEDDING = "embedding"  # ΔW = (B·A)ᵀ, under different names
    CONVOLUTION = "convolution"  # ΔW = B·A over the outputs × everything else
    PARAMETER = "parameter"  # of a module that is not a layer: ΔW = B·A, or ΔW_e = B_e·A_e for each e of a stack
    PARAMETER_TRANSPOSED = "parameter, transposed"  # a stack whose matrices are stored as (inputs, outputs)

    @property
    def is_parameter(self) -> bool:
        """Whether PEFT adapts it as a parameter (`target_parameters`) rather than as a module."""
        return self in (Layer.PARAMETER, Layer.PARAMETER_TRANSPOSED)


def find_layer(base: Checkpoint, name: str) -> Layer | None:
    """The kind of layer that a weight belongs to; None if LoRA cannot change it.

    The tensor alone does not determine it. The length of the bias gives the orientation of a matrix; names identify
    embeddings, and a square matrix takes the orientation of other matrices with the same kind of name.

    Args:
        base: the pretrained model.
        name: one of its tensors.
    """
    module, _, last = name.rpartition(".")
    shape = base.spec(name).shape
    if last != "weight" or not module or len(shape) < 2:
        return None
    if len(shape) > 2:
        depthwise = shape[1] == 1 < shape[0]
        return None if depthwise else Layer.CONVOLUTION
    if _EMBEDDING.fullmatch(module) and not base.has(f"{module}.bias"):
        return Layer.EMBEDDING
    return Layer.TRANSPOSED if is_transposed(base, name) else Layer.LINEAR


def is_transposed(base: Checkpoint, name: str) -> bool | None:
    """Whether a matrix is stored as (inputs, outputs); None if this is unknown.

    Args:
        base: the pretrained model.
        name: one of its tensors, with two dimensions.
    """
    found = _told_by_bias(base, name)
    if found is None and _TURNED.fullmatch(name.rpartition(".")[0]):
        alike = [other for other in base.names if _TURNED.fullmatch(other.rpartition(".")[0])]
        found = next((told for told in (_told_by_bias(base, other) for other in alike) if told is not None), None)
    return found


def _told_by_bias(base: Checkpoint, name: str) -> bool | None:
    shape, bias = base.spec(name).shape, f"{name.rpartition('.')[0]}.bias"
    if len(shape) != 2 or shape[0] == shape[1] or not base.has(bias):
        return None
    return base.spec(bias).shape == shape[1:]
