"""Differences between base and fine-tuned models in their companion files, such as a chat template.

The result takes the base's files, so differences that all fine-tuned models share would be lost silently. Settings that
do not affect the use of a model (names, dtypes, dropout, labels of a head) are ignored.
"""

from __future__ import annotations

import filecmp
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from freemerge.checkpoints.companions import Companions
from freemerge.checkpoints.json_files import find_object
from freemerge.merging.folders.template import TEMPLATES, read_template

_TOKENIZER = "tokenizer_config.json"
_ADDED = ("tokenizer.json", "added_tokens.json", _TOKENIZER)
_TEMPLATE = "chat template"  # the pseudo-file of a chat template, wherever it is stored
_SHOWN = 10  # differences in one message
_LONGEST = 60  # characters of a value in a message

_PASSED_OVER = re.compile(
    r"(transformers_version|_.*|.*dtype|architectures|auto_map|id2label|label2id|num_labels|problem_type|model_type"
    r"|use_cache|.*(output|return)_[a-z_]+|finetuning_task|gradient_checkpointing|vocab_size|unsloth.*|.*drop(out|_path).*"
    r"|.*dropout|processor_class|.*_type|name_or_path|cache_implementation)(\..*)?"
)
# files in which different versions of transformers store the same settings
_ROPE = re.compile(r"((.*\.)?)rope_(?:parameters|scaling)\.(.*)")


def describe_differences(base: Companions, models: Mapping[str, Companions]) -> str | None:
    """One line about differences between the base and the fine-tuned models; None if there are none.

    Args:
        base: the base's companions.
        models: label → the fine-tuned model's companions.
    """
    own = _read_traits(base)
    others = [traits for traits in map(_read_traits, models.values()) if traits]
    shared, split = [], []
    for kind in dict.fromkeys(kind for traits in others for kind in traits):
        if kind == "config.json" and kind not in own:
            continue  # a base without a configuration
        speaking = [traits[kind] for traits in others if kind in traits]
        for key in dict.fromkeys(key for table in speaking for key in table):
            ours, values = own.get(kind, {}).get(key), [table.get(key) for table in speaking]
            if ours in values or not _counts(kind, key, values[0], ours):
                continue
            if all(value == values[0] for value in values):
                shared.append(_tell(kind, key, values[0], ours))
            elif key == _TEMPLATE:
                split.append(key)
    added = [tokens for model in models.values() if (tokens := _added_tokens(base, model)) is not None]
    if base.files and added and added[0] and all(tokens == added[0] for tokens in added):
        shared.append(f"added tokens {_short(added[0])}")
    shared += [f"{name} (the base: none)" for name in _shared_files(base, list(models.values()))]
    said = []
    if shared:
        more = f", and {len(shared) - _SHOWN} more" if len(shared) > _SHOWN else ""
        said.append(
            f"the fine-tuned models agree on settings that differ from the base's: {', '.join(shared[:_SHOWN])}{more}"
        )
    if split:
        said.append("every fine-tuned model has a different chat template, and none has the base's")
    if not said:
        return None
    first = next(label for label, companions in models.items() if companions.files)
    return f"{'; '.join(said)}; the result has the base's, companions_from={first!r} takes that model's"


def differing_weights(base: Companions, models: Mapping[str, Companions]) -> tuple[str, str] | None:
    """A model and an unmerged weight file of it that differs from the base's; None if there is none."""
    for label, model in models.items():
        for name in base.weights:
            if name in model.files and not filecmp.cmp(base.files[name], model.files[name], shallow=False):
                return label, name
    return None


