"""The companions of a merged model's weights: the other files of the base's folder, or of a fine-tuned model's."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from freemerge.checkpoints import CheckpointError
from freemerge.checkpoints.companions import Companions
from freemerge.checkpoints.json_files import find_object, read_object
from freemerge.checkpoints.stacking import with_layers
from freemerge.checkpoints.tied_tensors import obeys_untying, separate
from freemerge.errors import MergeError
from freemerge.merging.engine.plan import Plan
from freemerge.merging.folders.agreement import describe_differences, differing_weights
from freemerge.merging.folders.configuration import to_json, with_dtype, with_weights_of
from freemerge.merging.folders.licences import Licence, describe_licences, read_licence
from freemerge.merging.folders.template import find_template, with_template

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
    note: str | None = None  # differences between the base and the fine-tuned models, and what is left out
    licences: Mapping[str, Licence] = MappingProxyType({})  # "base" and labels of models → licence, where it is known

    def record(self) -> dict[str, Any]:
        """Their entry in `freemerge.json`."""
        licences = {label: _entry(licence) for label, licence in self.licences.items()}
        return {
            "from": self.origin,
            "copied": sorted(self.copied),
            "modules": self.modules,
            "left_out": self.left_out,
            "note": self.note,
            **({"licences": licences} if licences else {}),
        }


def choose_files(
    companions: Sequence[Companions],
    plan: Plan,
    origin: str | None = None,
    template: str | None = None,
    trust_remote_code: bool = False,
) -> Files:
    """Choose the files of the result: the base's, or a fine-tuned model's with the base's where it has none.

    Args:
        companions: the companions of the base and of each model, see `companions_of`.
        plan: the merge.
        origin: name, path or last part of the path of the fine-tuned model whose files to take; "base" for the base's
            without a warning; None for the base's with a warning about differences.
        template: the origin of another chat template, see `find_template`; None for the files'.
        trust_remote_code: take Python code along; otherwise it is left out, with a warning.

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
    made: dict[str, bytes] = {}
    untied = bool(plan.untied) and "config.json" in files and obeys_untying(files["config.json"].parent)
    order = plan.base.layers
    if "config.json" in files and (label is not None or plan.dtype is not None or untied or order is not None):
        config = read_object(files["config.json"])
        if label is not None and "config.json" in base.files:
            config = with_weights_of(config, read_object(base.files["config.json"]))
        config = separate(config) if untied else config
        config = config if order is None else with_layers(config, order)
        made["config.json"] = to_json(config if plan.dtype is None else with_dtype(config, plan.dtype))
    left_out = base.left_out
    if template is not None:
        files, made = with_template(files, made, find_template(template, {"base": base, **named}))
    code = [name for name in files if name.endswith(".py")]
    if code and not trust_remote_code:
        files = {name: path for name, path in files.items() if name not in code}
        left_out = [*left_out, *code]
        said = f"custom code is left out: {', '.join(code)}; trust_remote_code=True takes it along"
        note = f"{note}; {said}" if note else said
    own, *others_own = (read_licence(checkpoint.folder) for checkpoint in (plan.base, *plan.models))
    licences = dict(zip(named, others_own, strict=True))
    if said_of_licences := describe_licences(own, licences):
        note = f"{note}; {said_of_licences}" if note else said_of_licences
    known = {label: each for label, each in {"base": own, **licences}.items() if each is not None}
    return Files(files, made, base.modules, left_out, label or "base", note, known)


def _entry(licence: Licence) -> dict[str, str]:
    """A licence in the words of a model card."""
    keys = {"license": licence.identifier, "license_name": licence.name, "license_link": licence.link}
    return {key: value for key, value in keys.items() if value is not None}


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
