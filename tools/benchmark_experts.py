"""Accuracy against bytes on disk: experts of every kind and size, and their rivals, on the models of finished runs.

    python -m freemerge fit --config configs/vision8.yaml --data.folder DATA --model.backbone.weights WEIGHTS \\
        --seed_everything 0 --run.folder runs/vision8/0                      # likewise for further seeds
    python tools/benchmark_experts.py runs/vision8/0 runs/vision8/1 runs/vision8/2

Works with any suite: a run's folder contains its configuration, and its report has the individual models, the merges
and our experts of the configured size. This script adds, on the same checkpoints, rivals and other sizes: EMR-Merging,
Twin-Merging, FREE experts as released, and ours, extracted and trained. Scales are chosen on validation data; every row
is then measured once on test data, and its bytes are those of the files.

Each row is stored in the run's `experts.json` once measured, and skipped the next time, so that an interrupted
benchmark resumes. The table and the figure, `experts.png` in the first run's parent folder, show means over the runs.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
from benchmarks.finished import ONLY_FIT, FinishedRun, be_quiet
from benchmarks.tables import Results
from torch import Tensor

from freemerge.checkpoints import load_checkpoint
from freemerge.evaluation import mean_score
from freemerge.experts import STATISTICS, Expert, emr_experts, extract, extract_low_rank, load_expert, save_expert
from freemerge.merging import task_vector
from freemerge.models import FreeModel
from freemerge.pipeline import ExpertsSettings
from freemerge.tensors import select
from freemerge.training import ExpertTrainer

SCALES = (0.5, 0.7, 1.0, 1.4)  # of extracted experts; the released rescaling and the rivals have no scale to choose
WIDE = 4.0  # density of the first epoch's expert, in multiples of the final density, if the support is selected again
Experts = dict[str, Expert]
Row = dict[str, Any]  # scores: task → score; bytes: of each task's file; shared_bytes: of what all tasks share


class Benchmark:
    """One run's checkpoints and their measurements."""

    def __init__(self, folder: Path) -> None:
        self.run = FinishedRun(folder).suite_run
        self.files, self.measure = self.run.files, self.run.measure
        self.settings = self.run.settings.experts
        self.base, self.tuned, self.merged = (
            self.files.base_weights(),
            self.files.finetuned_weights(),
            self.files.free_weights(),
        )
        self.path = folder / "experts.json"
        self.rows: dict[str, Row] = json.loads(self.path.read_text()) if self.path.exists() else {}
        self.metrics = self.measure.metrics
        self.size = sum(tensor.nbytes for tensor in self.base.values() if tensor.is_floating_point())

    # -- rows ---------------------------------------------------------------------------------------------------------

    def reported(self) -> None:
        """Take over the rows of the run's own report."""
        report = json.loads((self.run.folder / "report.json").read_text())
        size = f"{self.settings.kind} {self.settings.density:g}"
        names = {
            **dict.fromkeys(("base (zero-shot)", "base (probe)", "base (fine-tuned heads)"), "base"),
            "FREE extracted (oracle)": f"ours extracted, {size}",
            "FREE trained (oracle)": f"ours trained, {size}",
            "FREE trained (routed)": f"ours trained, {size}, routed",
        }
        for row in report["rows"]:
            of_task = row["extra_bytes"] // len(row["scores"]) if "FREE" in row["name"] else 0
            name = names.get(row["name"], row["name"])
            self.rows[name] = {
                "scores": row["scores"],
                "bytes": self.size if name == "individual" else of_task,
                "kind": row["kind"],
            }

    def head_told(self) -> Row:
        """The run's own model with the head given: the router chooses only the expert."""
        name = f"ours trained, {self.settings.kind} {self.settings.density:g}, routed"
        scores = self.measure.free(self.files.free_model(), self.measure.loaders("test"), told="head")
        return self.rows[name] | {"scores": scores}

    def row(self, name: str, make: Callable[[], Row]) -> None:
        """Measure a row unless it is stored already; print it."""
        if name not in self.rows:
            self.rows[name] = make()
            self.path.write_text(json.dumps(self.rows, indent=2) + "\n")
        row = self.rows[name]
        average = mean_score(row["scores"], self.metrics)
        print(f"{self.run.folder}: {name}: {row['bytes']} bytes, {100 * average:.2f}", flush=True)

    def emr(self) -> Row:
        """EMR-Merging: one shared vector, a bit mask and a scale per task."""
        learnt = select(self.base, None, STATISTICS)
        vectors = {
            task: {name: vector[name] for name in learnt if name in vector}
            for task, vector in ((task, task_vector(self.base, weights)) for task, weights in self.tuned.items())
        }
        shared, experts = emr_experts(vectors)
        return self._measured(self.base, experts, sum(tensor.nbytes for tensor in shared.values()))

    def twin(self, rank: int) -> Row:
        """Twin-Merging: each task's residual to the merge, in `rank` directions of each weight."""
        merged = load_checkpoint(self.files.merged_path("task arithmetic"))
        residuals = {task: task_vector(merged, weights) for task, weights in self.tuned.items()}
        return self._measured(merged, {task: extract_low_rank(r, rank=rank) for task, r in residuals.items()})

    def released(self, density: float) -> Row:
        """FREE experts as released: entries of the task vector, selected per row and rescaled, added to FR's merge."""
        merged = load_checkpoint(self.files.merged_path("FR"))
        experts = {
            task: extract(task_vector(self.base, weights), density, scope="row", rescale="released")
            for task, weights in self.tuned.items()
        }
        return self._measured(merged, experts)

    def extracted(self, settings: ExpertsSettings) -> Row:
        """Ours without training, at the scale that is best on validation data."""
        experts = {task: settings.cut(task_vector(self.merged, weights)) for task, weights in self.tuned.items()}
        loaders = self.measure.loaders("val")
        found = {}
        for scale in SCALES:
            scaled = {task: expert.scaled(scale) for task, expert in experts.items()}
            found[scale] = mean_score(self._scores(self.merged, scaled, loaders), self.metrics)
        best = max(found, key=found.get)
        return self._measured(
            self.merged, {task: expert.scaled(best) for task, expert in experts.items()}, settings=settings
        )

    def trained(self, settings: ExpertsSettings, wide: float = 1.0) -> Row:
        """Ours, trained like the run's own experts; stored in the run's folder.

        Args:
            settings: kind, number of values and training.
            wide: an expert so many times as large is trained for an epoch first, and the support selected again from
                what it has become; 1 leaves the residual's.
        """
        experts = {}
        for task, teacher in self.tuned.items():
            kind = f"{settings.kind} {settings.density:g}" + (f", {wide:g} wide" if wide > 1 else "")
            folder = self.run.folder / "benchmark" / kind / task
            path = folder / "expert.safetensors"
            if not path.exists():
                L.seed_everything(self.files.seed, verbose=False)
                residual = task_vector(self.merged, teacher)
                if wide > 1:
                    wider = replace(settings, density=wide * settings.density)
                    residual = self._fitted(wider, task, wider.cut(residual), folder, {"max_epochs": 1}).dense()
                save_expert(path, self._fitted(settings, task, settings.cut(residual), folder), settings.values)
            experts[task] = load_expert(path)
        return self._measured(self.merged, experts, settings=settings)

    def _fitted(
        self,
        settings: ExpertsSettings,
        task: str,
        start: Expert,
        folder: Path,
        overrides: Mapping[str, Any] | None = None,
    ) -> Expert:
        """Train an expert from `start`."""
        module = ExpertTrainer(
            self.files.backbone(self.merged), self.files.heads()[task], self.tuned[task], start, **settings.training
        )
        trainer = self.run.make_trainer(folder, {**settings.trainer, **ONLY_FIT, **(overrides or {})}, [])
        trainer.fit(module, self.run.suite.for_task(task, batch_size=settings.batch_size))
        return module.expert

    def _measured(
        self, weights: Mapping[str, Tensor], experts: Experts, shared: int = 0, settings: ExpertsSettings | None = None
    ) -> Row:
        """Accuracies of the experts as read from their files, and the files' bytes."""
        path = self.run.folder / "benchmark" / "expert.safetensors"
        sizes, loaded = [], {}
        for task, expert in experts.items():
            save_expert(path, expert, settings.values if settings else None)
            sizes.append(path.stat().st_size)
            loaded[task] = load_expert(path, shared=getattr(expert, "shared", None))
        path.unlink()
        scores = self._scores(weights, loaded, self.measure.loaders("test"))
        return {"scores": scores, "bytes": round(sum(sizes) / len(sizes)), "shared_bytes": shared, "kind": "model"}

    def _scores(self, weights: Mapping[str, Tensor], experts: Experts, loaders: Mapping[str, Any]) -> dict[str, float]:
        model = FreeModel(self.files.backbone(weights), self.files.heads(), experts)
        return self.measure.free(model, loaders, told="task")

    def measure_all(self, arguments: argparse.Namespace) -> None:
        """Measure all rows."""
        self.reported()
        self.row("ours trained, routed, head told", self.head_told)
        self.row("EMR", self.emr)
        for rank in arguments.twin_ranks:
            self.row(f"Twin, rank {rank}", partial(self.twin, rank))
        for density in arguments.released:
            self.row(f"FREE as released, {density:g}", partial(self.released, density))
        for what, make in (
            ("extracted", self.extracted),
            ("trained", self.trained),
            ("reselected", partial(self.trained, wide=WIDE)),
        ):
            for kind, density, lr in getattr(arguments, what):
                settings = replace(self.settings, kind=kind, density=density)
                if lr is not None:
                    settings.optimizer = partial(torch.optim.Adam, lr=lr, betas=(0.9, 0.98))
                self.row(f"ours {what}, {kind} {density:g}", partial(make, settings))


