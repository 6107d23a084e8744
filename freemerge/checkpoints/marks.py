"""Wrapper marks in the names of a module's tensors, and the names without them.

`torch.compile`, activation checkpointing, FSDP and data parallelism wrap modules, and state dicts saved from inside
them contain the wrapper's attribute: `model._orig_mod.layers.0._checkpoint_wrapped_module.q_proj.weight`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from freemerge.checkpoints.checkpoint import Checkpoint
from freemerge.errors import CheckpointError

_MARKS = re.compile(r"(?<![^.])(?:_orig_mod|_checkpoint_wrapped_module|_fsdp_wrapped_module|_forward_module)\.")
# The mark of data parallelism, `module.`, is also a layer's name in some architectures.
_ALL = re.compile(_MARKS.pattern.replace("_forward_module", "_forward_module|module"))
# A module's state dict contains the name of the adapter: `lora_A.default.weight`, `modules_to_save.default.weight`.
_UNMERGED = re.compile(
    r"(?:.*\.)?(?:base_layer\..+|modules_to_save\.[^.]+\..+|original_module\..+"
    r"|(?:lora_\w+|ia3_l|(?:hada|lokr|oft|vera|boft)_\w+)\.(?!(?:weight|bias)$)[^.]+(?:\.(?:weight|bias))?)"
)
_FACTORS = re.compile(r"(?:.*\.)?(?:lora_[AB]\.weight|lora_embedding_[AB]|ia3_l)")  # in a file written by PEFT


def without_marks(checkpoint: Checkpoint, reference: Iterable[str]) -> Checkpoint:
    """A checkpoint without wrapper marks in its names, except for marks that the reference model also has.

    Args:
        checkpoint: any checkpoint.
        reference: the tensor names of the base, which may contain marks themselves.
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
    """Refuse the state dict of a module with unmerged PEFT adapters, because it does not contain their scale.

    Args:
        checkpoint: any checkpoint except PEFT's own folders, which are adapters.
        reference: the tensor names of the base, which may contain factors itself.

    Raises:
        CheckpointError: the adapters are not merged.
    """
    if checkpoint.deltas:
        return
    found = next((name for name in checkpoint.names if _UNMERGED.fullmatch(name)), None)
    if found is None and (own := next(filter(_FACTORS.fullmatch, checkpoint.names), None)):
        found = None if any(map(_FACTORS.fullmatch, reference)) else own
    if found is not None:
        raise CheckpointError(
            f"{checkpoint.label}: holds an unmerged PEFT adapter ('{found}') without the adapter's scale; save it "
            "with the PEFT model's save_pretrained and merge that folder, or call merge_and_unload() before "
            "you save the model"
        )


def _fits_better(short: Iterable[str], meant: Iterable[str], names: Iterable[str], known: set[str]) -> bool:
    """Whether more names match the end of a base name without the mark than with it."""
    return _count(short, set(meant)) > _count(names, known)


def _count(names: Iterable[str], wanted: set[str]) -> int:
    """The number of names that are wanted, as they are or after a prefix."""
    return sum(
        any(".".join(parts[cut:]) in wanted for cut in range(len(parts))) for parts in (n.split(".") for n in names)
    )
