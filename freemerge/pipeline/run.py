"""A run over a suite: one backbone, several tasks, from pretraining to the report.

    pretrain → finetune (each task) → merge (each method) → experts (each task) → router → evaluate

Every stage has its own folder in the run's folder, is skipped if it is finished, and resumes where it was interrupted
(`StageFolder`). Finished results are replaced only with `overwrite` (`make_plan`), and only one process at a time works
in a run's folder (`only_run`). Every fit has a new Trainer, so all of Lightning's flags keep their meaning.

    <run>/pretrain/               base.safetensors           pretrained here, or copied from the cache
    <run>/finetune/<task>/        backbone.safetensors, head.safetensors
    <run>/merge/                  <method>.safetensors       merged backbones
    <run>/extracted/              <task>.safetensors         experts cut out of the residuals
    <run>/experts/<task>/         expert.safetensors         trained
    <run>/router/                 router.safetensors
    <run>/free_model/             everything, for FreeModel.from_pretrained
    <run>/base.safetensors        the base that all later stages read
    <run>/config.yaml, report.json, report.png
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence

from freemerge.checkpoints import expand
from freemerge.evaluation import Report
from freemerge.pipeline.checks import check_run
from freemerge.pipeline.context import RunContext, would_replace
from freemerge.pipeline.others import Others
from freemerge.pipeline.process_state import seeds_put_back
from freemerge.pipeline.progress import Progress
from freemerge.pipeline.ranks import is_first
from freemerge.pipeline.settings import STAGES
from freemerge.pipeline.stages import RUN_STAGE
from freemerge.pipeline.stages.tune import Tuning
from freemerge.pipeline.store.lock import only_run
from freemerge.pipeline.store.replacing import make_plan
from freemerge.pipeline.store.stage_folder import from_rank_zero, make_writable


class SuiteRun(RunContext):
    """All stages over one suite.

    Args:
        tuner: the template that is fine-tuned on each task; its backbone is the base or, if the suite has pretraining
            data, is pretrained to become the base.
        suite: the tasks.
        folder: the run's folder.
        trainer: arguments of the Trainer; each fit makes a new Trainer with them. Default: Lightning's defaults.
        settings: the stages' settings.
        seed: seed of the run; each stage's seed derives from it and the stage's name, so skipping one changes no other.
        ckpt_path: checkpoint to resume from, if the stages to run have exactly one fit.
        overwrite: run stages again whose settings or inputs have changed; otherwise a ValueError names these stages.
        config_text: text to save as `config.yaml` in the run's folder.
        checkpoint_steps: write the checkpoint for resuming every so many steps, in addition to once per epoch.
        checkpoint_minutes: also write it whenever so many minutes have passed; None turns this off.
        trainer_class: the class of the Trainer, or a function that makes one.

    Raises:
        ValueError: `trainer` has an argument that Lightning's Trainer does not have.
    """

    def run(self, stages: Sequence[str] = STAGES) -> Report | None:
        """Run the chosen stages in their order; finished stages are skipped.

        Args:
            stages: names of the stages.

        Returns:
            The report, if `evaluate` is among the stages.

        Raises:
            ValueError: a stage is unknown, `ckpt_path` could mean several fits, finished results would be replaced, or
                another run is working in the folder.
            CheckError: a stage would fail later; the error, a ValueError, lists all faults.
        """
        unknown = [stage for stage in stages if stage not in STAGES]
        if unknown:
            raise ValueError(f"run.stages: unknown stage {unknown[0]!r}; stages: {', '.join(STAGES)}")
        self.stages = tuple(stage for stage in STAGES if stage in stages)
        with only_run(self.folder), seeds_put_back():
            if "pretrain" in self.stages and self.settings.pretrain.cache is not None:
                cache = expand(self.settings.pretrain.cache)
                from_rank_zero(lambda: make_writable(cache, "pretrain.cache"))
            self._check_finished()
            self._keep_config()
            self._check_ckpt_path()
            self._check()
            self.progress = Progress(self._planned())
            began = time.monotonic()
            report = None
            for stage in self.stages:
                report = RUN_STAGE[stage](self)
            self.console.print(f"[dim]{self.folder}: {time.monotonic() - began:.0f} s[/dim]")
            return report

    def _check_finished(self) -> None:
        """Raise an error if finished results would be replaced."""

        def check() -> list[str]:
            # Rank 0 may already be writing to these folders when a fit has launched the other ranks.
            if not is_first():
                return []
            plan = make_plan(self.files.stages(), lambda name: name.split()[0] in self.stages)
            if plan.replaced and not self.overwrite:
                raise ValueError(would_replace(self.folder, plan.reason))
            return sorted(plan.extended)

        self.extended = set(from_rank_zero(check))

    def _planned(self) -> list[str]:
        """The names of the stages of this run, in their order."""
        tasks = self.suite.names
        names = {
            "pretrain": ["pretrain"] if self.files.pretrains else [],
            "finetune": [f"finetune {task}" for task in tasks],
            "experts": ["experts extracted", *(f"experts {task}" for task in tasks)],
        }
        return [name for stage in self.stages for name in names.get(stage, [stage])]

    def _keep_config(self) -> None:
        if is_first() and self.config_text is not None:
            temporary = self.folder / ".config.yaml.partial"
            temporary.write_text(self.config_text, encoding="utf-8")
            os.replace(temporary, self.folder / "config.yaml")

    def _check_ckpt_path(self) -> None:
        if self.ckpt_path is None:
            return
        fits = {"pretrain": 1, "router": 1, "finetune": len(self.suite.names), "experts": len(self.suite.names)}
        if sum(fits.get(stage, 0) for stage in self.stages) != 1:
            raise ValueError(
                "--ckpt_path: these stages fit several models, and an interrupted run resumes by itself; to resume one "
                "fit from a checkpoint, choose it, for instance --run.stages '[finetune]' --data.tasks '[digits]'"
            )

    def _check(self) -> None:
        """Raise an error if a stage would fail after hours, and print what is unusual."""

        def check() -> list[str]:
            if not is_first():  # rank 0 has checked before it launched the others
                return []
            return check_run(self.files, self.stages, self.make_trainer)

        for doubt in from_rank_zero(check):
            self.doubt(doubt)

    def tune(self, others: Others | None = None) -> Report | None:
        """Search for a method's parameters on validation data. It is not a stage, because no stage depends on it.

        Args:
            others: further processes that take part in the search.

        Returns:
            The report; None if this process only takes part in the search of another one.
        """
        make_writable(self.folder, "run.folder")
        with seeds_put_back():
            return Tuning(self.files, self.measure, self.console, self.overwrite).run(others)
