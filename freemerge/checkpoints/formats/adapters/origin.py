"""An adapter's reference to its base: model, revision and task, so that PEFT can find and load the base."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from freemerge.checkpoints.architecture import CONFIG as ARCHITECTURE
from freemerge.checkpoints.checkpoint import Checkpoint
from freemerge.checkpoints.formats.adapters.config import CONFIG
from freemerge.checkpoints.formats.adapters.layout import Layout
from freemerge.checkpoints.json_files import read_object
from freemerge.checkpoints.places import cached_id
from freemerge.errors import CheckpointError

_ID = re.compile(r"(?:[A-Za-z0-9][\w.-]*/)?[A-Za-z0-9][\w.-]*")
_PLAIN_TASKS = ("CAUSAL_LM", "SEQ_2_SEQ_LM", "FEATURE_EXTRACTION")  # tasks for which PEFT saves no head


def find_base_id(base: Checkpoint, models: Sequence[Checkpoint]) -> tuple[str | None, str | None]:
    """The base's name on the Hub and its revision, as far as known.

    Adapters name the model that they were trained on; the name is used if all agree. A folder of the Hub's cache has
    the name in its path.

    Args:
        base: the pretrained model.
        models: the fine-tuned ones.
    """
    settings = [found for model in models if (found := _adapter_settings(model)) is not None]
    named = {_as_id(found.get("base_model_name_or_path")) for found in settings}
    if len(named) == 1 and None not in named:
        revisions = {found.get("revision") if isinstance(found.get("revision"), str) else None for found in settings}
        return named.pop(), revisions.pop() if len(revisions) == 1 else None
    return (cached_id(base.folder) if base.folder else None), None


def find_origin(base: Checkpoint, models: Sequence[Checkpoint], layout: Layout) -> dict[str, Any]:
    """The adapter settings by which PEFT finds the base and the class that loads it.

    Args:
        base: the pretrained model.
        models: the fine-tuned ones.
        layout: the layout of the base.
    """
    identity, revision = find_base_id(base, models)
    place = base.folder
    if place is None or not (place / ARCHITECTURE).is_file():
        place = Path(base.label)
    path = str(place.absolute()) if place.exists() else None
    task = layout.task
    if task is None and layout.model_class is None:
        told = {found.get("task_type") for model in models if (found := _adapter_settings(model)) is not None}
        task = next((one for one in _PLAIN_TASKS if told == {one}), None)
    mapping = None
    if task is None and layout.model_class is not None:
        library, name = layout.model_class
        mapping = {"parent_library": library, "base_model_class": name}
    return {
        "base_model_name_or_path": identity or path,
        "revision": revision,
        "task_type": task,
        "auto_mapping": mapping,
    }


def _adapter_settings(model: Checkpoint) -> dict[str, Any] | None:
    if model.folder is None or not (model.folder / CONFIG).is_file() or not model.deltas:
        return None
    try:
        return read_object(model.folder / CONFIG)
    except CheckpointError:
        return None


def _as_id(name: object) -> str | None:
    """A name on the Hub; None for a path."""
    if not isinstance(name, str) or not _ID.fullmatch(name) or len(name) > 200 or Path(name).exists():
        return None
    return name
