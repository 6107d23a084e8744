"""The report: every model on every task, as a table on the terminal, as JSON, and as a picture."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table


@dataclass(frozen=True)
class Row:
    """One line of the report.

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
    """All lines, measured on one split.

    Args:
        title: what this is a report of.
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
        path = Path(path)
        temporary = path.with_name(f".{path.name}.partial")
        temporary.write_text(json.dumps(self.as_dict(), indent=2, ensure_ascii=False) + "\n")
        os.replace(temporary, path)

    def table(self) -> Table:
        """The report as a rich table; scores in percent, perplexities as they are."""
        table = Table(title=self.title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
        table.add_column("", no_wrap=True)
        for heading in [*map(self._heading, self._tasks), "average", "normalized", "worst drop", "extra bytes"]:
            table.add_column(heading, justify="right", no_wrap=True)
        for row in self.rows:
            cells = [self._cell(row, task) for task in self._tasks] + [f"{100 * self.average(row):.1f}"]
            if row.kind == "model":
                drop, task = self.worst_drop(row)
                cells += [f"{100 * self.normalized(row):.1f}", f"{100 * drop:.1f} {task}" if drop < 0 else "none"]
            else:
                cells += ["", ""]
            cells.append(format_bytes(row.extra_bytes) if row.extra_bytes is not None else "")
            table.add_row(row.name, *cells, style="dim" if row.kind == "router" else None)
        return table

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
        """Print the table at its full width: a narrow terminal wraps its lines, but no number is cut off."""
        table, narrow = self.table(), console.width
        needed = Measurement.get(console, console.options.update(max_width=10_000), table).maximum
        try:
            console.width = max(narrow, needed)
            console.print(table)
        finally:
            console.width = narrow

    def plot(self, path: str | Path) -> None:
        """Draw grouped bars, a group for each task and one for the average, and write them as an image."""
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        models = [row for row in self.rows if row.kind == "model"]
        groups = [*self.rows[0].scores, "average"]
        figure = Figure(figsize=(max(8.0, 1.9 * len(groups)), 4.5), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots()
        width = 0.84 / len(models)
        for i, row in enumerate(models):
            heights = [100 * value for value in [*self._comparable(row).values(), self.average(row)]]
            positions = [group + (i - (len(models) - 1) / 2) * width for group in range(len(groups))]
            axes.bar(positions, heights, width, label=row.name, color=_colour(i, len(models)))
        axes.set_xticks(range(len(groups)), groups)
        axes.set_ylabel("score (%)" if set(self.metrics.values()) - {"accuracy"} else "accuracy (%)")
        axes.set_ylim(0, 100)
        axes.set_axisbelow(True)
        axes.grid(axis="y", alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        axes.axvline(len(groups) - 1.5, color="0.8", linewidth=1)  # sets the average apart from the tasks
        axes.set_title(self.title, loc="left")
        figure.legend(loc="outside lower center", ncols=min(5, len(models)), frameon=False)
        figure.savefig(path, dpi=150)


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
