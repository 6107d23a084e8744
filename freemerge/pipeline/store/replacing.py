"""Before anything runs: which finished stages would be done again, and why.

Nothing finished is replaced because a setting changed, unless that is asked for. What only takes in further tasks (the
merge of more models, the router among more tasks, and what is made from these) is an extension, and needs no asking.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from freemerge.pipeline.store.stage_folder import NOT_MADE, StageFolder

PER_TASK = frozenset({"tasks", "models", "heads", "data", "head_groups"})
"""The inputs of stages over all tasks that grow when a task is added."""


@dataclass
class Plan:
    """What would become of the finished stages.

    Args:
        replaced: name of a stage → why it would be done again; a fit with a checkpoint counts as finished here.
        extended: names of the stages that are done again for more tasks.
        unsettled: names of the stages that read what is yet to be made, and may have to be done again.
    """

    replaced: dict[str, str] = field(default_factory=dict)
    extended: set[str] = field(default_factory=set)
    unsettled: set[str] = field(default_factory=set)

    @property
    def reason(self) -> str:
        """The stages and reasons, in one line."""
        stages: dict[str, list[str]] = {}
        for name, why in self.replaced.items():
            stages.setdefault(why, []).append(name)
        return "; ".join(f"{', '.join(names)} ({why})" for why, names in stages.items())


def make_plan(stages: Iterable[Callable[[], StageFolder]], wanted: Callable[[str], bool]) -> Plan:
    """Look at all stages in their order.

    Args:
        stages: each makes its stage.
        wanted: whether the stage of that name is to be run.
    """
    plan = Plan()
    for make in stages:
        stage = make()
        causes = [name for name in stage.made_from if name in plan.replaced]
        finished, why = stage.finished(), None
        if finished is not None and finished["key"] != stage.key:
            why = difference(finished, stage.inputs)
        elif finished is None and (begun := stage.begun()) is not None and begun != stage.key:
            why = "a fit that was begun with other settings"
        if why is not None and wanted(stage.name):
            plan.replaced[stage.name] = why
        elif causes and finished is not None and wanted(stage.name):
            plan.replaced[stage.name] = f"made from {causes[0]}"
        elif finished is None or any(name in plan.unsettled for name in stage.made_from):
            plan.unsettled.add(stage.name)
        if stage.name not in plan.replaced and finished is not None:
            grown = finished["key"] != stage.key and is_extension(finished["inputs"], stage.inputs)
            if grown or any(name in plan.extended for name in stage.made_from):
                plan.extended.add(stage.name)
    return plan


def difference(finished: Mapping[str, Any], inputs: Mapping[str, Any]) -> str | None:
    """Why a stage that is finished must be done again; None if only further tasks are the reason, or none is known yet.

    Args:
        finished: its record.
        inputs: what it would be made from now.
    """
    if "files" not in finished:
        return "made by an earlier version of freemerge, which kept no record of the files"
    if is_extension(finished["inputs"], inputs):
        return None
    found = list(_differences(finished["inputs"], inputs))
    if not found:
        return None
    return ", ".join(found[:2]) + (f", and {len(found) - 2} more" if len(found) > 2 else "")


def is_extension(old: Mapping[str, Any], new: Mapping[str, Any]) -> bool:
    """Whether new inputs are the old ones, in their order, and those of further tasks."""
    before, after = old.get("tasks"), new.get("tasks")
    if not before or not after or len(after) <= len(before):
        return False
    if [task for task in after if task in before] != before:
        return False
    reduced = {
        key: {task: part for task, part in value.items() if task in before}
        if key in PER_TASK and isinstance(value, Mapping)
        else value
        for key, value in new.items()
    }
    return not list(_differences(old, {**reduced, "tasks": before}))


def _differences(old: Any, new: Any, path: str = "") -> Iterable[str]:
    """`key: old → new` of all that differs; what is yet to be made differs from nothing."""
    if old == new or new == NOT_MADE:
        return
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for key in dict.fromkeys((*old, *new)):
            yield from _differences(old.get(key), new.get(key), f"{path}.{key}" if path else str(key))
        return
    if _is_hash(old) and _is_hash(new):
        yield f"{path} has another content"
    else:
        yield f"{path}: {_short(old)} → {_short(new)}"


def _is_hash(value: Any) -> bool:
    return isinstance(value, str) and len(value) == 64 and not set(value) - set("0123456789abcdef")


def _short(value: Any) -> str:
    if _is_hash(value):
        return "a file"
    text = "null" if value is None else str(value)
    return text if len(text) <= 40 else f"{text[:39]}…"
