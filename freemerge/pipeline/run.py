"""A run over a suite: one backbone, several tasks, from pretraining to the report.

    pretrain → finetune (each task) → merge (each method) → experts (each task) → router → evaluate

Every stage has its folder under the run's, is skipped when it is done, and goes on where it was interrupted
(`StageFolder`). What is finished is replaced only where that is asked for (`make_plan`), and one process at a time
works in a run's folder (`only_run`). Every fit has a fresh Trainer, so all of Lightning's flags keep their meaning in
each.

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

import copy
import hashlib
import os
import signal
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from rich.console import Console
from rich.markup import escape
from rich.progress import track
from torch import Tensor

from freemerge.checkpoints import expand, hash_tensors, save_checkpoint
from freemerge.data import TaskSuite
from freemerge.errors import NotFiniteError
from freemerge.evaluation import Report, mean_score
from freemerge.experts import load_expert, save_expert
from freemerge.merging import Candidates, has_scale, merge, rescaled, task_vector
from freemerge.models import FreeModel, has_experts
from freemerge.pipeline.artifacts import Artifacts
from freemerge.pipeline.cache import find, store
from freemerge.pipeline.checks import check_run
from freemerge.pipeline.dependencies import dependencies
from freemerge.pipeline.folder import StageFolder, content, copy_file, from_rank_zero, make_writable
from freemerge.pipeline.lock import only_run
from freemerge.pipeline.loggers import LogConfiguration, end_run, running_elsewhere
from freemerge.pipeline.measure import Measure
from freemerge.pipeline.others import Others
from freemerge.pipeline.plan import difference, make_plan
from freemerge.pipeline.process_state import seeds_put_back
from freemerge.pipeline.progress import Progress
from freemerge.pipeline.reporting import doubts_of, make_report
from freemerge.pipeline.settings import STAGES, Settings, check_trainer
from freemerge.pipeline.trainers import MakeTrainer, best_of
from freemerge.pipeline.tune import Tuning
from freemerge.runtime.process_group import in_process_group
from freemerge.training import (
    BestCheckpoint,
    EpochStart,
    ExpertTrainer,
    FineTuner,
    Interrupted,
    ResumeCheckpoint,
    RouterTrainer,
    stopped_by_ctrl_c,
)


class Fit(NamedTuple):
    """What came of a fit.

    Args:
        best: the checkpoint of the best weights; empty if none was written.
        value: the monitored metric at the end; None if it was not measured.
    """

    best: str
    value: float | None


class SuiteRun:
    """All stages over one suite.

    Args:
        tuner: the template that is fine-tuned on each task; its backbone is the base, or, where the suite has
            pretraining data, what is pretrained to become the base.
        suite: the tasks.
        folder: the run's folder.
        trainer: arguments of the Trainer, a fresh one for each fit; Lightning's defaults if not given.
        settings: the stages' settings.
        seed: every stage's randomness derives from it and the stage's name, so that skipping one changes no other.
        ckpt_path: checkpoint to resume from, where the stages to run consist of exactly one fit.
        overwrite: do stages again whose settings or inputs changed since they finished; a ValueError names them if not.
        config_text: kept as `config.yaml` in the run's folder.
        checkpoint_steps: write what an interrupted fit goes on from every so many steps within an epoch, too.
        checkpoint_minutes: likewise when so many minutes have passed; None writes it once an epoch.
        trainer_class: the class of the Trainer.

    Raises:
        ValueError: if the Trainer has no such argument.
    """

    def __init__(
        self,
        tuner: FineTuner,
        suite: TaskSuite,
        folder: str | Path,
        trainer: Mapping[str, Any] | None = None,
        settings: Settings | None = None,
        *,
        seed: int = 0,
        ckpt_path: str | None = None,
        overwrite: bool = False,
        config_text: str | None = None,
        checkpoint_steps: int | None = None,
        checkpoint_minutes: float | None = 5.0,
        trainer_class: type[L.Trainer] = L.Trainer,
    ) -> None:
        self.tuner = tuner
        self.suite = suite
        self.folder = expand(folder)
        arguments = dict(trainer or {})
        check_trainer("SuiteRun", arguments)
        self.make_trainer = MakeTrainer(arguments, trainer_class)
        self.settings = settings or Settings()
        self.seed = seed
        self.ckpt_path = str(expand(ckpt_path)) if ckpt_path else ckpt_path
        self.overwrite = overwrite
        self.config_text = config_text
        self.checkpoint_every = {"steps": checkpoint_steps, "minutes": checkpoint_minutes}
        config = dependencies(tuner, arguments, self.settings)
        self.files = Artifacts(tuner, suite, self.folder, self.settings, config, seed)
        self.console = Console(quiet=rank_zero_only.rank != 0, highlight=False)
        self._stages: tuple[str, ...] = ()
        self._extended: set[str] = set()
        self._progress = Progress([])

    @cached_property
    def measure(self) -> Measure:
        """Evaluation, where the configuration's Trainer would compute."""
        return Measure(self.files, self.make_trainer.bare().strategy.root_device)

    # -- the whole ----------------------------------------------------------------------------------------------------

    def run(self, stages: Sequence[str] = STAGES) -> Report | None:
        """Run the chosen stages in their order; what is done already is skipped.

        Returns:
            The report, if `evaluate` is among the stages.

        Raises:
            ValueError: for an unknown stage, a `ckpt_path` that could mean several fits, finished results that other
                settings would replace, or another run in the folder.
            CheckError: a ValueError with everything that would stop a stage later on.
        """
        unknown = [stage for stage in stages if stage not in STAGES]
        if unknown:
            raise ValueError(f"run.stages: unknown stage {unknown[0]!r}; stages: {', '.join(STAGES)}")
        self._stages = tuple(stage for stage in STAGES if stage in stages)
        with only_run(self.folder), seeds_put_back():
            if "pretrain" in self._stages and self.settings.pretrain.cache is not None:
                cache = expand(self.settings.pretrain.cache)
                from_rank_zero(lambda: make_writable(cache, "pretrain.cache"))
            self._check_finished()
            self._keep_config()
            self._check_ckpt_path()
            self._check()
            self._progress = Progress(self._planned())
            began = time.monotonic()
            report = None
            for stage in self._stages:
                report = getattr(self, stage)()
            self.console.print(f"[dim]{self.folder}: {time.monotonic() - began:.0f} s[/dim]")
            return report

    def _check_finished(self) -> None:
        """Refuse at once what would replace finished results."""

        def check() -> list[str]:
            # Ranks that a fit launched look at folders that rank 0 is at work in.
            if rank_zero_only.rank != 0:
                return []
            plan = make_plan(self.files.stages(), lambda name: name.split()[0] in self._stages)
            if plan.replaced and not self.overwrite:
                raise ValueError(_would_replace(self.folder, plan.reason))
            return sorted(plan.extended)

        self._extended = set(from_rank_zero(check))

    def _planned(self) -> list[str]:
        """The names of the stages to be done, in their order."""
        tasks = self.suite.names
        names = {
            "pretrain": ["pretrain"] if self.files.pretrains else [],
            "finetune": [f"finetune {task}" for task in tasks],
            "experts": ["experts extracted", *(f"experts {task}" for task in tasks)],
        }
        return [name for stage in self._stages for name in names.get(stage, [stage])]

    def _keep_config(self) -> None:
        if rank_zero_only.rank == 0 and self.config_text is not None:
            temporary = self.folder / ".config.yaml.partial"
            temporary.write_text(self.config_text, encoding="utf-8")
            os.replace(temporary, self.folder / "config.yaml")

    def _check_ckpt_path(self) -> None:
        if self.ckpt_path is None:
            return
        fits = {"pretrain": 1, "router": 1, "finetune": len(self.suite.names), "experts": len(self.suite.names)}
        if sum(fits.get(stage, 0) for stage in self._stages) != 1:
            raise ValueError(
                "--ckpt_path: these stages fit several models, and an interrupted run resumes by itself; to resume one "
                "fit from a checkpoint, choose it, for instance --run.stages '[finetune]' --data.tasks '[digits]'"
            )

    def _check(self) -> None:
        """Refuse at once what would fail after hours, and say what is unusual."""

        def check() -> list[str]:
            if rank_zero_only.rank != 0:  # ranks that a fit launched
                return []
            trainer = self.make_trainer.bare()
            several = trainer.num_devices * trainer.num_nodes > 1
            return check_run(self.files, self._stages, trainer.strategy.root_device, several)

        for doubt in from_rank_zero(check):
            self._doubt(doubt)

    def _doubt(self, message: str) -> None:
        """Say what is worth knowing and stops nothing."""
        self.console.print(f"[yellow]note:[/yellow] {escape(message)}", soft_wrap=True)

    # -- stages -------------------------------------------------------------------------------------------------------

    def pretrain(self) -> None:
        """Fit the backbone on the suite's pretraining data, and keep it as the base."""
        if not self.files.pretrains:
            return
        stage = self.files.pretrain_stage()
        done = self._done(stage)
        made, own = stage.path / "base.safetensors", self.folder / "base.safetensors"
        if done and own.is_file() and content(own) != content(made):
            raise ValueError(
                f"{own}: is not the base that was pretrained here, {made}: leave pretrain out of run.stages to go on "
                "from it, or remove it"
            )
        if not done and not self._pretrained_before(stage):
            self._pretrain(stage)
        if rank_zero_only.rank == 0 and not (done and own.is_file()):
            copy_file(made, own)
        if in_process_group():
            dist.barrier()  # nobody reads it before it is there

    def _pretrain(self, stage: StageFolder) -> None:
        resume = self._begin(stage)
        settings = self.settings.pretrain
        data = self.suite.pretraining_data(batch_size=settings.batch_size)
        self._seed(stage)
        tuner = FineTuner(copy.deepcopy(self.tuner.backbone), data.num_classes, head="linear", **settings.optimization)
        fit = self._fit(stage, tuner, data, settings.trainer, resume, monitor="val/acc")
        self._write(stage.path / "base.safetensors", tuner.backbone.weights())
        self._finish(stage, {"val/acc": fit.value})
        if self.settings.pretrain.cache is not None and rank_zero_only.rank == 0:
            store(stage, expand(self.settings.pretrain.cache))

    def _pretrained_before(self, stage: StageFolder) -> bool:
        """Take the base from the cache of pretrained backbones, if another run has put it there."""
        if self.settings.pretrain.cache is None or stage.begun() == stage.key:
            return False
        kept = find(stage, expand(self.settings.pretrain.cache))
        if kept is None:
            return False
        self._begin(stage)
        if rank_zero_only.rank == 0:
            copy_file(kept.path / "base.safetensors", stage.path / "base.safetensors")
        stage.finish(kept.finished()["results"])
        self.console.print(f"{stage.name}: taken from {kept.path}", markup=False)
        return True

    def finetune(self) -> None:
        """Fine-tune the base on each task: the individual models."""
        for task in self.suite.names:
            stage = self.files.finetune_stage(task)
            if self._done(stage):
                continue
            data = self.suite.for_task(task)
            tuner = self.files.base_tuner()
            resume = self._begin(stage)
            self._seed(stage)
            tuner = tuner.for_task(data.task)
            fit = self._fit(
                stage, tuner, data, self.settings.finetune.trainer, resume, tuner.monitor, tuner.monitor_mode
            )
            if self.settings.finetune.weights == "best" and fit.best:
                tuner.load_state_dict(torch.load(fit.best, map_location="cpu", weights_only=True)["state_dict"])
            self._write(stage.path / "backbone.safetensors", tuner.weights())
            if head := tuner.head.state_dict():
                self._write(stage.path / "head.safetensors", head)
            if rank_zero_only.rank == 0:
                tuner.save_adapter(stage.path / "adapter")
            self._finish(stage, {tuner.monitor: fit.value})
            self._compare_with_base(task, tuner, fit)

    def _compare_with_base(self, task: str, tuner: FineTuner, fit: Fit) -> None:
        """Say so where fine-tuning has made a model worse, under the same head."""
        trainer = tuner.trainer
        if fit.value is None or trainer.fast_dev_run or trainer.limit_val_batches != 1.0:
            return
        loader = {task: self.suite.for_task(task).val_dataloader()}
        base = self.measure.shared(self.files.base_weights(), {task: copy.deepcopy(tuner.head)}, loader)[task]
        metric = tuner.objective.metric
        if (fit.value < base) if metric.higher_is_better else (fit.value > base):
            self._doubt(
                f"finetune {task}: {tuner.monitor} is {fit.value:.3f}, worse than the base's {base:.3f} under the same "
                "head: a merge cannot gain from it; try a lower learning rate, fewer epochs or finetune.weights best"
            )

    def merge(self) -> None:
        """Merge the task vectors by every method, at the scale that does best on validation data."""
        stage = self.files.merge_stage()
        if self._done(stage):
            return
        base, finetuned = self.files.base_weights(), self.files.finetuned_weights()
        heads = self.files.heads()
        self._begin(stage)
        loaders = self.measure.loaders("val")
        candidates = Candidates(base, finetuned)
        individual = self.measure.individual(loaders)
        results: dict[str, Any] = {"individual": individual, "methods": {}}
        for name, method in self.settings.merge.methods.items():
            scalable = has_scale(method)
            scales = self.settings.merge.scales if scalable else [1.0]
            tried = candidates.over_scales(method, scales) if scalable else [candidates.merge(method)]
            search = []
            for scale, weights in zip(self._with_bar(scales, f"merge: {name}"), tried, strict=True):
                weights = self.measure.with_own_statistics(weights)
                if (score := self._mean_score(lambda w=weights: self.measure.shared(w, heads, loaders))) is None:
                    self._doubt(f"merge: {name} at scale {scale:g} computes NaN or infinite values, and is left out")
                    continue
                search.append({"scale": scale, "mean_acc": score})
            if not search:
                raise NotFiniteError(f"merge: {name} computes NaN or infinite values at every scale: {scales}")
            best = max(search, key=lambda candidate: candidate["mean_acc"])
            chosen = rescaled(method, best["scale"]) if scalable else method
            self._write(self.files.merged_path(name), self.measure.with_own_statistics(merge(base, finetuned, chosen)))
            results["methods"][name] = {"search": search, "best": best}
            self._say(f"merge: {name}" + (f", scale {best['scale']:g}" if scalable else ""), best["mean_acc"])
        self._finish(stage, results)

    def experts(self) -> None:
        """Extract every task's expert from its residual, then train it against its teacher."""
        extraction = self.files.extraction_stage()
        if not self._done(extraction):
            self._extract_experts(extraction)
        for task in self.suite.names:
            stage = self.files.expert_stage(task)
            if self._done(stage):
                continue
            settings = self.settings.experts
            merged = self.files.free_weights()
            start = load_expert(self.files.extracted_path(task), merged)
            head, teacher = self.files.heads()[task], self.files.finetuned(task)
            resume = self._begin(stage)
            self._seed(stage)
            trainer_module = ExpertTrainer(
                self.files.backbone(merged),
                head,
                teacher,
                start,
                **settings.training,
            )
            data = self.suite.for_task(task, batch_size=settings.batch_size)
            fit = self._fit(stage, trainer_module, data, settings.trainer, resume, monitor="val/agreement")
            if rank_zero_only.rank == 0:
                save_expert(self.files.expert_path(task), trainer_module.expert, settings.values)
            self._finish(stage, {"val/agreement": fit.value})

    def _extract_experts(self, stage: StageFolder) -> None:
        settings = self.settings.experts
        merged, finetuned, heads = self.files.free_weights(), self.files.finetuned_weights(), self.files.heads()
        self._begin(stage)
        hashes = {"base_hash": hash_tensors(self.files.base_weights()), "merged_hash": hash_tensors(merged)}
        experts = {
            task: settings.cut(task_vector(merged, weights), {"task": task, **hashes})
            for task, weights in finetuned.items()
        }
        loaders = self.measure.loaders("val")
        search = []
        for scale in self._with_bar(self.settings.merge.scales, "experts: extracted"):
            scaled = {task: expert.scaled(scale) for task, expert in experts.items()}
            model = FreeModel(self.files.backbone(merged), heads, scaled)
            if (score := self._mean_score(lambda m=model: self.measure.free(m, loaders, told="task"))) is None:
                self._doubt(f"experts at scale {scale:g} compute NaN or infinite values, and are left out")
                continue
            search.append({"scale": scale, "mean_acc": score})
        if not search:
            raise NotFiniteError(f"experts compute NaN or infinite values at every scale: {self.settings.merge.scales}")
        best = max(search, key=lambda candidate: candidate["mean_acc"])
        if rank_zero_only.rank == 0:
            for task, expert in experts.items():
                save_expert(self.files.extracted_path(task), expert.scaled(best["scale"]), settings.values)
        self._finish(stage, {"search": search, "best": best})
        self._say(f"experts: extracted, scale {best['scale']:g}", best["mean_acc"])

    def router(self) -> None:
        """Train the router on a mixture of all tasks."""
        stage = self.files.router_stage()
        if self._done(stage):
            return
        settings = self.settings.router
        data = self.suite.mixture(batch_size=settings.batch_size)
        resume = self._begin(stage)
        self._seed(stage)
        backbone = self.files.backbone(self.files.free_weights()) if settings.kind == "early" else None
        module = RouterTrainer(self.files.new_router(), backbone, **settings.optimization)
        fit = self._fit(stage, module, data, settings.trainer, resume, monitor="val/acc")
        threshold = module.calibrate(data.train_dataloader(), data.val_dataloader(), settings.share)
        self._write(stage.path / "router.safetensors", module.router.stored())
        self._finish(stage, {"val/acc": fit.value, "threshold": threshold})
        tasks = len(self.suite.names)
        chance = 1 / tasks
        if fit.value is not None and tasks > 1 and fit.value < chance + 0.1 * (1 - chance):
            self._doubt(
                f"router: val/acc is {fit.value:.3f}, and guessing among {tasks} tasks gives {chance:.3f}: "
                "it cannot tell their inputs apart; try another router.point or more epochs, or name each input's task"
            )

    def evaluate(self) -> Report:
        """Evaluate everything on all tasks' test data; write the FREE model, the report and the picture.

        Where there are no experts, because their stages were left out, the report ends with the merged models, and the
        FREE model is the merged backbone with its heads; it takes the place of none that has experts.
        """
        model = self.files.free_model() if self.files.has_experts() or "experts" in self._stages else None
        report = make_report(self.files, self.measure, model)
        if rank_zero_only.rank == 0:
            folder = self.folder / "free_model"
            if model is not None:
                model.save_pretrained(folder)
            elif not has_experts(folder):
                self.files.merged_model().save_pretrained(folder)
            report.write_json(self.folder / "report.json")
            report.plot(self.folder / "report.png")
            report.print(self.console)
            for doubt in doubts_of(report, self.settings.merge.free):
                self._doubt(doubt)
            self.console.print(f"[dim]{self.folder}/report.json, report.png and free_model/ hold the rest[/dim]")
        return report

    def tune(self, others: Others | None = None) -> Report | None:
        """Search for a method's parameters on validation data; not a stage, as nothing else depends on it.

        Args:
            others: processes that search along.

        Returns:
            The report; None where this process only takes part in a search.
        """
        make_writable(self.folder, "run.folder")
        with seeds_put_back():
            return Tuning(self.files, self.measure, self.console, self.overwrite).run(others)

    # -- small things -------------------------------------------------------------------------------------------------

    def _done(self, stage: StageFolder) -> bool:
        record = stage.record() if self.ckpt_path is None else None  # a checkpoint to go on from means: go on
        if record is not None:
            self._progress.done(stage.name, record["seconds"])
            self.console.print(f"[dim]{escape(stage.name)}: done already ({record['seconds']:.0f} s then)[/dim]")
        return record is not None

    def _begin(self, stage: StageFolder) -> Path | None:
        """Make the stage's folder ready; refuse to empty what came to be out of date since the run began.

        What was made from a file that is gone is such a case: nobody can tell beforehand whether it comes out the same.
        """

        def check() -> None:
            finished = stage.finished() if rank_zero_only.rank == 0 else None
            if self.overwrite or finished is None or finished["key"] == stage.key or stage.name in self._extended:
                return
            raise ValueError(_would_replace(self.folder, f"{stage.name} ({difference(finished, stage.inputs)})"))

        from_rank_zero(check)
        return stage.begin(self.ckpt_path)

    def _finish(self, stage: StageFolder, results: Mapping[str, Any]) -> None:
        record = stage.finish(results)
        self._progress.done(stage.name, record["seconds"])
        numbers = ", ".join(f"{key} {value:.3f}" for key, value in results.items() if isinstance(value, float))
        self.console.print(f"{stage.name}: {numbers + ', ' if numbers else ''}{record['seconds']:.0f} s", markup=False)

    def _mean_score(self, scores: Callable[[], Mapping[str, float]]) -> float | None:
        """What a candidate is chosen by; None if its outputs are no numbers."""
        try:
            return mean_score(scores(), self.measure.metrics)
        except NotFiniteError:
            return None

    def _with_bar(self, scales: Sequence[float], what: str) -> Iterable[float]:
        """A grid of scales, with a bar that goes away when it is through."""
        quiet = not self.console.is_terminal
        return track(scales, what, console=self.console, transient=True, disable=quiet)

    def _say(self, what: str, score: float) -> None:
        metrics = list(dict.fromkeys(self.measure.metrics.values()))
        mean = metrics[0] if len(metrics) == 1 else f"score ({', '.join(metrics)})"
        # Of perplexity the inverse is averaged, the mean probability of a token.
        mean = mean.replace("perplexity", "1/perplexity")
        self.console.print(f"{what}: mean val {mean} {score:.3f}", markup=False)

    def _fit(
        self,
        stage: StageFolder,
        module: L.LightningModule,
        data: L.LightningDataModule,
        overrides: Mapping[str, Any],
        resume: Path | None,
        monitor: str,
        mode: str = "max",
    ) -> Fit:
        """One Trainer fit, resumed if it was interrupted; prints what it is fitting.

        Raises:
            KeyboardInterrupt: with what has stopped, where it goes on, if the user has pressed Ctrl-C.
        """
        best = BestCheckpoint(
            dirpath=stage.checkpoints,
            filename="best",
            monitor=monitor,
            mode=mode,
            enable_version_counter=False,
        )
        last = ResumeCheckpoint(
            stage.checkpoints / "last.ckpt", finishes=self.ckpt_path is None, **self.checkpoint_every
        )
        name = stage.path.relative_to(self.folder).as_posix()
        extra = [LogConfiguration(self._configuration(stage)), EpochStart(last), best, last]
        trainer = self.make_trainer(stage.path, name, overrides, extra)
        kept = last in trainer.callbacks
        ckpt_path = str(resume) if resume else None
        where = [self._progress.place(stage.name), self._progress.left(), f"from {ckpt_path}" if ckpt_path else ""]
        notes = ", ".join(note for note in where if note)
        self.console.print(f"[bold]{escape(stage.name)}[/bold]" + (f" [dim]({escape(notes)})[/dim]" if notes else ""))
        others_run = running_elsewhere()
        before = signal.getsignal(signal.SIGINT)
        try:
            with stopped_by_ctrl_c(last, self.console.print) if kept else nullcontext():
                trainer.fit(module, datamodule=data, ckpt_path=ckpt_path)
        except NotFiniteError as error:
            again = "; then add --run.overwrite true" if stage.last_checkpoint is not None else ""
            raise NotFiniteError(f"{stage.name}: {error}{again}") from error
        except Interrupted:
            raise KeyboardInterrupt(f"{stage.name} stopped at step {trainer.global_step}") from None
        except SystemExit:
            if not trainer.interrupted:
                raise
            signal.signal(signal.SIGINT, before)  # which Lightning has shut out
            raise KeyboardInterrupt(f"{stage.name} stopped at once") from None
        finally:
            end_run(others_run)
        value = trainer.callback_metrics.get(monitor)
        return Fit(best_of(trainer), last.metrics.get(monitor) if value is None else float(value))

    def _configuration(self, stage: StageFolder) -> dict[str, Any]:
        """What a fit's loggers are told: what its result depends on, less the hashes of files."""
        said = ("seed", "freemerge", "task", "tasks", "batch_size", "model", "trainer", *STAGES)
        merged = {"free": self.settings.merge.free} if "merged" in stage.inputs else {}
        return {"stage": stage.name} | {key: stage.inputs[key] for key in said if key in stage.inputs} | merged

    def _write(self, path: Path, tensors: Mapping[str, Tensor]) -> None:
        if rank_zero_only.rank == 0:
            save_checkpoint(path, {name: tensor.detach().cpu() for name, tensor in tensors.items()})

    def _seed(self, stage: StageFolder) -> None:
        digest = hashlib.sha256(f"{self.seed}:{stage.name}".encode()).digest()
        L.seed_everything(int.from_bytes(digest[:4], "big"), workers=True, verbose=False)


def _would_replace(folder: Path, reason: str) -> str:
    return (
        f"{folder}: finished results would be replaced: {reason}; add --run.overwrite true to do them again, or choose "
        "another --run.folder"
    )
