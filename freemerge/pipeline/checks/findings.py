"""The findings of the checks before a run's first fit."""

from __future__ import annotations

from dataclasses import dataclass, field

from freemerge.errors import one_line


class CheckError(ValueError):
    """A run would fail after hours.

    Args:
        faults: one line each: task, setting, expected, found, what to do.
    """

    def __init__(self, faults: list[str]) -> None:
        self.faults = [one_line(fault) for fault in faults]
        super().__init__("; ".join(self.faults))


@dataclass
class Findings:
    """The findings of the checks: faults stop the run before it begins, doubts are printed and do not."""

    faults: list[str] = field(default_factory=list)
    doubts: list[str] = field(default_factory=list)

    def fault(self, message: object) -> None:
        """Add a fault, unless it is already there."""
        _add(self.faults, message)

    def doubt(self, message: object) -> None:
        """Add a doubt, unless it is already there."""
        _add(self.doubts, message)


def _add(messages: list[str], message: object) -> None:
    text = " ".join(str(message).split())
    if text not in messages:
        messages.append(text)
