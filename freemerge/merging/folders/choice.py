"""The companions of a merged model's weights: the other files of the base's folder, or of a fine-tuned model's."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from freemerge.checkpoints import CheckpointError
from freemerge.checkpoints.companions import Companions
from freemerge.checkpoints.json_files import find_object, read_object
from freemerge.checkpoints.tied_tensors import obeys_untying, separate
from freemerge.errors import MergeError
from freemerge.merging.engine.plan import Plan
from freemerge.merging.folders.agreement import describe_differences, differing_weights
from freemerge.merging.folders.configuration import to_json, with_dtype, with_weights_of

_TOKENIZER_CONFIG = "tokenizer_config.json"
_VOCABULARY = re.compile(
    r"tokenizer\.json|vocab\..*|.*\.(model|tiktoken|spm)(\.v\d+)?|tekken\.json|spiece\..*|bpe\.codes"
)
_TEMPLATE = re.compile(r"chat_template\.(jinja|json)|additional_chat_templates/.*")
_TOKENIZER = re.compile(
    rf"{_VOCABULARY.pattern}|{_TEMPLATE.pattern}|tokenizer.*|special_tokens_map\.json|added_tokens\.json|merges\.txt"
    r"|.*\.vocab"
)


class Files(NamedTuple):
    """The companions of a merged model's weights: the other files of its folder."""

    copied: dict[str, Path]  # relative path → full path
    made: dict[str, bytes]  # name → contents, for files that are not copied unchanged
    modules: list[str]  # subfolders with their own weights
    left_out: list[str]  # files and folders of the base that are left out
    origin: str  # the model that the files come from: "base", or a fine-tuned model's name
    note: str | None = None  # differences between the base and the fine-tuned models

    def record(self) -> dict[str, Any]:
        """Their entry in `freemerge.json`."""
        return {
            "from": self.origin,
            "copied": sorted(self.copied),
            "modules": self.modules,
            "left_out": self.left_out,
            "note": self.note,
        }


def choose_files(companions: Sequence[Companions], plan: Plan, origin: str | None = None) -> Files:
    """Choose the files of the result: the base's, or a fine-tuned model's with the base's where it has none.

    Args:
        companions: the companions of the base and of each model, see `companions_of`.
        plan: the merge.
        origin: name, path or last part of the path of the fine-tuned model whose files to take; "base" for the base's
            without a warning; None for the base's with a warning about differences.

    Raises:
        MergeError: there is no such model, its files do not fit the result, or an unmerged weight file beside the
            base's differs in a model and `origin` is None. CheckpointError: `config.json` has to be changed but cannot
            be read.
    """
    base, *others = companions
    named = dict(zip((model.label for model in plan.models), others, strict=True))
    label = None if origin is None or (origin == "base" and origin not in named) else _find_label(named, origin)
    note = None
    if origin is None and base.files:
        try:
            note, found = describe_differences(base, named), differing_weights(base, named)
        except OSError as error:
            raise CheckpointError(f"{error.filename}: cannot be read: {error.strerror or error}") from None
        if found:
            raise MergeError(
                f"{found[0]}: {found[1]} holds weights other than the base's, and cannot be merged because it "
                f"is not a model folder; companions_from='base' takes the base's, "
                f"companions_from={found[0]!r} that model's"
            )
    files = base.files if label is None else _replaced(base, named[label], label, plan)
    made = {}
    untied = bool(plan.untied) and "config.json" in files and obeys_untying(files["config.json"].parent)
    if "config.json" in files and (label is not None or plan.dtype is not None or untied):
        config = read_object(files["config.json"])
        if label is not None and "config.json" in base.files:
            config = with_weights_of(config, read_object(base.files["config.json"]))
        config = separate(config) if untied else config
        made["config.json"] = to_json(config if plan.dtype is None else with_dtype(config, plan.dtype))
    return Files(files, made, base.modules, base.left_out, label or "base", note)


def _find_label(named: Mapping[str, Companions], origin: str) -> str:
    """The only fine-tuned model with this name."""
    exact = [label for label in named if label == origin]
    if len(found := exact or [label for label in named if Path(label).name == Path(origin).name]) == 1:
        return found[0]
    raise MergeError(
        f"companions_from: {'there is no' if not found else 'there is more than one'} fine-tuned model {origin!r}; "
        f"name one of {', '.join(map(repr, named))}, or 'base'"
    )


def _replaced(base: Companions, model: Companions, label: str, plan: Plan) -> dict[str, Path]:
    """The base's files, replaced by those of a model, without mixing two tokenizers."""
    if not model.files:
        raise MergeError(f"companions_from: {label} has no configuration beside its weights; name another model")
    index = [each.label for each in plan.models].index(label)
    for name in plan.rows:
        if plan.models[index].spec(name).shape[0] != plan.base.spec(name).shape[0]:
            raise MergeError(
                f"companions_from: the tokenizer of {label} is for {plan.models[index].spec(name).shape[0]:,} rows of "
                f"'{name}', and the result has {plan.base.spec(name).shape[0]:,}, the base's; name another model"
            )
    apart = tuple(f"{module}/" for module in model.modules if module not in base.modules)
    taken = {name: path for name, path in model.files.items() if not name.startswith(apart)}
    if apart:
        taken.pop("modules.json", None)
    tokenizer, template = any(map(_VOCABULARY.fullmatch, taken)), any(map(_TEMPLATE.fullmatch, taken))
    template = template or "chat_template" in (find_object(taken.get(_TOKENIZER_CONFIG, Path())) or {})
    kept = {
        name: path
        for name, path in base.files.items()
        if not (tokenizer and _TOKENIZER.fullmatch(name)) and not (template and _TEMPLATE.fullmatch(name))
    }
    return {**kept, **taken}
