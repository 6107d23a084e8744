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
        scores: task name → accuracy in [0, 1].
        extra_bytes: bytes on disk beyond one backbone and the heads, which every model needs; None where the notion
            does not apply.
        chosen: hyperparameters chosen on validation data, with the validation score that chose them.
        kind: `model` for lines to be compared with the individual models, `router` for routing accuracy.
    """

    name: str
    scores: dict[str, float]
    extra_bytes: int | None = None
    chosen: dict[str, Any] = field(default_factory=dict)
    kind: str = "model"

    @property
    def average(self) -> float:
        """Mean accuracy over the tasks."""
        return sum(self.scores.values()) / len(self.scores)


@dataclass(frozen=True)
class Report:
    """All lines, measured on one split.

    Args:
        title: what this is a report of.
        rows: the lines; the one named `reference` holds each task's own fine-tuned model.
        search: method → every candidate that was tried on validation data, with its mean accuracy.
        settings: what else is needed to reproduce the numbers (seed, sizes, versions).
        reference: name of the line that normalized accuracy is relative to.
    """

    title: str
    rows: list[Row]
    search: dict[str, list[dict[str, float]]] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    reference: str = "individual"

    def row(self, name: str) -> Row:
        """The line of that name."""
        return next(row for row in self.rows if row.name == name)

    def normalized(self, row: Row) -> float:
        """Mean over tasks of accuracy ÷ the individual model's accuracy; 0 where the latter is 0."""
        best = self.row(self.reference).scores
        return sum(score / best[task] if best[task] else 0.0 for task, score in row.scores.items()) / len(row.scores)

    def worst_drop(self, row: Row) -> tuple[float, str]:
        """The largest loss of accuracy against the individual model (negative for a loss), and the task it is on."""
        best = self.row(self.reference).scores
        return min((score - best[task], task) for task, score in row.scores.items())

    def as_dict(self) -> dict[str, Any]:
        """The report as plain data; accuracies in [0, 1], sizes in bytes."""
        rows = []
        for row in self.rows:
            entry: dict[str, Any] = {"name": row.name, "kind": row.kind, "scores": row.scores, "average": row.average}
            if row.kind == "model":
                drop, task = self.worst_drop(row)
                entry |= {"normalized": self.normalized(row), "worst_drop": drop, "worst_task": task}
            rows.append(entry | {"extra_bytes": row.extra_bytes, "chosen": row.chosen})
        return {"title": self.title, "rows": rows, "search": self.search, "settings": self.settings}

    def write_json(self, path: str | Path) -> None:
        """Write `as_dict` atomically."""
        path = Path(path)
        temporary = path.with_name(f".{path.name}.partial")
        temporary.write_text(json.dumps(self.as_dict(), indent=2, ensure_ascii=False) + "\n")
        os.replace(temporary, path)

    def table(self) -> Table:
        """The report as a rich table; accuracies in percent."""
        tasks = list(self.rows[0].scores)
        table = Table(title=self.title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
        table.add_column("", no_wrap=True)
        for heading in [*tasks, "average", "normalized", "worst drop", "extra bytes"]:
            table.add_column(heading, justify="right", no_wrap=True)
        for row in self.rows:
            cells = [f"{100 * row.scores[task]:.1f}" for task in tasks] + [f"{100 * row.average:.1f}"]
            if row.kind == "model":
                drop, task = self.worst_drop(row)
                cells += [f"{100 * self.normalized(row):.1f}", f"{100 * drop:.1f} {task}" if drop < 0 else "none"]
            else:
                cells += ["", ""]
            cells.append(format_bytes(row.extra_bytes) if row.extra_bytes is not None else "")
            table.add_row(row.name, *cells, style="dim" if row.kind == "router" else None)
        return table

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
            heights = [100 * value for value in [*row.scores.values(), row.average]]
            positions = [group + (i - (len(models) - 1) / 2) * width for group in range(len(groups))]
            axes.bar(positions, heights, width, label=row.name, color=_colour(i, len(models)))
        axes.set_xticks(range(len(groups)), groups)
        axes.set_ylabel("accuracy (%)")
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


def mean_score(scores: Mapping[str, float]) -> float:
    """Mean over tasks: what the searches on validation data maximise."""
    return sum(scores.values()) / len(scores)
