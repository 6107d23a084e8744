"""Scenarios of the merging papers on the fine-tuned models of finished runs, such as one run per seed.

    python tools/scenarios.py methods runs/text_zero_shot/seed0 runs/text_zero_shot/seed1 --markdown
    python tools/scenarios.py tasks runs/text_zero_shot/seed0 --picture tasks.png

- `methods`: every method of the runs' `merge.methods` on all tasks. Picture: validation accuracy against λ.
- `tasks`: the same methods on 2, 3, … of the tasks. Picture: normalized accuracy against the number of tasks.
- `fr`, `pcb`: FR- and PCB-Merging with other filters and coefficients, ratios and scores.

λ is chosen on validation data, by one search for all methods (`benchmarks/searched.py`). Results are kept in each run's
`scenarios.json`, so that an interrupted scenario resumes.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.finished import be_quiet
from benchmarks.searched import Bench, Case
from benchmarks.tables import Results

from freemerge.evaluation import Report, Row
from freemerge.merging import FRMerging, Gaussian, HighPass, MergeMethod, NyquistDisc, PCBMerging, has_scale

FR: Mapping[str, MergeMethod] = {
    "disc 0.7, align (default)": FRMerging(),
    "no filter, align": FRMerging(HighPass(0.0)),
    "disc 0.7, uniform": FRMerging(coefficients="uniform"),
    "high-pass 0.02, align": FRMerging(HighPass(0.02)),
    "high-pass 0.05, align": FRMerging(HighPass(0.05)),
    "high-pass 0.1, align": FRMerging(HighPass(0.1)),
    "high-pass 0.2, align": FRMerging(HighPass(0.2)),
    "high-pass 0.1, mean (paper)": FRMerging(HighPass(0.1), coefficients="mean"),
    "Gaussian 0.1, align": FRMerging(Gaussian(0.1)),
}
PCB: Mapping[str, MergeMethod] = {
    "ratio 0.1, sum (default)": PCBMerging(),
    "ratio 0.05": PCBMerging(ratio=0.05),
    "ratio 0.2": PCBMerging(ratio=0.2),
    "ratio 0.5": PCBMerging(ratio=0.5),
    "ratio 1, nothing dropped": PCBMerging(ratio=1.0),
    "inter normalized": PCBMerging(inter="normalized"),
    "inter pairwise": PCBMerging(inter="pairwise"),
    "ranked per tensor": PCBMerging(scope="tensor"),
    "after FR's filter": PCBMerging(filter=NyquistDisc()),
}


class Scenario:
    """Cases measured on several runs, which differ in their seed.

    Args:
        benches: the runs; they have the same tasks.
        methods: line → method.
    """

    def __init__(self, benches: Sequence[Bench], methods: Mapping[str, MergeMethod]) -> None:
        self.benches = benches
        self.methods = methods
        self.tasks: tuple[str, ...] = benches[0].run.suite.names

    def results(self, line: str, tasks: Sequence[str]) -> list[dict[str, Any]]:
        """A line's result on each run."""
        return [bench.measured(Case(line, self.methods[line], tuple(tasks))) for bench in self.benches]

    def reports(self) -> list[Report]:
        """A report of each run, with the bounds and all lines on all tasks."""
        made = []
        for bench in self.benches:
            bounds = bench.bounds()
            rows = [Row("base", bounds["base"]), Row("individual", bounds["individual"])]
            rows += [
                Row(line, bench.measured(Case(line, method, self.tasks))["test"])
                for line, method in self.methods.items()
            ]
            made.append(Report("", rows, metrics=bench.run.measure.metrics))
        return made

    def table(self) -> Results:
        """λ and scores of every line on all tasks, averaged over the runs, and the CPU seconds of the merge."""
        columns = ("", "λ", *self.tasks, "average", "normalized", "worst drop", "CPU s")
        title = f"{len(self.tasks)} tasks, test accuracy (%), mean over {len(self.benches)} runs"
        table = Results(title, columns)
        reports = self.reports()
        for row in reports[0].rows:
            rows = [report.row(row.name) for report in reports]
            scores = {task: mean(each.scores[task] for each in rows) for task in self.tasks}
            averages = [report.average(each) for report, each in zip(reports, rows, strict=True)]
            normalized = [report.normalized(each) for report, each in zip(reports, rows, strict=True)]
            drops = {
                task: mean(
                    each.scores[task] - report.row("individual").scores[task]
                    for report, each in zip(reports, rows, strict=True)
                )
                for task in self.tasks
            }
            worst = min(drops, key=drops.__getitem__)
            results = self.results(row.name, self.tasks) if row.name in self.methods else []
            table.add(
                row.name,
                " / ".join(f"{each['scale']:g}" for each in results if each["scale"] is not None),
                *(f"{100 * score:.1f}" for score in scores.values()),
                percent(averages),
                percent(normalized),
                f"{100 * drops[worst]:.1f} {worst}" if drops[worst] < 0 else "none",
                f"{mean(each['seconds'] for each in results):.1f}" if results else "",
            )
        table.notes.append("λ of each run; ± is the standard deviation over the runs.")
        return table

    def subsets(self, size: int) -> list[tuple[str, ...]]:
        """Two sets of consecutive tasks, which begin with the first and with the middle one; one set of all tasks."""
        count, doubled = len(self.tasks), self.tasks * 2
        return [tuple(doubled[start : start + size]) for start in ([0] if size == count else [0, count // 2])]

    def normalized(self, line: str, tasks: Sequence[str]) -> list[float]:
        """The normalized accuracy of a line's merge of some of the tasks, on each run."""
        individual = [bench.bounds()["individual"] for bench in self.benches]
        return [
            mean(result["test"][task] / best[task] for task in tasks)
            for result, best in zip(self.results(line, tasks), individual, strict=True)
        ]

    def by_number(self) -> dict[str, dict[int, float]]:
        """Line → number of tasks → normalized accuracy, the mean over subsets and runs; `base` is among the lines."""
        sizes = range(2, len(self.tasks) + 1)
        bounds = [bench.bounds() for bench in self.benches]
        found = {
            "base": {
                size: mean(
                    each["base"][task] / each["individual"][task]
                    for each in bounds
                    for tasks in self.subsets(size)
                    for task in tasks
                )
                for size in sizes
            }
        }
        for line in self.methods:
            found[line] = {
                size: mean(value for tasks in self.subsets(size) for value in self.normalized(line, tasks))
                for size in sizes
            }
        return found


def mean(values: Any) -> float:
    """The mean of some numbers."""
    return statistics.fmean(values)


def percent(values: Sequence[float]) -> str:
    """Mean and standard deviation in percent."""
    spread = f" ± {100 * statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{100 * mean(values):.1f}{spread}"


def show_methods(scenario: Scenario, markdown: bool, picture: Path | None) -> None:
    """Print the table of all lines; draw validation accuracy against λ."""
    scenario.table().show(markdown)
    if picture is None:
        return
    curves = {}
    for line, method in scenario.methods.items():
        searches = [result["search"] for result in scenario.results(line, scenario.tasks)]
        common = set.intersection(*(set(search) for search in searches))  # the scales that were tried in every run
        if has_scale(method):
            curves[line] = {float(key): 100 * mean(search[key] for search in searches) for key in common}
    draw(picture, curves, "scale λ", "validation accuracy (%)", log=True)


def show_tasks(scenario: Scenario, markdown: bool, picture: Path | None) -> None:
    """Print and draw normalized accuracy against the number of tasks."""
    found = scenario.by_number()
    sizes = list(found["base"])
    table = Results(
        f"normalized test accuracy (%) of merges of n tasks, {len(scenario.benches)} runs", ["", *map(str, sizes)]
    )
    for line, values in found.items():
        table.add(line, *(f"{100 * value:.1f}" for value in values.values()))
    table.show(markdown)
    if picture is not None:
        curves = {line: {size: 100 * value for size, value in values.items()} for line, values in found.items()}
        draw(picture, curves, "number of tasks", "normalized accuracy (%)")


def draw(path: Path, curves: Mapping[str, Mapping[float, float]], x: str, y: str, log: bool = False) -> None:
    """Draw curves: line → x → y."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for number, (line, points) in enumerate(curves.items()):
        at = sorted(points)
        marker = "osD^vP*Xhd<>"[number % 12]  # colours repeat after ten lines, and not everybody can tell them apart
        axes.plot(at, [points[value] for value in at], marker=marker, markersize=4, label=line)
    if log:
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right center", frameon=False)
    figure.savefig(path, dpi=120)


SCENARIOS: Mapping[str, tuple[Mapping[str, MergeMethod] | None, Callable[..., None]]] = {
    "methods": (None, show_methods),
    "tasks": (None, show_tasks),
    "fr": (FR, show_methods),
    "pcb": (PCB, show_methods),
}


def main() -> None:
    """Measure what is missing, print the table, draw the picture."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("scenario", choices=list(SCENARIOS))
    parser.add_argument("runs", type=Path, nargs="+", help="folders of runs with fine-tuned models of the same tasks")
    parser.add_argument("--lines", nargs="+", help="only these lines of the table")
    parser.add_argument("--picture", type=Path, help="draw to this file")
    parser.add_argument("--markdown", action="store_true", help="print Markdown")
    arguments = parser.parse_args()
    be_quiet()
    benches = [Bench(folder) for folder in arguments.runs]
    methods, show = SCENARIOS[arguments.scenario]
    methods = methods or benches[0].run.settings.merge.lines
    if unknown := set(arguments.lines or ()) - set(methods):
        parser.error(f"there is no line {min(unknown)!r}; lines: {', '.join(methods)}")
    chosen = {line: methods[line] for line in arguments.lines or methods}
    show(Scenario(benches, chosen), arguments.markdown, arguments.picture)


if __name__ == "__main__":
    main()