# -- results of several runs -------------------------------------------------------------------------------------------


def table(runs: list[Benchmark], markdown: bool) -> None:
    """Print means over the runs, with half the range of the averages."""
    first = runs[0]
    tasks = list(first.tuned)
    results = Results(
        f"{len(tasks)} tasks, {len(runs)} seed{'s' * (len(runs) > 1)}; a backbone is {first.size} bytes",
        ("", "bytes/task", "% of one", "average", "±", "kept (%)", *tasks),
    )
    best = statistics.fmean(_average(run, "individual") for run in runs)
    for name in first.rows:
        averages = [_average(run, name) for run in runs]
        size = statistics.fmean(run.rows[name]["bytes"] for run in runs)
        each = [statistics.fmean(run.rows[name]["scores"][task] for run in runs) for task in tasks]
        model = first.rows[name]["kind"] == "model"
        results.add(
            name,
            f"{size:.0f}" if model else "",
            f"{100 * size / first.size:.2f}" if model else "",
            f"{100 * statistics.fmean(averages):.1f}",
            f"{50 * (max(averages) - min(averages)):.1f}",
            f"{100 * statistics.fmean(averages) / best:.1f}" if model else "",
            *(f"{100 * score:.1f}" for score in each),
        )
    results.show(markdown)


def _average(run: Benchmark, name: str) -> float:
    row = run.rows[name]
    return mean_score(row["scores"], run.metrics if row["kind"] == "model" else {})


