"""Checks before the first fit: they find what would fail, or give poor results, after hours.

A few real samples of each task go through the real backbone, a head, the loss, the metric and the router. All findings
are reported together. Finished stages are not checked again.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from lightning.pytorch.utilities.seed import isolate_rng

from freemerge.data import TaskData
from freemerge.inputs import Inputs, select
from freemerge.models import batch_norms
from freemerge.pipeline.checks.findings import CheckError, Findings
from freemerge.pipeline.checks.fits import StageMetrics, check_fits, may_log_more
from freemerge.pipeline.checks.labels import check_labels
from freemerge.pipeline.checks.samples import Samples
from freemerge.pipeline.checks.stages import (
    check_experts_settings,
    check_finished_models,
    check_merge,
    check_router_settings,
    check_stages,
    check_tune,
)
from freemerge.pipeline.checks.together import check_expert_inputs, check_mixture, check_router
from freemerge.pipeline.store.artifacts import Artifacts
from freemerge.pipeline.trainers import MakeTrainer
from freemerge.training import ExpertTrainer, FineTuner, RouterTrainer

__all__ = ["CheckError", "check_run"]


def check_run(files: Artifacts, stages: Sequence[str], make_trainer: MakeTrainer) -> list[str]:
    """Find everything that would stop the chosen stages.

    Args:
        files: the run's files.
        stages: the chosen stages, in order.
        make_trainer: makes the Trainers of the run. If they use several devices, the checks use only the CPU, as the
            devices' processes do not exist yet.

    Returns:
        The doubts: unusual findings that do not stop the run, one line each.

    Raises:
        CheckError: something would stop a stage; the error lists all faults.
    """
    findings = Findings()
    check_stages(files, stages, findings)
    pending = _pending(files, stages)
    if "finetune" in pending:
        check_finished_models(files, findings)
    if "merge" in pending:
        check_merge(files, findings)
        check_tune(files, findings)
    if "experts" in pending:
        check_experts_settings(files, findings)
    if pending & {"experts", "router"}:
        check_router_settings(files, findings)
    if pending - {"evaluate"}:
        # The checks draw random numbers for datasets, heads and routers; the stages must not see different ones for it.
        with isolate_rng(include_cuda=False), torch.no_grad():
            _DataChecks(files, pending, make_trainer, findings).run()
    if findings.faults:
        raise CheckError(findings.faults)
    return findings.doubts


def _pending(files: Artifacts, stages: Sequence[str]) -> set[str]:
    """The chosen stages that are not finished."""
    tasks = files.suite.names
    folders = {
        "pretrain": [files.pretrain_stage()] if files.pretrains else [],
        "finetune": [files.finetune_stage(task) for task in tasks],
        "merge": [files.merge_stage()],
        "experts": [files.extraction_stage(), *(files.expert_stage(task) for task in tasks)],
        "router": [files.router_stage()],
    }
    return {
        stage
        for stage in stages
        if stage == "evaluate"
        or any((done := each.finished()) is None or done["key"] != each.key for each in folders[stage])
    }


class _DataChecks:
    """The checks that need the data and the model.

    Args:
        files: the run's files.
        pending: the stages that are not finished.
        make_trainer: makes the Trainers of the run.
        findings: receives the faults and doubts.
    """

    def __init__(self, files: Artifacts, pending: set[str], make_trainer: MakeTrainer, findings: Findings) -> None:
        trainer = make_trainer.bare()
        later = trainer.strategy.root_device
        self.files = files
        self.pending = pending
        self.make_trainer = make_trainer
        self.device = torch.device("cpu") if trainer.num_devices * trainer.num_nodes > 1 else later
        self.may_fail = self.device.type != later.type
        self.findings = findings
        # Stage → task → the metrics that its fit logs.
        self.logged: dict[str, dict[str, tuple[str, ...]]] = {"pretrain": {}, "finetune": {}}

    def run(self) -> None:
        """Check each task, then all tasks together."""
        files, suite = self.files, self.files.suite
        suite.prepare_data()
        tuner = files.tuner
        was_training = tuner.backbone.training
        tuner.backbone.eval().to(self.device)
        try:
            if "pretrain" in self.pending:
                settings = files.settings.pretrain
                data = suite.pretraining_data(settings.batch_size)
                linear = FineTuner(tuner.backbone, head="linear")
                self._task("pretrain", data, linear, ("train", "val"))
            splits = ("train", "val", "test") if "evaluate" in self.pending else ("train", "val")
            inputs = {name: self._task("finetune", suite.for_task(name), tuner, splits) for name in suite.names}
            if "evaluate" in self.pending:
                for name in suite.held_out:
                    self._held_out(name)
            self._adapter()
            self._fits()
            seen = {name: part for name, part in inputs.items() if part is not None}
            if len(seen) == len(inputs):
                self._together(seen)
        finally:
            tuner.backbone.to("cpu").train(was_training)

    def _task(self, stage: str, data: TaskData, tuner: FineTuner, splits: tuple[str, ...]) -> Inputs | None:
        """Check one task.

        Returns:
            A few of its training inputs; None if they cannot be used.
        """
        before = len(self.findings.faults)
        try:
            task = data.task
            check_labels(task, self.findings, splits)
            self.logged[stage][data.name] = tuner.logged(task)
            if tuner.heads.kind == "zero_shot":
                tuner.heads.zero_shot(task, task.class_names[:1])  # one of them says enough
            samples = Samples(data, self.findings)
        except ValueError as error:  # the data cannot be used, or do not suit this model; each error is one line
            self.findings.fault(error if data.name in str(error) else f"task {data.name!r}: {error}")
            return None
        samples.check_pixels(tuner.backbone)
        if len(self.findings.faults) == before:
            samples.check_model(tuner, self.device, self.may_fail)
        if "train" not in samples.batches:
            return None
        if "experts" in self.pending:
            check_expert_inputs(data.name, samples.batches["train"], self.files.settings.experts, self.findings)
        return samples.few("train")[0]

    def _held_out(self, name: str) -> None:
        try:
            task = self.files.suite.task(name)
            check_labels(task, self.findings, ("test",))
            self.files.tuner.objective_of(task)
        except ValueError as error:
            self.findings.fault(error)

    def _adapter(self) -> None:
        """Check that the adapter fits the model; one task is enough."""
        if self.files.tuner.peft is not None and "finetune" in self.pending and not self.findings.faults:
            try:
                self.files.tuner.for_task(self.files.suite.task(self.files.suite.names[0]))
            except ValueError as error:
                self.findings.fault(error)

    def _fits(self) -> None:
        """Check the Trainers of all fits that are not finished."""
        kind = type(self.files.tuner)
        more, settings = kind if may_log_more(kind, "logged") else None, self.files.settings
        metrics = {
            "pretrain": StageMetrics(self.logged["pretrain"], schedule=settings.pretrain.schedule),
            "finetune": StageMetrics(self.logged["finetune"], more, self.files.tuner.schedule),
            "experts": StageMetrics({"": ExpertTrainer.LOGGED}, schedule=settings.experts.schedule),
            "router": StageMetrics({"": RouterTrainer.LOGGED}, schedule=settings.router.schedule),
        }
        pending = {stage: each for stage, each in metrics.items() if stage in self.pending}
        check_fits(pending, settings, self.make_trainer, self.findings)

    def _together(self, inputs: dict[str, Inputs]) -> None:
        settings, backbone = self.files.settings, self.files.tuner.backbone
        if "router" in self.pending:
            mixed = check_mixture(
                {name: select(part, slice(2)) for name, part in inputs.items()},
                "router: its training",
                "leave router and experts out of run.stages",
                self.findings,
            )
            if mixed is not None:
                check_router(mixed, list(inputs), settings.router, backbone, self.device, self.findings)
        elif "merge" in self.pending and settings.merge.batch_norm_batches and batch_norms(backbone):
            check_mixture(inputs, "merge.batch_norm_batches: measuring batch norm", "set it to 0", self.findings)