def _read_traits(companions: Companions) -> dict[str, dict[str, Any]]:
    """File → key → value, for the settings among a model's companions that affect its use."""
    traits: dict[str, dict[str, Any]] = {}
    for name, path in companions.files.items():
        if name in ("config.json", "generation_config.json") or re.fullmatch(r"(\w*processor)_config\.json", name):
            traits[name] = _flat(find_object(path) or {})
    found = find_object(companions.files[_TOKENIZER]) if _TOKENIZER in companions.files else None
    if found is not None:
        tokens = {key: value for key, value in found.items() if key.endswith("_token")}
        traits[_TOKENIZER] = {
            key: value.get("content") if isinstance(value, dict) else value for key, value in tokens.items()
        }
    if found is not None or any(name in companions.files for name in TEMPLATES):
        traits["template"] = {_TEMPLATE: read_template(companions.files, found or {})}
    return {name: table for name, table in traits.items() if table}


def _flat(table: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    """Flatten nested tables, joining keys with dots."""
    flat: dict[str, Any] = {}
    for key, value in table.items():
        name = above + key
        if isinstance(value, dict):
            flat |= _flat(value, f"{name}.")
        elif value is not None and (key not in ("rope_type", "type") or value != "default"):
            flat[_ROPE.sub(lambda found: found[1] + "rope_" + found[3].removeprefix("rope_"), name)] = value
    return flat


def _counts(kind: str, key: str, value: Any, ours: Any) -> bool:
    """Whether a difference is significant; versions of transformers write different keys with the same meaning."""
    last = key.rpartition(".")[2]
    if last.startswith("rope_"):
        return ours is not None or (key.count("rope_") == 1 and not (last == "rope_theta" and value == 10_000))
    if _PASSED_OVER.fullmatch(key) or _PASSED_OVER.fullmatch(last):
        return False
    return ours is not None or kind in ("generation_config.json", _TOKENIZER, "template")


def _added_tokens(base: Companions, model: Companions) -> list[str] | None:
    """Tokens that a model has added to the base's vocabulary; None if unknown."""
    paths = [(base.files.get(name), model.files.get(name)) for name in _ADDED]
    # Tokenizers may be large, so files of the same size are taken as equal.
    if not any(theirs and (not ours or ours.stat().st_size != theirs.stat().st_size) for ours, theirs in paths):
        return None
    before = _read_tokens(base, vocabulary=True)
    return sorted(_read_tokens(model) - before) if before else None


def _read_tokens(companions: Companions, vocabulary: bool = False) -> set[str]:
    """The tokens added to a tokenizer and, optionally, those of its own vocabulary."""
    found: set[str] = set()
    for name in _ADDED:
        table = (find_object(companions.files[name]) if name in companions.files else None) or {}
        if name == "added_tokens.json":
            found |= table.keys()
        for entries in (table.get("added_tokens"), table.get("added_tokens_decoder")):
            values = entries.values() if isinstance(entries, dict) else entries if isinstance(entries, list) else ()
            found |= {str(value.get("content")) for value in values if isinstance(value, dict)}
        model = table.get("model")
        if vocabulary and isinstance(model, dict) and isinstance(model.get("vocab"), dict):
            found |= model["vocab"].keys()
    return found


def _tell(kind: str, key: str, value: Any, ours: Any) -> str:
    if key == _TEMPLATE:
        return f"a chat template (the base: {'another' if ours else 'none'})"
    return f"{key} {_short(value)} of {kind} (the base: {_short(ours)})"


def _short(value: Any) -> str:
    text = json.dumps(value) if value is not None else "none"
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 1]}…"


def _shared_files(base: Companions, models: Sequence[Companions]) -> Iterator[str]:
    """Files that are identical in all models with a folder and differ from the base's."""
    companions = [model for model in models if model.files]
    first = companions[0].files if companions else {}
    parts = tuple(f"{module}/" for model in companions for module in model.modules if module not in base.modules)
    known = ("config.json", "generation_config.json", *_ADDED, *TEMPLATES)  # compared by their contents
    for name, path in first.items():
        if name in base.files or name in known or name.startswith(parts):
            continue
        others = [model.files.get(name) for model in companions[1:]]
        if all(other is not None and filecmp.cmp(path, other, shallow=False) for other in others):
            yield name
