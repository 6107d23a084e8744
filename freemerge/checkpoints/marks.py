"""Marks that wrappers leave inside the names of a module's tensors, and how the names read without them.

`torch.compile`, activation checkpointing, FSDP and data parallelism wrap modules, and state dicts that were saved from
inside carry the wrapper's attribute: `model._orig_mod.layers.0._checkpoint_wrapped_module.q_proj.weight`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from freemerge.checkpoints.checkpoint import Checkpoint
from freemerge.errors import CheckpointError

_MARKS = re.compile(r"(?<![^.])(?:_orig_mod|_checkpoint_wrapped_module|_fsdp_wrapped_module|_forward_module)\.")
# Of data parallelism: `module.`, which is also what some architectures call a layer of theirs.
_ALL = re.compile(_MARKS.pattern.replace("_forward_module", "_forward_module|module"))
# In a module's state dict there is the name of the adapter: `lora_A.default.weight`, `modules_to_save.default.weight`.
_UNMERGED = re.compile(
    r"(?:.*\.)?(?:base_layer\..+|modules_to_save\.[^.]+\..+|original_module\..+"
    r"|(?:lora_\w+|ia3_l|(?:hada|lokr|oft|vera|boft)_\w+)\.(?!(?:weight|bias)$)[^.]+(?:\.(?:weight|bias))?)"
)
_FACTORS = re.compile(r"(?:.*\.)?(?:lora_[AB]\.weight|lora_embedding_[AB]|ia3_l)")  # in a file of PEFT's own


def without_marks(checkpoint: Checkpoint, reference: Iterable[str]) -> Checkpoint:
    """A checkpoint whose names have no marks of wrappers, or those that a reference model has.

    Args:
        checkpoint: any.
        reference: the tensor names of the base; it may have marks of its own.
    """
    names = list(dict.fromkeys((*checkpoint.names, *checkpoint.tied)))
    reference = list(reference)
    for pattern in (_MARKS, _ALL):
        if not any(map(pattern.search, (*names, *reference))):
            continue
        known = set(reference)
        meant = {pattern.sub("", name): name for name in reference}
        short = {name: pattern.sub("", name) for name in names}
        if pattern is _ALL and not _fits_better(short.values(), meant, names, known):
            continue
        renamed = {name: name if name in known else meant.get(short[name], short[name]) for name in names}
        if renamed != dict(zip(names, names, strict=True)) and len(set(renamed.values())) == len(names):
            checkpoint = checkpoint.renamed(renamed)
            names = list(renamed.values())
    return checkpoint


def check_merged(checkpoint: Checkpoint, reference: Iterable[str] = ()) -> None:
    """Refuse the state dict of a module into which PEFT's adapters have not been merged: their scale is not in it.

    Args:
        checkpoint: any but PEFT's own folders, which are adapters.
        reference: the tensor names of the base; it may have factors of its own.

    Raises:
        CheckpointError: it is one.
    """
    if checkpoint.deltas:
        return
    found = next((name for name in checkpoint.names if _UNMERGED.fullmatch(name)), None)
    if found is None and (own := next(filter(_FACTORS.fullmatch, checkpoint.names), None)):
        found = None if any(map(_FACTORS.fullmatch, reference)) else own
    if found is not None:
        raise CheckpointError(
            f"{checkpoint.label}: holds a PEFT adapter that is not merged ('{found}'), and not the adapter's scale; "
            "save it with the PEFT model's save_pretrained and merge that folder, or call merge_and_unload() before "
            "you save the model"
        )


def _fits_better(short: Iterable[str], meant: Iterable[str], names: Iterable[str], known: set[str]) -> bool:
    """Whether more names end like one of the base's without the mark than with it."""
    return _count(short, set(meant)) > _count(names, known)


def _count(names: Iterable[str], wanted: set[str]) -> int:
    """How many names are wanted, as they are or after some prefix."""
    return sum(
        any(".".join(parts[cut:]) in wanted for cut in range(len(parts))) for parts in (n.split(".") for n in names)
    )
