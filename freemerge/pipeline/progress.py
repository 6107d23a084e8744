"""The position of a run in its stages, and an estimate of the time left."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean


class Progress:
    """The stages of a run in their order, and what those that are done took.

    Args:
        names: the stages' names, such as `finetune birds`; the first word is the kind of stage.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.names = list(names)
        self._ahead = list(names)
        self._seconds: dict[str, list[float]] = {}

    def place(self, name: str) -> str:
        """`2 of 9`; nothing for a stage that is not of this run."""
        return f"{self.names.index(name) + 1} of {len(self.names)}" if name in self.names else ""

    def done(self, name: str, seconds: float) -> None:
        """Note what a stage took, now or in an earlier run."""
        self._seconds.setdefault(_kind(name), []).append(seconds)
        if name in self._ahead:
            self._ahead.remove(name)

    def left(self) -> str:
        """`about 3 min left`; `at least …` where a kind of stage is ahead of which none was done; empty if none was."""
        known = [fmean(self._seconds[_kind(name)]) for name in self._ahead if _kind(name) in self._seconds]
        if not known:
            return ""
        word = "about" if len(known) == len(self._ahead) else "at least"
        return f"{word} {_duration(sum(known))} left"


def _kind(name: str) -> str:
    """Stages of a kind take about as long as each other; experts are extracted in one and trained in others."""
    return name if name == "experts extracted" else name.split()[0]


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{max(1, round(seconds))} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
