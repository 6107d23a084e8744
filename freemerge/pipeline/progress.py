"""The position of a run in its stages, and an estimate of the time left."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean


class Progress:
    """The stages of a run in their order, and the durations of the finished ones.

    Args:
        names: the stages' names, such as `finetune birds`; the first word is the kind of stage.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.names = list(names)
        self._ahead = list(names)
        self._seconds: dict[str, list[float]] = {}

    def place(self, name: str) -> str:
        """The position of a stage, such as `2 of 9`; "" for a stage that is not part of this run."""
        return f"{self.names.index(name) + 1} of {len(self.names)}" if name in self.names else ""

    def done(self, name: str, seconds: float) -> None:
        """Record the duration of a stage in seconds, in this run or an earlier one."""
        self._seconds.setdefault(_kind(name), []).append(seconds)
        if name in self._ahead:
            self._ahead.remove(name)

    def left(self) -> str:
        """An estimate of the time left, such as `about 3 min left`.

        Returns:
            The estimate; it begins with `at least` if no stage of some remaining kind is finished yet, and is empty if
            that holds for all remaining kinds.
        """
        known = [fmean(self._seconds[_kind(name)]) for name in self._ahead if _kind(name) in self._seconds]
        if not known:
            return ""
        word = "about" if len(known) == len(self._ahead) else "at least"
        return f"{word} {_duration(sum(known))} left"


def _kind(name: str) -> str:
    """The kind of a stage; stages of one kind take about equally long. Extraction and training of experts differ."""
    return name if name == "experts extracted" else name.split()[0]


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{max(1, round(seconds))} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
