"""Tensors that prevent a merge of a fine-tuned model into a base, and advice for each."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence, Set
from typing import NamedTuple

from freemerge.checkpoints import Checkpoint
from freemerge.checkpoints.buffers import is_constant
from freemerge.checkpoints.formats.task_files import parse_record
from freemerge.merging.matching.alignment import Aligned
from freemerge.merging.matching.vocabulary import is_embedding, is_vocabulary

_SHOWN = 10  # number of tensors that a message names

# Names of task heads in architectures.
_HEADS = re.compile(
    r"(?:.*\.)?(?:heads?|classifier|classification_head|lm_head|embed_out|score|qa_outputs|regressor|prototypes|"
    r"criterion|loss|[a-z]+_(?:head|classifier|predictor))(?:\..+|$)"
)
# Head names that are also names of layers in the numbered blocks of a model's body.
_OUTSIDE_BLOCKS = re.compile(
    r"(?:[^\W\d]\w*\.)*(?:pooler|cls|fc|fc_norm|linear_head|out_proj|output_layer|logits_proj|projection)(?:\..+|$)"
)


class Misfit(NamedTuple):
    """A tensor that does not fit."""

    model: Checkpoint
    kind: str  # "missing", "extra", "outside", "dtype" or "shape"
    name: str


def is_head(name: str) -> bool:
    """Whether a tensor has the name of a head."""
    return any(pattern.fullmatch(name) for pattern in (_HEADS, _OUTSIDE_BLOCKS))


def find_misfits(base: Checkpoint, model: Checkpoint, merged: Iterable[str], selected: Set[str]) -> list[Misfit]:
    """Tensors of a model, and of its base, that cannot be merged with each other.

    Args:
        base: the base.
        model: a fine-tuned model, under the base's names.
        merged: names of the base's tensors that are to be merged.
        selected: names of all tensors that the patterns select.

    Heads outside the prefix of the base's tensors in a model are left out, and so are all other tensors there in a
    training checkpoint; anything else there is a misfit.
    """
    found = []
    for name in merged:
        if not model.has(name):
            if not model.partial:
                found.append(Misfit(model, "missing", name))
        elif not model.spec(name).dtype.is_floating_point:
            found.append(Misfit(model, "dtype", name))
        elif model.spec(name).shape != base.spec(name).shape and not is_vocabulary(name, base, model):
            found.append(Misfit(model, "shape", name))
    for name in model.names:
        extra = name not in base and name in selected and model.spec(name).dtype.is_floating_point
        if extra and model.tied.get(name) not in base and not is_constant(name, model.spec(name)):
            found.append(Misfit(model, "extra", name))
    if model.folder is not None and parse_record(model.metadata, model.label) is None:
        lost = [name for name in model.outside if name in selected and (is_embedding(name) or not is_head(name))]
        found += [Misfit(model, "outside", name) for name in lost]
    return found


def describe(base: Checkpoint, misfits: Sequence[Misfit], aligned: Aligned) -> str:
    """One line that gives advice on the first misfit and names the next ones.

    Args:
        base: the base.
        misfits: at least one.
        aligned: the result of matching the names.
    """
    first, *others = misfits
    alike = [misfit for misfit in misfits if misfit.model is first.model]
    text = f"{first.model.label}: the tensor '{first.name}' {_sentence(base, first, alike, aligned)}"
    if not others:
        return text
    listed, last = [], (first.model.label, "")
    for model, kind, name in others[: _SHOWN - 1]:
        start = "" if model.label == last[0] else f"{model.label}: "
        what = "" if (model.label, kind) == last else f" ({_SHORT[kind]})"
        listed.append(f"{start}'{name}'{what}")
        last = model.label, kind
    more = f" and {len(others) - len(listed)} more" if len(others) > len(listed) else ""
    return f"{text}; nor do these fit: {', '.join(listed)}{more}"


_SHORT = {
    "missing": "missing",
    "extra": "not in the base",
    "outside": "beside what the base has",
    "dtype": "not of floating point",
    "shape": "of another shape",
}


def _sentence(base: Checkpoint, misfit: Misfit, alike: Sequence[Misfit], aligned: Aligned) -> str:
    """The problem with a tensor, and what to do about it."""
    model, kind, name = misfit
    if kind == "missing":
        lost = next((each for each in alike if each.kind in ("extra", "outside") and not is_head(each.name)), None)
        advice = (
            f"exclude=['{name}'] keeps the base's"
            if lost is None
            else f"it has '{lost.name}', which is not in the base: the two name their tensors differently, or this is "
            "not the model's base"
        )
        return f"is missing; {base.label} has it with shape {list(base.spec(name).shape)}; {advice}"
    if kind == "dtype":
        return (
            f"has dtype {model.spec(name).dtype}, expected a floating-point one; a quantized model must be dequantized "
            "first"
        )
    if kind == "shape":
        return (
            f"has shape {list(model.spec(name).shape)}, expected {list(base.spec(name).shape)} as in {base.label}; "
            f"exclude=['{name}'] keeps the base's"
        )
    shape = f"with shape {list(model.spec(name).shape)} " if kind == "extra" else ""
    names = [each.name for each in alike if each.kind in ("extra", "outside")]
    if name in aligned.possible:
        return (
            f"{shape}is not in the files of {base.label}, whose model has it: there it is tied to another tensor, or "
            f"new; exclude=['{name}'] loses what was trained of it"
        )
    if len(names) == len(alike) and all(is_head(each) for each in names):
        return f"{shape}is not in {base.label}; if it is a head, leave it out with exclude=['{name}']"
    if aligned.problem:
        return (
            f"{shape}is not in {base.label}, and names could not be matched by the model's modules: {aligned.problem}"
        )
    where = "" if base.folder else "; if there is a folder with its config.json, give that, for names to be matched"
    return (
        f"{shape}is not in {base.label}, and what was trained there would be lost: the two name their tensors "
        f"differently, or this is not the model's base{where}"
    )
