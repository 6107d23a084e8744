"""The plan of a run: which finished stages would run again, and why.

Finished results are replaced only if the user asks for it. An exception is an extension by further tasks: the merge of
more models, the router for more tasks, and the stages that read these.
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
    """The plan for the finished stages of a run.

    Args:
        replaced: name of a stage → why it would run again; an interrupted fit with a checkpoint is treated as finished.
        extended: names of the stages that run again for further tasks.
        unsettled: names of the stages that read files which do not exist yet, and may have to run again.
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
    """Make the plan of a run.

    Args:
        stages: functions that make the stages, in their order.
        wanted: tells whether the stage of a name is to run.

    Returns:
        The plan.
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
    """Describe why a finished stage must run again.

    Args:
        finished: its record.
        inputs: its inputs now.

    Returns:
        The reason; None if it is only an extension by further tasks, or if no reason is known yet.
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
    """Whether the new inputs are the old ones, in the same order, plus those of further tasks."""
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
    """Yield all differences as `key: old → new`; files that do not exist yet are not compared."""
    if old == new or new == NOT_MADE:
        return
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for key in dict.fromkeys((*old, *new)):
            yield from _differences(old.get(key), new.get(key), f"{path}.{key}" if path else str(key))
        return
    if _is_hash(old) and _is_hash(new):
        yield f"{path} has changed"
    else:
        yield f"{path}: {_short(old)} → {_short(new)}"


def _is_hash(value: Any) -> bool:
    return isinstance(value, str) and len(value) == 64 and not set(value) - set("0123456789abcdef")


def _short(value: Any) -> str:
    if _is_hash(value):
        return "a file"
    text = "null" if value is None else str(value)
    return text if len(text) <= 40 else f"{text[:39]}…"
