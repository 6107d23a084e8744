"""The chat template of a merged model: the base's, another model's, or a file's."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from freemerge.checkpoints import CheckpointError, locate
from freemerge.checkpoints.companions import Companions, top_companions
from freemerge.checkpoints.json_files import find_object, read_object
from freemerge.errors import MergeError
from freemerge.merging.folders.configuration import to_json

_CONFIG = "tokenizer_config.json"
_JINJA, _JSON = "chat_template.jinja", "chat_template.json"
TEMPLATES = (_JINJA, _JSON)
"""The files that hold nothing but a template."""
_LARGEST = 1 << 20  # bytes


def read_template(files: Mapping[str, Path], tokenizer: Mapping[str, Any]) -> Any:
    """The template among a model's files: a text, a list of named ones, or None.

    Args:
        files: name → path.
        tokenizer: the contents of `tokenizer_config.json`.
    """
    if _JINJA in files:
        with files[_JINJA].open("rb") as file:
            return file.read(_LARGEST).decode(errors="replace")
    table = find_object(files[_JSON]) if _JSON in files else None
    return (table or tokenizer).get("chat_template")


def find_template(origin: str, named: Mapping[str, Companions]) -> Any:
    """The template that a user names.

    Args:
        origin: name or last part of the path of one of the models; another model's folder or name on the Hub; or a
            `.jinja` file.
        named: label → the files of the base and of the fine-tuned models.

    Raises:
        MergeError: there is no such model or file, or it has no template.
    """
    if origin.endswith(".jinja"):
        try:
            return Path(origin).expanduser().read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise MergeError(f"chat_template_from: {origin} cannot be read: {error}") from None
    labels = [label for label in named if label == origin] or [
        label for label in named if Path(label).name == Path(origin).name
    ]
    if len(labels) == 1:
        files = named[labels[0]].files
    else:
        try:
            place = locate(origin)
        except CheckpointError as error:
            raise MergeError(f"chat_template_from: {error}") from None
        if not place.is_dir():
            raise MergeError(
                f"chat_template_from: there is no model {origin!r}; name one of {', '.join(map(repr, named))}, a "
                "folder, a name on the Hub, or a .jinja file"
            )
        files = top_companions(place).files
    found = read_template(files, (find_object(files[_CONFIG]) if _CONFIG in files else None) or {})
    if not found:
        raise MergeError(f"chat_template_from: {origin} has no chat template; name another model or a .jinja file")
    return found


def with_template(
    files: Mapping[str, Path], made: Mapping[str, bytes], template: Any
) -> tuple[dict[str, Path], dict[str, bytes]]:
    """The files of a model with another template, where transformers looks for it first.

    Args:
        files: relative path → path of the files that are copied.
        made: name → contents of the other files.
        template: a text, or a list of named templates.

    Returns:
        Both, changed.
    """
    kept = {
        name: path for name, path in files.items() if name not in TEMPLATES and not name.startswith("additional_chat_")
    }
    changed = dict(made)
    if _CONFIG in files or not isinstance(template, str):
        config = read_object(files[_CONFIG]) if _CONFIG in files else {}
        config.pop("chat_template", None)
        changed[_CONFIG] = to_json(config if isinstance(template, str) else {**config, "chat_template": template})
    if isinstance(template, str):
        changed[_JINJA] = template.encode()
    return kept, changed
