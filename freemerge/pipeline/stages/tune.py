"""`tune`: the search for one method's parameters on validation data.

    <run>/tune/<method>/   study.journal, merged.safetensors, merge.yaml, report.json

A trial costs one evaluation: the task vectors stay in memory, and trials share the statistics (`merging.candidates`).
Several processes can search together, each on its own device. The process that finishes the search evaluates the chosen
point and the method as configured, once, on test data.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import lightning as L
import torch
import yaml
from filelock import FileLock
from rich.console import Console
from torch import Tensor

import freemerge
from freemerge.checkpoints import expand, hash_tensors, load_checkpoint, save_checkpoint
from freemerge.evaluation import Report, Row, comparable, mean_score
from freemerge.merging import Candidates, MeasuredMethod, MergeMethod, describe_method, get_field, rescaled
from freemerge.pipeline.measure import Measure
from freemerge.pipeline.others import Others
from freemerge.pipeline.ranks import is_first
from freemerge.pipeline.reporting import title
from freemerge.pipeline.settings import Settings
from freemerge.pipeline.store.artifacts import Artifacts
from freemerge.pipeline.store.replacing import difference
from freemerge.tuning import Search, Space, Trial, default_ranges, searchers


def chosen_method(settings: Settings) -> tuple[str, MergeMethod]:
    """The method to tune, with its name.

    Args:
        settings: the stages' settings.

    Raises:
        ValueError: `merge.methods` has no method of that name.
    """
    if settings.tune.method is not None:
        return type(settings.tune.method).__name__, settings.tune.method
    methods = settings.merge.lines
    name = settings.tune.line or settings.merge.free
    if name not in methods:
        raise ValueError(f"tune.line: there is no method {name!r} in merge.methods: {', '.join(methods)}")
    return name, methods[name]


def _check_collected(files: Artifacts, asked: Mapping[str, MeasuredMethod], run: Path | None) -> None:
    """Raise a ValueError if the stage `merge` has not collected the statistics that a method merges by."""
    for method in asked.values():
        for task in files.suite.names:
            path = files.statistics_path(method, task, run)
            if not path.is_file():
                kind = type(method).__name__
                raise ValueError(
                    f"tune: {path} is not there: the stage `merge` collects it for a line of merge.methods that is "
                    f"{kind} with `statistics: collect`; add one, and run `fit` with it first"
                )


class Tuning:
    """The search over a run's fine-tuned models.

    Args:
        files: the run's files.
        measure: evaluates models, on the device of this process.
        console: where to say how it goes.
        overwrite: search anew where one with other settings, or over other models, was finished.
    """

    def __init__(self, files: Artifacts, measure: Measure, console: Console, overwrite: bool = False) -> None:
        self.files = files
        self.settings = files.settings.tune
        self.overwrite = overwrite
        self.measure = measure
        # With srun or torchrun, rank 0 finishes the search; the other ranks only take part.
        self.searches_only = self.settings.part == "search" or not is_first()
        self.console = Console(quiet=True) if self.searches_only else console
        self.models = expand(self.settings.models) if self.settings.models else None
        self.name, self._configured = chosen_method(files.settings)
        asked: dict[str, MeasuredMethod] = {}
        self.method = files.with_statistics(self._configured, asked, self.models)
        _check_collected(files, asked, self.models)
        tasks = files.suite.names
        self.space = Space(self.method, tasks, self.settings.space or default_ranges(self.method))
        self.base, self.finetuned = files.finished(self.models)
        self.heads = files.heads(run=self.models)
        self.stage = files.tune_stage(self.name, self._inputs())

    def _inputs(self) -> dict[str, Any]:
        """What the search depends on, without the budget, so that a larger budget continues the search."""
        hashes = {task: hash_tensors(load_checkpoint(path)) for task, path in self.finetuned.items()}
        return {
            "method": describe_method(self._configured),
            "space": {path: vars(bounds) for path, bounds in self.space.ranges.items()},
            "sampler": self.settings.sampler,
            "goal": self.settings.goal,
            "models": {"base": hash_tensors(self.base), **hashes},
            "heads": {task: hash_tensors(head.state_dict()) for task, head in self.heads.items()},
        }

    def run(self, others: Others | None = None) -> Report | None:
        """Search until the budget is used up, and evaluate the best point.

        Args:
            others: further processes that take part in the search.

        Returns:
            The report; None if this process only takes part.
        """
        self.stage.path.parent.mkdir(parents=True, exist_ok=True)
        turn = FileLock(f"{self.stage.path}.lock")
        with turn:
            if (report := self._finished()) is not None:
                return None if self.searches_only else self._show(report, "done already")
            if self.stage.is_stale() and (busy := searchers(self._study_path)):
                raise ValueError(
                    f"{self.stage.path}: process {busy[0]} is searching there with other settings; wait for it, or "
                    "choose another run.folder (if it was killed, remove the folder)"
                )
            finished = self.stage.finished()
            if finished is not None and self.stage.is_stale() and not self.overwrite:
                why = difference(finished, self.stage.inputs)
                raise ValueError(
                    f"{self.stage.path}: a finished search would be replaced ({why}); add --run.overwrite true, or "
                    "choose another --run.folder and --tune.models for the fine-tuned models"
                )
            self.stage.begin()
            search = self._search()
        self._try(search, others)
        if self.searches_only:
            return None
        search.wait()
        with turn:
            if (report := self._finished()) is None:  # otherwise the process that finishes the search has done so
                report = self._finish(search)
        return self._show(report, f"{len(search.trials())} trials")

    def _finished(self) -> Report | None:
        """The result of an earlier command that had at least this budget; None if there is none."""
        record = self.stage.record()
        if record is None or record["results"]["trials"] < self.settings.trials:
            return None
        stored = json.loads((self.stage.path / "report.json").read_text(encoding="utf-8"))
        names = ("name", "scores", "extra_bytes", "chosen", "kind")
        rows = [Row(**{name: row[name] for name in names}) for row in stored["rows"]]
        return Report(stored["title"], rows, stored["search"], stored["settings"], metrics=stored["metrics"])

    # -- the search ---------------------------------------------------------------------------------------------------

    def _search(self) -> Search:
        starts = []
        grid = self._grid_scale()
        if grid is not None and "scale" in self.space.ranges:
            bounds = self.space.ranges["scale"]
            own = get_field(rescaled(self.method, grid), "scale")
            names = [each.name for each in self.space.parameters if each.path == "scale"]
            values = own if isinstance(own, list) else [own] * len(names)
            if len(values) == len(names) and all(bounds.low <= value <= bounds.high for value in values):
                starts.append(self.space.start() | dict(zip(names, values, strict=True)))
        return Search(self._study_path, self.space, self.settings.sampler, self.files.seed, starts)

    @property
    def _study_path(self) -> Path:
        return self.stage.path / "study.journal"

    def _grid_scale(self) -> float | None:
        """The λ that the merge stage chose for this method from its grid; None if it did not run."""
        if self.models is not None or self.settings.method is not None:
            return None
        record = self.files.merge_stage().record()
        return record["results"]["methods"][self.name]["best"]["scale"] if record else None

    @cached_property
    def candidates(self) -> Candidates:
        """The fine-tuned models, which every trial merges; their task vectors stay in memory if there is room."""
        return Candidates(self.base, self.finetuned)

    def _try(self, search: Search, others: Others | None) -> None:
        """Evaluate points on validation data, together with other processes if there are any."""
        if others is not None:
            others.start()
        loaders = self.measure.loaders("val")
        individual = self._individual(loaders) if self.settings.goal != "mean" else {}

        def objective(point: Mapping[str, float]) -> tuple[float, dict[str, Any]]:
            scores = self.measure.shared(self._merged(self.space.apply(point)), self.heads, loaders)
            return self._value(scores, individual), {"scores": scores}

        best = float("-inf")

        def report(trial: Trial) -> None:
            nonlocal best
            if trial.value > best:
                best = trial.value
                point = ", ".join(f"{name} {value:.3g}" for name, value in trial.point.items())
                self.console.print(f"tune {self.name}: trial {trial.number}, val {best:.4f} at {point}")

        began = time.monotonic()
        search.run(objective, self.settings.trials, self.settings.seconds, report)
        if others is not None:
            others.join()  # and replace the trials of processes that died
            left = self.settings.seconds and self.settings.seconds - (time.monotonic() - began)
            search.run(objective, self.settings.trials, left, report)

    def _merged(self, method: MergeMethod) -> dict[str, Tensor]:
        """The merged backbone."""
        return self.measure.with_own_statistics(self.candidates.merge(method))

    def _individual(self, loaders: Mapping[str, Any]) -> dict[str, float]:
        """Task → score of its own fine-tuned model, with the head that it was fine-tuned with."""
        scores: dict[str, float] = {}
        heads = self.files.heads(shared=False, run=self.models)
        for task, path in self.finetuned.items():  # one model in memory at a time
            scores |= self.measure.shared(load_checkpoint(path), heads, {task: loaders[task]})
        return scores

    def _value(self, scores: Mapping[str, float], individual: Mapping[str, float]) -> float:
        """The value of a trial; higher is better, whatever the tasks' metrics."""
        metrics = self.measure.metrics
        if self.settings.goal == "mean":
            return mean_score(scores, metrics)
        ratios = []
        for task, score in scores.items():
            best = comparable(individual[task], metrics[task])
            ratios.append(comparable(score, metrics[task]) / best if best else 0.0)
        return min(ratios) if self.settings.goal == "worst" else sum(ratios) / len(ratios)

    # -- the result ---------------------------------------------------------------------------------------------------

    def _finish(self, search: Search) -> Report:
        """Evaluate on test data, once, and write the results."""
        trials, best = search.trials(), search.best()
        chosen = self.space.apply(best.point)
        merged = self._merged(chosen)
        loaders = self.measure.loaders("test")
        first = trials[0]  # the method's own point
        rows = [
            Row("individual", self._individual(loaders)),
            Row(
                f"{self.name} as configured",
                self.measure.shared(self._merged(self.method), self.heads, loaders),
                0,
                chosen={"val": first.value, **first.point},
            ),
            Row(
                f"{self.name} tuned",
                self.measure.shared(merged, self.heads, loaders),
                0,
                chosen={"val": best.value, **best.point},
            ),
        ]
        report = Report(
            title=f"{title(self.measure)}, {self.name} tuned on validation data",
            rows=rows,
            search={
                self.name: [
                    {"trial": each.number, "value": each.value, **each.point, **each.details, "seconds": each.seconds}
                    for each in trials
                ]
            },
            metrics=self.measure.metrics,
            settings={
                "seed": self.files.seed,
                "suite": self.files.suite.identity(),
                "split": {"chosen_on": "val", "reported_on": "test"},
                "goal": self.settings.goal,
                "sampler": search.sampler,
                "space": {path: vars(bounds) for path, bounds in self.space.ranges.items()},
                "budget": {"trials": self.settings.trials, "seconds": self.settings.seconds, "used": len(trials)},
                "method": describe_method(chosen),
                "versions": _versions(),
            },
        )
        save_checkpoint(self.stage.path / "merged.safetensors", merged)
        self._write_merge(chosen)
        report.write_json(self.stage.path / "report.json")
        self.stage.finish({"trials": len(trials), "best": best._asdict()})
        return report

    def _write_merge(self, chosen: MergeMethod) -> None:
        """Write the configuration of a `merge` that makes the tuned model again, with its inputs if they are files."""
        path = self.stage.path / "merge.yaml"
        config: dict[str, Any] = {"method": describe_method(chosen)}
        folder = self.models or self.files.folder
        if (folder / "base.safetensors").exists():
            stages = {task: folder / "finetune" / task / "backbone.safetensors" for task in self.files.suite.names}
            config = {
                "base": str(folder / "base.safetensors"),
                "finetuned": {task: str(file) for task, file in stages.items()},
                **config,
                "output": str(self.stage.path / "again.safetensors"),
            }
        text = yaml.safe_dump(config, sort_keys=False, allow_unicode=True)
        lines = [f"# python -m freemerge merge --config {path}"]
        if self.measure.has_own_statistics:
            lines.append("# It merges batch norm's statistics; merged.safetensors has them measured again.")
        path.write_text("\n".join([*lines, text]), encoding="utf-8")

    def _show(self, report: Report, how: str) -> Report:
        report.print(self.console)
        self.console.print(f"[dim]{self.stage.path}: {how}; merge.yaml there makes the tuned model again[/dim]")
        return report


def _versions() -> dict[str, str]:
    import optuna

    return {
        "freemerge": freemerge.__version__,
        "torch": torch.__version__,
        "lightning": L.__version__,
        "optuna": optuna.__version__,
    }
