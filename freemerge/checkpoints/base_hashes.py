"""A hash that identifies the base of a fine-tuned model, independent of file format, precision and wrapper."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from freemerge.checkpoints.checkpoint import Checkpoint, TensorSpec
from freemerge.checkpoints.hashing import hash_tensors


def hash_base(base: Checkpoint, dtypes: Mapping[str, torch.dtype]) -> str:
    """The hash (`hash_tensors`) that a module's weights would have with this base loaded into it.

    Args:
        base: the base; its tensors may be named relative to a submodule.
        dtypes: name → dtype of the module's tensors. Tensors that the base lacks are ignored.

    Returns:
        64 hexadecimal digits.
    """
    base = base.with_tied_names()
    prefix = find_prefix(dtypes, base.names)
    loaded = {prefix + name: name for name in base.names if prefix + name in dtypes}
    specs = {full: TensorSpec(base.spec(name).shape, dtypes[full]) for full, name in loaded.items()}

    def read(full: str, run: tuple[int, int] | None) -> Tensor:
        name = loaded[full]
        return (base.tensor(name) if run is None else base.read_range(name, *run)).to(dtypes[full])

    return hash_tensors(Checkpoint(base.label, specs, read))


def find_prefix(module_names: Iterable[str], file_names: Iterable[str]) -> str:
    """The prefix of a file's tensors in a module.

    A file may name its tensors relative to a submodule, as a Hugging Face folder does if the module wraps a model of
    that library.

    Args:
        module_names: the module's tensors.
        file_names: the file's tensors; some may have no counterpart.

    Returns:
        The prefix under which the most names agree, often "".
    """
    unknown = TensorSpec((), torch.float32)  # only the names are used
    names = Checkpoint("", dict.fromkeys(module_names, unknown), lambda name, run: torch.empty(()))
    inside = names.relative_to(file_names)
    outside = set(inside.outside)
    full = next(name for name in names if name not in outside)
    return full.removesuffix(inside.names[0])
