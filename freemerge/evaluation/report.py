"""The report: every model on every task, as a table on the terminal, as JSON, and as a chart.

Table and chart are drawn by rich and matplotlib; only the split of wide tables into several is ours.
"""

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

_Column = tuple[str, Iterable[str]]  # heading and cells

_WIDTH = 100  # characters per line if the output is not a terminal
_MAX_BAR_TASKS = 8  # with more tasks, the bars would be too thin


@dataclass(frozen=True)
class Row:
    """One row of the report.

    Args:
        name: the name of the evaluated model.
        scores: task name → value of the task's metric, such as accuracy in [0, 1].
        extra_bytes: bytes on disk in addition to one backbone and the heads, which every model needs; None if this does
            not apply.
        chosen: hyperparameters chosen on validation data, and their validation score.
        kind: `model` for rows that are compared with the individual models, `router` for routing accuracy.
        held_out: scores of tasks that were not merged; averages do not include them.
    """

    name: str
    scores: dict[str, float]
    extra_bytes: int | None = None
    chosen: dict[str, Any] = field(default_factory=dict)
    kind: str = "model"
    held_out: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Report:
    """The results of all models on one split.

    Args:
        title: the heading.
        rows: the results; the row named `reference` has each task's own fine-tuned model.
        search: method → all candidates that were tried on validation data, with their mean scores.
        settings: everything else that is needed to reproduce the numbers (seed, sizes, versions).
        reference: name of the row that normalized scores are relative to.
        metrics: task → name of its metric, for tasks whose metric is not accuracy.
    """

    title: str
    rows: list[Row]
    search: dict[str, list[dict[str, float]]] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    reference: str = "individual"
    metrics: dict[str, str] = field(default_factory=dict)

    def row(self, name: str) -> Row:
        """Find a row by name.

        Args:
            name: the row's name.

        Returns:
            The row.

        Raises:
            StopIteration: if there is no such row.
        """
        return next(row for row in self.rows if row.name == name)

    def average(self, row: Row) -> float:
        """The mean score of a row; perplexities enter as their inverse, so that higher is better.

        Args:
            row: a row of this report.

        Returns:
            The mean over the merged tasks.
        """
        return mean_score(row.scores, self.metrics if row.kind == "model" else {})

    def normalized(self, row: Row) -> float:
        """The normalized score of a row: the mean over tasks of score / individual score.

        Args:
            row: a row of kind `model`.

        Returns:
            The mean; a task whose individual score is 0 contributes 0.
        """
        scores, best = self._comparable(row), self._comparable(self.row(self.reference))
        return sum(score / best[task] if best[task] else 0.0 for task, score in scores.items()) / len(scores)

    def worst_drop(self, row: Row) -> tuple[float, str]:
        """The largest drop of a row below the individual models.

        Args:
            row: a row of kind `model`.

        Returns:
            The difference of the scores, negative for a drop, and its task.
        """
        best = self._comparable(self.row(self.reference))
        return min((score - best[task], task) for task, score in self._comparable(row).items())

    def _comparable(self, row: Row) -> dict[str, float]:
        return {task: comparable(score, self.metrics.get(task, "accuracy")) for task, score in row.scores.items()}

    def as_dict(self) -> dict[str, Any]:
        """The report as plain data.

        Returns:
            JSON-compatible values: scores as the metrics define them (accuracy in [0, 1]), sizes in bytes.
        """
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
        """Write `as_dict` to a JSON file, atomically.

        Args:
            path: the file.
        """
        path = expand(path)
        temporary = path.with_name(f".{path.name}.partial")
        temporary.write_text(json.dumps(self.as_dict(), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        os.replace(temporary, path)

    def tables(self, width: int) -> list[Table]:
        """The report as rich tables, with scores in percent and unchanged perplexities.

        Args:
            width: characters per line. If a single table would be wider, the tasks are divided among several tables,
                and the averages are in the last.

        Returns:
            The tables; each fits into the width, unless a single column does not.
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
            table.add_column(Text(heading), justify="right", no_wrap=True)  # Text, because a name may look like markup
        for row, *cells in zip(self.rows, *(cells for _, cells in columns), strict=True):
            table.add_row(Text(row.name), *map(Text, cells), style="dim" if row.kind == "router" else None)
        return table

    def _summary(self, row: Row) -> list[str]:
        """The cells of average, normalized score, worst drop and extra bytes."""
        cells = [f"{100 * self.average(row):.1f}", "", ""]
        if row.kind == "model":
            drop, task = self.worst_drop(row)
            cells[1:] = f"{100 * self.normalized(row):.1f}", f"{100 * drop:.1f} {task}" if drop < 0 else "none"
        return [*cells, format_bytes(row.extra_bytes) if row.extra_bytes is not None else ""]

    def _heading(self, task: str) -> str:
        """The task, with its metric if that is not accuracy, and whether it was held out."""
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
        """Print title and tables in the terminal's width, or in 100 characters without a terminal; nothing is cut off.

        Args:
            console: the console; its width is restored.
        """
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
        """Draw a chart of all models on all tasks: bars, or a heat map for more than 8 tasks.

        Args:
            path: the image file to write.
        """
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        models = [row for row in self.rows if row.kind == "model"]
        groups = [*self.rows[0].scores, "average"]
        values = [[100 * value for value in [*self._comparable(row).values(), self.average(row)]] for row in models]
        label = "score (%)" if set(self.metrics.values()) - {"accuracy"} else "accuracy (%)"
        grid = len(groups) - 1 > _MAX_BAR_TASKS
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
    """Draw a group of bars for each task, and one for the average."""
    width = 0.84 / len(values)
    for index, (heights, name) in enumerate(zip(values, names, strict=True)):
        positions = [group + (index - (len(values) - 1) / 2) * width for group in range(len(groups))]
        axes.bar(positions, heights, width, label=name, color=_colour(index, len(values)))
    axes.set_xticks(range(len(groups)), groups)
    axes.set_ylim(0, 100)
    axes.set_axisbelow(True)
    axes.grid(axis="y", alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.axvline(len(groups) - 1.5, color="0.8", linewidth=1)  # separates the average from the tasks


def _draw_grid(
    axes: Any, values: list[list[float]], names: list[str], groups: list[str], reference: list[float]
) -> None:
    """Draw a row for each model and a column for each task, coloured by the difference to the reference."""
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
    axes.axvline(len(groups) - 1.5, color="w", linewidth=3)  # separates the average from the tasks
    axes.figure.colorbar(image, label="points above or below individual", fraction=0.03, pad=0.01)


def _width(table: Table) -> int:
    """The width in characters of a table of which nothing is cut off."""
    console = Console(width=10_000)
    return Measurement.get(console, console.options, table).maximum


def _colour(index: int, count: int) -> tuple[float, float, float, float]:
    from matplotlib import colormaps

    return colormaps["viridis"](0.95 * index / max(1, count - 1))


def format_bytes(count: int) -> str:
    """Write a size with a unit, in powers of ten.

    Args:
        count: bytes.

    Returns:
        For instance `1.2 MB`.
    """
    size = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if size < 999.5:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"


def comparable(score: float, metric: str) -> float:
    """Convert a metric's value to a score in which higher is better.

    Args:
        score: the value.
        metric: the metric's name.

    Returns:
        For perplexity its inverse, the geometric mean of the tokens' probabilities; else the value itself.
    """
    return 1 / score if metric == "perplexity" else score


def mean_score(scores: Mapping[str, float], metrics: Mapping[str, str] | None = None) -> float:
    """The mean score over tasks, which searches on validation data maximise.

    Args:
        scores: task → value of its metric.
        metrics: task → name of its metric, for tasks whose metric is not accuracy.

    Returns:
        The mean of the `comparable` scores.
    """
    metrics = metrics or {}
    return sum(comparable(score, metrics.get(task, "accuracy")) for task, score in scores.items()) / len(scores)
