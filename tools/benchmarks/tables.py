"""Tables of results: for the terminal, or in Markdown for docs/benchmarks."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

YES, NO = "yes", "no"


@dataclass
class Results:
    """A titled table whose first column is text and whose others are numbers, already formatted."""

    title: str
    columns: Sequence[str]
    rows: list[list[str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def add(self, *cells: str) -> None:
        """Append a row."""
        if len(cells) != len(self.columns):
            raise ValueError(f"a row of {len(cells)} cells for {len(self.columns)} columns")
        self.rows.append(list(cells))

    def show(self, markdown: bool = False) -> None:
        """Print the table and its notes."""
        if markdown:
            print(self.markdown())
            return
        from rich.console import Console
        from rich.table import Table

        table = Table(header_style="")
        for index, column in enumerate(self.columns):
            table.add_column(column, justify="right" if index else "left", no_wrap=not index)
        styles = {YES: "green", NO: "bold red"}
        for row in self.rows:
            table.add_row(*(f"[{styles[cell]}]{cell}[/]" if cell in styles else cell for cell in row))
        width = 2 + sum(3 + max(len(row[i]) for row in [self.columns, *self.rows]) for i in range(len(self.columns)))
        console = Console(width=max(width, len(self.title) + 2), highlight=False)
        console.print(self.title, style="bold")
        console.print(table)
        for note in self.notes:
            console.print(note, style="dim", soft_wrap=True)
        console.print()

    def markdown(self) -> str:
        """The table as Markdown."""
        rule = ["---", *["---:"] * (len(self.columns) - 1)]
        lines = [f"**{self.title}**", ""]
        lines += ["| " + " | ".join(cells) + " |" for cells in (self.columns, rule, *self.rows)]
        for note in self.notes:
            lines += ["", note]
        return "\n".join(lines) + "\n"


def met(value: float, limit: float | None, *, at_least: bool = False) -> tuple[str, str]:
    """The cells for a limit: the limit, and whether a value keeps it."""
    if limit is None:
        return "", ""
    kept = value >= limit if at_least else value <= limit
    return f"{'≥' if at_least else '≤'} {limit:g}", YES if kept else NO


def mib(size: float) -> str:
    """Bytes as MiB."""
    return f"{size / 2**20:,.0f}"


def machine(cores: int) -> str:
    """One line that describes the machine."""
    name = next(
        (
            line.partition(":")[2].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        platform.machine(),
    )
    return f"{cores} {'core' if cores == 1 else 'cores'} of {name}"
