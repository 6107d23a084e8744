"""The report: every model on every task, as a table on the terminal, as JSON, and as a picture."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from freemerge.checkpoints import expand

_Column = tuple[str, Iterable[str]]  # its heading and its cells

_WIDTH = 100  # of lines that are not written to a terminal
_MOST_BARS = 8  # tasks; of more, bars are too thin to be told apart


@dataclass(frozen=True)
class Row:
    """One row of the report.

    Args:
        name: what was evaluated.
        scores: task name → value of the task's metric, such as accuracy in [0, 1].
        extra_bytes: bytes on disk beyond one backbone and the heads, which every model needs; None where the notion
            does not apply.
        chosen: hyperparameters chosen on validation data, with the validation score that chose them.
        kind: `model` for lines to be compared with the individual models, `router` for routing accuracy.
        held_out: likewise for tasks that were not merged; they count in no average.
    """

    name: str
    scores: dict[str, float]
    extra_bytes: int | None = None
    chosen: dict[str, Any] = field(default_factory=dict)
    kind: str = "model"
    held_out: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Report:
    """All rows, measured on one split.

    Args:
        title: the heading.
        rows: the lines; the one named `reference` holds each task's own fine-tuned model.
        search: method → every candidate that was tried on validation data, with its mean accuracy.
        settings: what else is needed to reproduce the numbers (seed, sizes, versions).
        reference: name of the line that normalized scores are relative to.
        metrics: task → name of its metric, where that is not accuracy.
    """

    title: str
    rows: list[Row]
    search: dict[str, list[dict[str, float]]] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    reference: str = "individual"
    metrics: dict[str, str] = field(default_factory=dict)

    def row(self, name: str) -> Row:
        """The line of that name."""
        return next(row for row in self.rows if row.name == name)

    def average(self, row: Row) -> float:
        """Mean over the tasks of scores in which more is better."""
        return mean_score(row.scores, self.metrics if row.kind == "model" else {})

    def normalized(self, row: Row) -> float:
        """Mean over tasks of score ÷ the individual model's; 0 where the latter is 0."""
        scores, best = self._comparable(row), self._comparable(self.row(self.reference))
        return sum(score / best[task] if best[task] else 0.0 for task, score in scores.items()) / len(scores)

    def worst_drop(self, row: Row) -> tuple[float, str]:
        """The largest loss of score against the individual model (negative for a loss), and the task it is on."""
        best = self._comparable(self.row(self.reference))
        return min((score - best[task], task) for task, score in self._comparable(row).items())

    def _comparable(self, row: Row) -> dict[str, float]:
        return {task: comparable(score, self.metrics.get(task, "accuracy")) for task, score in row.scores.items()}

    def as_dict(self) -> dict[str, Any]:
        """The report as plain data; scores as their metrics give them (accuracy in [0, 1]), sizes in bytes."""
        rows = []
        for row in self.rows:
            entry: dict[str, Any] = {"name": row.name, "kind": row.kind, "scores": row.scores}
            entry["average"] = self.average(row)
            if row.kind == "model":
                drop, task = self.worst_drop(row)
                entry |= {"normalized": self.normalized(row), "worst_drop": drop, "worst_task": task}
            rows.append(entry | {"extra_bytes": row.extra_bytes, "chosen": row.chosen, "held_out": row.held_out})
        return {
            "title": self.title,
            "metrics": {task: self.metrics.get(task, "accuracy") for task in self._tasks},
            "rows": rows,
            "search": self.search,
            "settings": self.settings,
        }

    @property
    def _tasks(self) -> list[str]:
        """All tasks, the held-out ones last."""
        held_out = dict.fromkeys(task for row in self.rows for task in row.held_out)
        return [*self.rows[0].scores, *held_out]

    def write_json(self, path: str | Path) -> None:
        """Write `as_dict` atomically."""
        path = expand(path)
        temporary = path.with_name(f".{path.name}.partial")
        temporary.write_text(json.dumps(self.as_dict(), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        os.replace(temporary, path)

    def tables(self, width: int) -> list[Table]:
        """The report as rich tables, scores in percent, perplexities as they are.

        Args:
            width: characters in a line. If one table of everything is wider, there are tables of some tasks each, and
                one of the averages.

        Returns:
            The tables; each fits, unless one column alone does not.
        """
        tasks: list[_Column] = [
            (self._heading(task), [self._cell(row, task) for row in self.rows]) for task in self._tasks
        ]
        headings = ("average", "normalized", "worst drop", "extra bytes")
        summary: list[_Column] = list(zip(headings, zip(*map(self._summary, self.rows), strict=True), strict=True))
        if _width(whole := self._table(tasks + summary)) <= width:
            return [whole]
        parts: list[list[_Column]] = [[]]
        for column in tasks:
            if parts[-1] and _width(self._table([*parts[-1], column])) > width:
                parts.append([])
            parts[-1].append(column)
        return [self._table(part) for part in [*parts, summary]]

    def _table(self, columns: Sequence[tuple[str, Iterable[str]]]) -> Table:
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
        table.add_column("", no_wrap=True)
        for heading, _ in columns:
            table.add_column(Text(heading), justify="right", no_wrap=True)  # plain: a name may look like markup
        for row, *cells in zip(self.rows, *(cells for _, cells in columns), strict=True):
            table.add_row(Text(row.name), *map(Text, cells), style="dim" if row.kind == "router" else None)
        return table

    def _summary(self, row: Row) -> list[str]:
        """Average, normalized, worst drop, extra bytes."""
        cells = [f"{100 * self.average(row):.1f}", "", ""]
        if row.kind == "model":
            drop, task = self.worst_drop(row)
            cells[1:] = f"{100 * self.normalized(row):.1f}", f"{100 * drop:.1f} {task}" if drop < 0 else "none"
        return [*cells, format_bytes(row.extra_bytes) if row.extra_bytes is not None else ""]

    def _heading(self, task: str) -> str:
        """The task, its metric where that is not accuracy, and whether it was held out."""
        notes = [self.metrics[task]] if self.metrics.get(task, "accuracy") != "accuracy" else []
        notes += ["held out"] if task not in self.rows[0].scores else []
        return f"{task} ({', '.join(notes)})" if notes else task

    def _cell(self, row: Row, task: str) -> str:
        score = {**row.held_out, **row.scores}.get(task)
        if score is None:
            return ""
        is_perplexity = row.kind == "model" and self.metrics.get(task) == "perplexity"
        return f"{score:.3g}" if is_perplexity else f"{100 * score:.1f}"

    def print(self, console: Console) -> None:
        """Print title and tables, as wide as the terminal, or 100 where there is none; nothing is cut off."""
        own = console.width
        console.print(Text(self.title, style="bold"), soft_wrap=True)
        tables = self.tables(own if console.is_terminal else max(own, _WIDTH))
        try:
            for table in tables:
                console.width = max(own, _width(table))
                console.print(table)
        finally:
            console.width = own

    def plot(self, path: str | Path) -> None:
        """Draw all models on all tasks, and write them as an image: as bars, or as a grid for many tasks."""
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        models = [row for row in self.rows if row.kind == "model"]
        groups = [*self.rows[0].scores, "average"]
        values = [[100 * value for value in [*self._comparable(row).values(), self.average(row)]] for row in models]
        label = "score (%)" if set(self.metrics.values()) - {"accuracy"} else "accuracy (%)"
        grid = len(groups) - 1 > _MOST_BARS
        size = (3.5 + 0.62 * len(groups), 2.2 + 0.34 * len(models)) if grid else (max(8.0, 1.9 * len(groups)), 4.5)
        figure = Figure(figsize=size, layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots()
        axes.set_title(self.title, loc="left")
        if grid:
            reference = values[[row.name for row in models].index(self.reference)]
            _draw_grid(axes, values, [row.name for row in models], groups, reference)
        else:
            _draw_bars(axes, values, [row.name for row in models], groups)
            axes.set_ylabel(label)
            figure.legend(loc="outside lower center", ncols=min(5, len(models), int(size[0] / 2.4)), frameon=False)
        figure.savefig(path, dpi=150)


def _draw_bars(axes: Any, values: list[list[float]], names: list[str], groups: list[str]) -> None:
    """A group of bars for each task, and one for the average."""
    width = 0.84 / len(values)
    for index, (heights, name) in enumerate(zip(values, names, strict=True)):
        positions = [group + (index - (len(values) - 1) / 2) * width for group in range(len(groups))]
        axes.bar(positions, heights, width, label=name, color=_colour(index, len(values)))
    axes.set_xticks(range(len(groups)), groups)
    axes.set_ylim(0, 100)
    axes.set_axisbelow(True)
    axes.grid(axis="y", alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.axvline(len(groups) - 1.5, color="0.8", linewidth=1)  # sets the average apart from the tasks


def _draw_grid(
    axes: Any, values: list[list[float]], names: list[str], groups: list[str], reference: list[float]
) -> None:
    """A line for each model, a column for each task: the scores, coloured by their distance to the reference's."""
    distances = [[value - best for value, best in zip(row, reference, strict=True)] for row in values]
    largest = max(1.0, *(abs(value) for row in distances for value in row))
    image = axes.imshow(distances, cmap="RdBu", vmin=-largest, vmax=largest, aspect="auto")
    for line, row in enumerate(values):
        for column, value in enumerate(row):
            dark = abs(distances[line][column]) > 0.6 * largest
            axes.text(column, line, f"{value:.1f}", ha="center", va="center", size=8, color="w" if dark else "k")
    axes.set_xticks(range(len(groups)), groups, rotation=45, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(len(names)), names)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.axvline(len(groups) - 1.5, color="w", linewidth=3)  # sets the average apart from the tasks
    axes.figure.colorbar(image, label="points above or below individual", fraction=0.03, pad=0.01)


def _width(table: Table) -> int:
    """Characters that a table takes when nothing is cut off."""
    console = Console(width=10_000)
    return Measurement.get(console, console.options, table).maximum


def _colour(index: int, count: int) -> tuple[float, float, float, float]:
    from matplotlib import colormaps

    return colormaps["viridis"](0.95 * index / max(1, count - 1))


def format_bytes(count: int) -> str:
    """1234567 → '1.2 MB' (powers of ten)."""
    size = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if size < 999.5:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"


def comparable(score: float, metric: str) -> float:
    """A score in which more is better: of perplexity its inverse, the mean probability that a token is given."""
    return 1 / score if metric == "perplexity" else score


def mean_score(scores: Mapping[str, float], metrics: Mapping[str, str] | None = None) -> float:
    """Mean over tasks: what the searches on validation data maximise.

    Args:
        scores: task → value of its metric.
        metrics: task → name of its metric, where that is not accuracy.
    """
    metrics = metrics or {}
    return sum(comparable(score, metrics.get(task, "accuracy")) for task, score in scores.items()) / len(scores)
