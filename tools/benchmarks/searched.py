"""Merges of a finished run's models, each at the scale that validation data choose, and its scores on test data.

Every method gets the same search. Scales form a geometric grid around 1 with ratio √2. The search begins at 1 and goes
on beside the best scale until that has a neighbour on both sides, so no choice is at the edge of a grid.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from benchmarks.finished import FinishedRun
from benchmarks.processes import Job, program, read_into_cache, run_once
from freemerge.checkpoints import save_checkpoint
from freemerge.merging import Candidates, MergeMethod, describe_method, has_scale

RATIO = 2**0.5
MOST = 13  # scales that a search tries at most, on either side of 1: up to 1/91 and 91


class Case(NamedTuple):
    """One merge of a scenario.

    Args:
        line: the name of the method in tables.
        method: how to merge.
        tasks: the tasks whose models are merged, and on which the merge is measured.
    """

    line: str
    method: MergeMethod
    tasks: tuple[str, ...]


class ScaleSearch:
    """The search for a scale: an iterator over the scales to try, which reads each one's score before it goes on.

    Attributes:
        scores: scale → score, in the order of the trials; whoever iterates enters them.
        current: the scale that was given last; at the end, the best one once more.
    """

    def __init__(self) -> None:
        self.scores: dict[float, float] = {}
        self.current = scale_at(0)

    def __iter__(self) -> Iterator[float]:
        tried = [0]
        yield self.current
        while missing := self._beside(best := self._best(tried), tried):
            tried.append(missing[0])
            self.current = scale_at(missing[0])
            yield self.current
        self.current = scale_at(best)
        yield self.current

    def _best(self, tried: Sequence[int]) -> int:
        """The step with the highest score; of several, the one whose scale is closest to 1."""
        return min(tried, key=lambda step: (-self.scores[scale_at(step)], abs(step)))

    @staticmethod
    def _beside(best: int, tried: Sequence[int]) -> list[int]:
        return [step for step in (best - 1, best + 1) if step not in tried and abs(step) <= MOST]


def scale_at(step: int) -> float:
    """The scale of a step of the grid, with three significant digits."""
    return float(f"{RATIO**step:.3g}")


class Bench:
    """A finished run's models and data; results are kept in its `scenarios.json`, so that a second call reads them.

    Args:
        folder: the run's folder; all its tasks are fine-tuned.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.run = FinishedRun(folder).suite_run
        self.path = folder / "scenarios.json"

    @property
    def results(self) -> list[dict[str, Any]]:
        """All results so far, also those that another scenario added meanwhile."""
        return json.loads(self.path.read_text()) if self.path.exists() else []

    @cached_property
    def loaders(self) -> dict[str, dict[str, Any]]:
        """Split → task → loader."""
        return {split: self.run.measure.loaders(split) for split in ("val", "test")}

    @cached_property
    def heads(self) -> dict[str, Any]:
        """Task → head."""
        return self.run.files.heads()

    @cached_property
    def models(self) -> tuple[dict[str, Tensor], dict[str, dict[str, Tensor]]]:
        """The base's weights, and those of each task's fine-tuned model."""
        return self.run.files.base_weights(), self.run.files.finetuned_weights()

    def scores(self, weights: Mapping[str, Tensor], split: str, tasks: Sequence[str]) -> dict[str, float]:
        """Task → score of one backbone."""
        chosen = {task: self.loaders[split][task] for task in tasks}
        return self.run.measure.shared(self.run.measure.with_own_statistics(dict(weights)), self.heads, chosen)

    def bounds(self) -> dict[str, Any]:
        """The test scores by task of the `base` and of the `individual` models."""
        if (known := self._known({"bounds": list(self.run.suite.names)})) is not None:
            return known
        base, _ = self.models
        individual = self.run.measure.individual(self.loaders["test"])
        found = {"base": self.scores(base, "test", self.run.suite.names), "individual": individual}
        return self._keep({"bounds": list(self.run.suite.names)} | found)

    def measured(self, case: Case) -> dict[str, Any]:
        """A case's result.

        Returns:
            `scale`: the chosen one, None for a method without; `search`: scale → mean validation score; `test`: task →
            score at that scale; `seconds`: CPU time of the first merge in memory, with its statistics.
        """
        said = {"method": describe_method(case.method), "tasks": list(case.tasks)}
        if (known := self._known(said)) is not None:
            return known
        base, finetuned = self.models
        candidates = Candidates(base, {task: finetuned[task] for task in case.tasks})
        search = ScaleSearch()
        started = time.process_time()
        if not has_scale(case.method):
            weights = candidates.merge(case.method)
            seconds = time.process_time() - started
            test = self.scores(weights, "test", case.tasks)
            return self._keep(said | {"scale": None, "search": {}, "test": test, "seconds": seconds})
        for weights in candidates.over_scales(case.method, search):
            if not search.scores:
                seconds = time.process_time() - started
            if search.current not in search.scores:
                # No score: the merge computes NaN, as with too large a scale.
                score = self.run.mean_score(partial(self.scores, weights, "val", case.tasks))
                search.scores[search.current] = score or 0.0
        test = self.scores(weights, "test", case.tasks)
        return self._keep(said | {"scale": search.current, "search": search.scores, "test": test, "seconds": seconds})

    def cost(self, method: MergeMethod) -> dict[str, Any]:
        """What a merge of all models costs, as a whole process with one thread that reads and writes files.

        Returns:
            `wall` and `cpu`: seconds; `peak`: bytes, with `import torch`.
        """
        said = {"cost": describe_method(method)}
        if (known := self._known(said)) is not None:
            return known
        with tempfile.TemporaryDirectory() as folder:
            base, output = Path(folder, "base.safetensors"), Path(folder, "merged.safetensors")
            save_checkpoint(base, self.models[0])
            models = [self.folder / "finetune" / task / "backbone.safetensors" for task in self.run.suite.names]
            read_into_cache([base, *models])
            job = {"base": str(base), "models": [*map(str, models)], "method": repr(method), "output": str(output)}
            command = program("merge_models", json.dumps(job | {"options": {"hash_inputs": False}}))
            used = run_once(Job(command, environment={"OMP_NUM_THREADS": "1"}))
        return self._keep(said | {"wall": used.wall, "cpu": used.cpu, "peak": used.peak})

    def _known(self, said: Mapping[str, Any]) -> dict[str, Any] | None:
        return next((each for each in self.results if said.items() <= each.items()), None)

    def _keep(self, result: dict[str, Any]) -> dict[str, Any]:
        """Add a result to the file, atomically; it is as a later call reads it."""
        temporary = self.path.with_name(f".{self.path.name}.partial")
        temporary.write_text(json.dumps([*self.results, result], indent=1) + "\n")
        os.replace(temporary, self.path)
        return self.results[-1]
