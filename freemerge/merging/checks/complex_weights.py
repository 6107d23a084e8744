"""Complex tensors: no method merges them, so the base's are kept; changed ones are an error, not a silent loss."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from freemerge.checkpoints import Checkpoint
from freemerge.errors import MergeError


def check_complex(base: Checkpoint, models: Sequence[Checkpoint], selected: Iterable[str]) -> None:
    """Refuse a merge if a fine-tuned model has changed a complex tensor. Only complex tensors are read.

    Args:
        base: the pretrained model.
        models: the fine-tuned models, under the base's names.
        selected: names of the tensors that are to be merged.

    Raises:
        MergeError: a complex tensor differs from the base's.
    """
    chosen = set(selected)
    for name in base.names:
        if name in chosen and base.spec(name).dtype.is_complex:
            for model in models:
                if model.has(name) and not _same(base, model, name):
                    raise MergeError(
                        f"{model.label}: the tensor '{name}' is complex and differs from the base's, and no method "
                        "merges "
                        "complex numbers; save it in all models as real and imaginary parts (torch.view_as_real)"
                    )


def _same(base: Checkpoint, model: Checkpoint, name: str) -> bool:
    return model.spec(name) == base.spec(name) and torch.equal(model.tensor(name), base.tensor(name))