def plot(runs: list[Benchmark], path: Path) -> None:
    """Average score against bytes per task, means over the runs, with oracle routing."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter

    def mean(name: str) -> float:
        return 100 * statistics.fmean(_average(run, name) for run in runs)

    groups: dict[str, list[tuple[float, float]]] = {}
    for name, row in runs[0].rows.items():
        if row["bytes"] and row["kind"] == "model" and name != "individual" and "routed" not in name:
            label = name.rstrip("0123456789.").removesuffix(", rank ").rstrip(", ")
            size = statistics.fmean(run.rows[name]["bytes"] for run in runs)
            groups.setdefault(label, []).append((100 * size / runs[0].size, mean(name)))
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for marker, (label, points) in zip("osD^vP*X", groups.items(), strict=False):
        axes.plot(*zip(*sorted(points), strict=True), marker=marker, label=label)
    for name, style in (("individual", "-"), ("base", ":"), ("task arithmetic", "--")):
        axes.axhline(mean(name), color="0.4", linestyle=style, linewidth=1, label=name)
    axes.axvline(1.0, color="0.8", linewidth=1)
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("bytes of a task's file, in % of one backbone")
    axes.set_ylabel("mean test score (%), oracle routing")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.savefig(path, dpi=150)


def _expert(text: str) -> tuple[str, float, float | None]:
    """kind:density, or kind:density:learning rate."""
    kind, density, *lr = text.split(":")
    if kind not in ("sparse", "low_rank") or len(lr) > 1:
        raise argparse.ArgumentTypeError(f"{text!r}: expected sparse:DENSITY or low_rank:DENSITY, and perhaps :LR")
    return kind, float(density), float(lr[0]) if lr else None


def main() -> None:
    """Measure every run, print the table, draw the figure."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("runs", type=Path, nargs="+", help="folders of finished runs, of one suite, a seed each")
    parser.add_argument("--twin-ranks", type=int, nargs="*", default=[1, 2, 4])
    parser.add_argument("--released", type=float, nargs="*", default=[0.01, 0.04], help="densities")
    parser.add_argument("--extracted", type=_expert, nargs="*", default=[], help="kind:density")
    parser.add_argument("--trained", type=_expert, nargs="*", default=[], help="kind:density[:learning rate], of Adam")
    parser.add_argument(
        "--reselected", type=_expert, nargs="*", default=[], help="the same, the support selected again after an epoch"
    )
    parser.add_argument("--markdown", action="store_true", help="print Markdown")
    arguments = parser.parse_args()
    be_quiet()
    runs = [Benchmark(folder) for folder in arguments.runs]
    for run in runs:
        run.measure_all(arguments)
    table(runs, arguments.markdown)
    plot(runs, arguments.runs[0].parent / "experts.png")


if __name__ == "__main__":
    main()
