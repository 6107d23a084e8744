"""A router's accuracy, and how often it abstains, on inputs of the suite's tasks and on out-of-distribution inputs.

    python -m freemerge fit --config configs/vision8.yaml --data.folder DATA --model.backbone.weights WEIGHTS \\
        --run.folder runs/vision8/0
    python tools/benchmark_router.py runs/vision8/0

For each task of the suite, a router is trained with the run's settings on all other tasks, then evaluated on test data
of these and of the task left out, whose inputs belong to none of its tasks. The thresholds below which it abstains are
chosen, as in a run, on validation data of the known tasks. The last two columns are the probability that an input of
the suite has a higher confidence, or a higher out-of-distribution score, than one of the task left out (the area under
the ROC curve).

Rows are stored in the run's `router.json`, so that an interrupted benchmark resumes.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterable
from pathlib import Path

import lightning as L
import torch
from benchmarks.finished import ONLY_FIT, FinishedRun, be_quiet
from benchmarks.tables import Results
from torch import Tensor
from torchmetrics.functional.classification import binary_auroc

from freemerge.pipeline import SuiteRun
from freemerge.training import RouterTrainer


def trained_router(run: SuiteRun, folder: Path) -> tuple[RouterTrainer, float]:
    """A calibrated router for the suite's tasks, and its confidence threshold."""
    settings = run.settings.router
    backbone = run.files.backbone(run.files.free_weights()) if settings.kind == "early" else None
    L.seed_everything(run.seed, verbose=False)
    data = run.suite.mixture(batch_size=settings.batch_size)
    module = RouterTrainer(run.files.new_router(), backbone, **settings.optimization)
    run.make_trainer(folder, {**settings.trainer, **ONLY_FIT}, []).fit(module, data)
    return module, module.calibrate(data.train_dataloader(), data.val_dataloader(), settings.fraction)


def judged(module: RouterTrainer, threshold: float, loader: Iterable) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The router's tasks, probabilities, out-of-distribution scores and abstentions on a loader, each (N,)."""
    logits, scores = module.judge(loader)
    confidence, routed = logits.softmax(dim=1).max(dim=1)
    return routed, confidence, scores, module.router.abstains(logits, scores, threshold)


def measure(folder: Path, left_out: str) -> dict[str, float]:
    """One row: fractions in [0, 1] of test inputs; each task has the same weight."""
    run = FinishedRun(folder, "--data.held_out", json.dumps([left_out])).suite_run
    run.suite.prepare_data()
    run.suite.setup()
    module, threshold = trained_router(run, folder / "benchmark")
    correct, abstained, known = [], [], []
    for index, task in enumerate(run.suite.names):
        routed, *scores, unsure = judged(module, threshold, run.suite.for_task(task).test_dataloader())
        correct.append(float((routed == index).float().mean()))
        abstained.append(float(unsure.float().mean()))
        known.append(torch.stack(scores))  # (2, N)
    _, *scores, unsure = judged(module, threshold, run.suite.for_task(left_out).test_dataloader())
    strange, inside = torch.stack(scores), torch.cat(known, dim=1)
    belongs = torch.cat([torch.ones(inside.shape[1]), torch.zeros(strange.shape[1])]).int()
    by_confidence, by_score = (
        float(binary_auroc(torch.cat([inside[i], strange[i]]).double(), belongs)) for i in range(2)
    )
    return {
        "accuracy": statistics.fmean(correct),
        "abstained": statistics.fmean(abstained),
        "abstained left out": float(unsure.float().mean()),
        "by confidence": by_confidence,
        "by score": by_score,
    }


def main() -> None:
    """Measure with each task left out, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("run", type=Path, help="folder of a finished run")
    parser.add_argument("--tasks", nargs="*", help="which to leave out; each one if not given")
    parser.add_argument("--markdown", action="store_true", help="print Markdown")
    arguments = parser.parse_args()
    be_quiet()
    run = FinishedRun(arguments.run).suite_run
    tasks = arguments.tasks or run.suite.names
    path = arguments.run / "router.json"
    rows = json.loads(path.read_text()) if path.exists() else {}
    names = ("accuracy", "abstained", "abstained left out", "by confidence", "by score")
    kind = run.settings.router.kind
    results = Results(f"{len(run.suite.names)} tasks, a {kind} router without one of them (%)", ("left out", *names))
    for task in tasks:
        if task not in rows:
            rows[task] = measure(arguments.run, task)
            path.write_text(json.dumps(rows, indent=2) + "\n")
        results.add(task, *(f"{100 * rows[task][name]:.1f}" for name in names))
    results.add("mean", *(f"{100 * statistics.fmean(rows[task][name] for task in tasks):.1f}" for name in names))
    results.show(arguments.markdown)


if __name__ == "__main__":
    main()
