"""Accuracies of merging methods from docs/benchmarks, each at the scale that validation data chose.

The tests compare every number with the page. To extend the advice, add an entry here for each new table there.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from freemerge.merging.methods.ace import ACEMerging
from freemerge.merging.methods.balanced import BalancedMerging
from freemerge.merging.methods.base import MergeMethod
from freemerge.merging.methods.fr import FRMerging
from freemerge.merging.methods.iso_c import IsoC
from freemerge.merging.methods.iso_cts import IsoCTS
from freemerge.merging.methods.pcb import PCBMerging
from freemerge.merging.methods.task_arithmetic import TaskArithmetic
from freemerge.merging.methods.ties import Ties
from freemerge.merging.methods.tsv import TSVMerge
from freemerge.merging.methods.weight_average import WeightAverage

REFERENCE = "task arithmetic"
"""The line with which the others are compared."""


class Measured(NamedTuple):
    """One table of accuracies.

    Args:
        title: the heading of its page in docs/benchmarks.
        base: the base's mean accuracy over the tasks, in percent.
        averages: line of the table → mean accuracy of the merge.
    """

    title: str
    base: float
    averages: Mapping[str, float]

    def gain(self, line: str) -> float:
        """The points of a merge over task arithmetic, which every table has; not every table has every line."""
        return self.averages[line] - self.averages[REFERENCE]


LINES: Mapping[str, type[MergeMethod]] = {
    "average": WeightAverage,
    "task arithmetic": TaskArithmetic,
    "TIES": Ties,
    "PCB": PCBMerging,
    "FR": FRMerging,
    "TSV-M": TSVMerge,
    "Iso-C": IsoC,
    "Iso-CTS": IsoCTS,
    "ACE": ACEMerging,
    "balanced": BalancedMerging,
}
"""Line of a table → the method, at its default parameters."""

TABLES = (
    Measured(
        "Images: EtinyNet on eight tasks",
        73.1,
        {"average": 42.6, "task arithmetic": 65.7, "TIES": 73.2, "PCB": 73.3, "FR": 34.8},
    ),
    Measured(
        "Images: a ViT of 32 pixels on eight tasks",
        70.9,
        {"average": 71.2, "task arithmetic": 71.2, "TIES": 71.1, "PCB": 71.2, "FR": 71.2},
    ),
    Measured("Texts: MiniLM-L6 on eight tasks", 62.8, {"task arithmetic": 61.9, "FR": 63.3}),
    Measured(
        "Texts, zero-shot heads: MiniLM-L6 on eight tasks",
        58.9,
        {
            "average": 66.7,
            "task arithmetic": 75.0,
            "TIES": 74.2,
            "PCB": 74.2,
            "FR": 73.7,
            "TSV-M": 78.3,
            "Iso-C": 77.6,
            "Iso-CTS": 78.1,
            "ACE": 79.3,
            "balanced": 79.9,
        },
    ),
    Measured(
        "Quickstart: a small ViT on six image tasks",
        61.2,
        {"average": 66.7, "task arithmetic": 67.3, "TIES": 67.7, "PCB": 70.2, "FR": 66.7, "balanced": 73.9},
    ),
)


def best_line(least: int = 2) -> tuple[str, list[Measured]]:
    """The method whose merges gained most over task arithmetic, on average over the tables that have it.

    Args:
        least: number of tables that a method must be in.

    Returns:
        Its line, and the tables.
    """
    found = {line: [table for table in TABLES if line in table.averages] for line in LINES}
    gains = {
        line: sum(table.gain(line) for table in tables) / len(tables)
        for line, tables in found.items()
        if len(tables) >= least
    }
    best = max(gains, key=gains.__getitem__)
    return best, found[best]
