"""Scenarios of the merging papers on the fine-tuned models of finished runs, such as one run per seed.

    python tools/scenarios.py methods runs/text_zero_shot/seed0 runs/text_zero_shot/seed1 --cost
    python tools/scenarios.py tasks runs/text_zero_shot/seed0 --picture tasks.png

- `methods`: every method of the runs' `merge.methods` on all tasks. Picture: validation accuracy against λ.
- `tasks`: the same methods on 2, 3, … of the tasks. Picture: normalized accuracy against the number of tasks.
- `fr`, `pcb`: FR- and PCB-Merging with other filters and coefficients, ratios and scores.
- `others`: further methods that need no data.

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
from benchmarks.tables import Results, mib

from freemerge.evaluation import Report, Row
from freemerge.merging import (
    SCE,
    SVC,
    ACEMerging,
    Breadcrumbs,
    Consensus,
    Dare,
    Della,
    EMRMerging,
    FRMerging,
    Gaussian,
    HighPass,
    KarcherMean,
    MergeMethod,
    ModelStock,
    NyquistDisc,
    PCBMerging,
    TaskArithmetic,
    Ties,
    TSVMerge,
    get_field,
    has_scale,
)

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

OTHERS: Mapping[str, MergeMethod] = {
    "Breadcrumbs": Breadcrumbs(),
    "DARE, task arithmetic": Dare(TaskArithmetic()),
    "DARE, TIES": Dare(Ties()),
    "DELLA": Della(),
    "Consensus, task arithmetic": Consensus(),
    "Consensus, TIES": Consensus(Ties()),
    "SCE": SCE(),
    "SVC, task arithmetic": SVC(TaskArithmetic()),
    "SVC, TSV-M": SVC(TSVMerge()),
    "Karcher mean": KarcherMean(),
    "Model Stock": ModelStock(),
    "EMR, the shared model": EMRMerging(),
    "TSV-M, aligned": TSVMerge(align=True),
    "ACE, aligned": ACEMerging(align=True),
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

    def table(self, cost: bool = False) -> Results:
        """λ and scores of every line on all tasks, averaged over the runs.

        Args:
            cost: whether to add what a merge costs, measured on the first run's models.
        """
        columns = ("", "default λ", "λ", *self.tasks, "by run", "average", "±", "normalized", "worst drop", "CPU s")
        title = f"{len(self.tasks)} tasks, test accuracy (%), mean over {len(self.benches)} runs"
        table = Results(title, columns + (("process s", "peak MiB") if cost else ()))
        reports = self.reports()
        for row in reports[0].rows:
            rows = [report.row(row.name) for report in reports]
            averages = [report.average(each) for report, each in zip(reports, rows, strict=True)]
            normalized = [report.normalized(each) for report, each in zip(reports, rows, strict=True)]
            drops = {task: self._drop(reports, row.name, task) for task in self.tasks}
            worst = min(drops, key=drops.__getitem__)
            cells = [
                *self._scales(row.name),
                *(f"{100 * mean(each.scores[task] for each in rows):.1f}" for task in self.tasks),
                " / ".join(f"{100 * average:.1f}" for average in averages),
                f"{100 * mean(averages):.1f}",
                f"{100 * statistics.stdev(averages):.1f}" if len(averages) > 1 else "",
                f"{100 * mean(normalized):.1f}",
                f"{100 * drops[worst]:.1f} {worst}" if drops[worst] < 0 else "none",
                self._seconds(row.name),
            ]
            table.add(row.name, *cells, *(self._cost(row.name) if cost else ()))
        table.notes.append("λ of each run; ±: standard deviation over the runs; CPU s: of the merge in memory.")
        if cost:
            table.notes.append("Process s, peak MiB: CPU time and memory of a process that merges files, one thread.")
        return table

    def _scales(self, line: str) -> tuple[str, str]:
        """The cells of the default λ, and of those chosen on each run."""
        if line not in self.methods or not has_scale(self.methods[line]):
            return "", ""
        chosen = " / ".join(f"{result['scale']:g}" for result in self.results(line, self.tasks))
        return f"{get_field(self.methods[line], 'scale'):g}", chosen

    def _seconds(self, line: str) -> str:
        """The cell of the CPU seconds of a merge, the mean over the runs."""
        found = [result["seconds"] for result in self.results(line, self.tasks)] if line in self.methods else []
        return f"{mean(found):.1f}" if found else ""

    def _cost(self, line: str) -> tuple[str, str]:
        """The cells of CPU seconds and peak memory."""
        if line not in self.methods:
            return "", ""
        cost = self.benches[0].cost(self.methods[line])
        return f"{cost['cpu']:.1f}", mib(cost["peak"])

    @staticmethod
    def _drop(reports: Sequence[Report], line: str, task: str) -> float:
        """How far a line is above the individual model of a task, on average; negative for a drop."""
        return mean(each.row(line).scores[task] - each.row("individual").scores[task] for each in reports)

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


def show_methods(scenario: Scenario, markdown: bool, picture: Path | None, cost: bool) -> None:
    """Print the table of all lines; draw validation accuracy against λ."""
    scenario.table(cost).show(markdown)
    if picture is None:
        return
    curves: dict[str, dict[float, float]] = {}
    for line, method in scenario.methods.items():
        searches = [result["search"] for result in scenario.results(line, scenario.tasks)]
        common = set.intersection(*(set(search) for search in searches))  # the scales that were tried in every run
        if has_scale(method):
            curves[line] = {float(key): 100 * mean(search[key] for search in searches) for key in common}
    draw(picture, curves, "scale λ", "validation accuracy (%)", log=True)


def show_tasks(scenario: Scenario, markdown: bool, picture: Path | None, cost: bool) -> None:
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
    "others": (OTHERS, show_methods),
}


def main() -> None:
    """Measure what is missing, print the table, draw the picture."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("scenario", choices=list(SCENARIOS))
    parser.add_argument("runs", type=Path, nargs="+", help="folders of runs with fine-tuned models of the same tasks")
    parser.add_argument("--lines", nargs="+", help="only these lines of the table")
    parser.add_argument("--picture", type=Path, help="draw to this file")
    parser.add_argument("--cost", action="store_true", help="measure each merge as a process of its own, too")
    parser.add_argument("--markdown", action="store_true", help="print Markdown")
    arguments = parser.parse_args()
    be_quiet()
    benches = [Bench(folder) for folder in arguments.runs]
    methods, show = SCENARIOS[arguments.scenario]
    methods = methods or benches[0].run.settings.merge.lines
    if unknown := set(arguments.lines or ()) - set(methods):
        parser.error(f"there is no line {min(unknown)!r}; lines: {', '.join(methods)}")
    chosen = {line: methods[line] for line in arguments.lines or methods}
    show(Scenario(benches, chosen), arguments.markdown, arguments.picture, arguments.cost)


if __name__ == "__main__":
    main()
