"""The Trainer arguments of a stage: their types, which the parser reads, and their check.

They stand apart from the settings because jsonargparse parses the source of a module that contains `TYPE_CHECKING`
again for every class and every typed dictionary in it: dozens of times for each command.
"""

from __future__ import annotations

import inspect
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any, TypedDict, get_type_hints

import lightning as L

from freemerge.pipeline.loggers import check_loggers

TrainerArguments = dict[str, Any]
if not TYPE_CHECKING:  # the parser checks and instantiates callbacks, profilers, … as those of `trainer`
    _HINTS = {name: hint for name, hint in get_type_hints(L.Trainer.__init__).items() if name != "return"}
    _HINTS["logger"] = bool | str | dict[str, Any] | list[str | dict[str, Any]] | None  # each fit makes its own
    TrainerArguments = TypedDict("TrainerArguments", _HINTS, total=False)


def check_trainer(where: str, overrides: dict[str, Any]) -> None:
    """Check the Trainer arguments of a stage.

    Args:
        where: the stage, for the message.
        overrides: the arguments.

    Raises:
        ValueError: the Trainer has no such argument, or `logger` is not the configuration of a logger.
    """
    known = inspect.signature(L.Trainer.__init__).parameters
    check_loggers(f"{where}.trainer.logger", overrides.get("logger"))
    for key in overrides:
        if key not in known:
            near = get_close_matches(key, known, n=1)
            raise ValueError(
                f"{where}.trainer: Trainer has no argument {key!r}" + (f"; did you mean {near[0]!r}?" if near else "")
            )
