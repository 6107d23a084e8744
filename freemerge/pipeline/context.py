"""The context that all stages of a run share: files, settings, console, and fits with their Trainers."""

from __future__ import annotations

import hashlib
import signal
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
from rich.console import Console
from rich.markup import escape
from rich.progress import track
from torch import Tensor

from freemerge.checkpoints import expand, save_checkpoint
from freemerge.data import TaskSuite
from freemerge.errors import NotFiniteError
from freemerge.evaluation import mean_score
from freemerge.pipeline.dependencies import dependencies
from freemerge.pipeline.loggers import LogConfiguration, active_wandb_run, end_wandb_run
from freemerge.pipeline.measure import Measure
from freemerge.pipeline.progress import Progress
from freemerge.pipeline.ranks import is_first
from freemerge.pipeline.settings import STAGES, Settings
from freemerge.pipeline.store.artifacts import Artifacts
from freemerge.pipeline.store.replacing import difference
from freemerge.pipeline.store.stage_folder import StageFolder, from_rank_zero
from freemerge.pipeline.trainer_arguments import check_trainer
from freemerge.pipeline.trainers import MakeTrainer, best_of
from freemerge.training import (
    BestCheckpoint,
    EpochStart,
    FineTuner,
    Interrupted,
    ResumeCheckpoint,
    stopped_by_ctrl_c,
)


class Fit(NamedTuple):
    """The result of a fit.

    Args:
        best: the checkpoint of the best weights; empty if none was written.
        value: the monitored metric at the end of the fit; None if it was not measured.
        whole: whether the metric is of all the validation data.
    """

    best: str
    value: float | None
    whole: bool


class RunContext:
    """The state of a run that its stages use; `SuiteRun` documents the arguments."""

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
        trainer_class: Callable[..., L.Trainer] = L.Trainer,
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
        self.checkpoint_steps, self.checkpoint_minutes = checkpoint_steps, checkpoint_minutes
        config = dependencies(tuner, arguments, self.settings)
        self.files = Artifacts(tuner, suite, self.folder, self.settings, config, seed)
        self.console = Console(quiet=not is_first(), highlight=False)
        self.stages: tuple[str, ...] = ()
        self.extended: set[str] = set()
        self.progress = Progress([])

    @cached_property
    def measure(self) -> Measure:
        """Evaluation on the device and in the precision of the configured Trainer."""
        trainer = self.make_trainer.bare()
        return Measure(self.files, trainer.strategy.root_device, str(trainer.precision))

    def done(self, stage: StageFolder) -> bool:
        """Whether a stage is finished already; prints a line if so."""
        record = stage.record() if self.ckpt_path is None else None  # `ckpt_path` asks to continue the fit
        if record is not None:
            self.progress.done(stage.name, record["seconds"])
            self.console.print(f"[dim]{escape(stage.name)}: done already ({record['seconds']:.0f} s then)[/dim]")
        return record is not None

    def begin(self, stage: StageFolder) -> Path | None:
        """Prepare the stage's folder.

        The plan at the start of the run cannot know whether a stage changes whose inputs are made again, for example
        because a file was deleted. Therefore finished results are compared once more here.

        Args:
            stage: the stage that begins.

        Returns:
            The checkpoint to resume from; None to start anew.

        Raises:
            ValueError: finished results would be replaced, and `overwrite` is off.
        """

        def check() -> None:
            finished = stage.finished() if is_first() else None
            if self.overwrite or finished is None or finished["key"] == stage.key or stage.name in self.extended:
                return
            raise ValueError(would_replace(self.folder, f"{stage.name} ({difference(finished, stage.inputs)})"))

        from_rank_zero(check)
        return stage.begin(self.ckpt_path)

    def finish(self, stage: StageFolder, results: Mapping[str, Any]) -> None:
        """Record and print the results of a stage."""
        record = stage.finish(results)
        self.progress.done(stage.name, record["seconds"])
        numbers = ", ".join(f"{key} {value:.3f}" for key, value in results.items() if isinstance(value, float))
        self.console.print(f"{stage.name}: {numbers + ', ' if numbers else ''}{record['seconds']:.0f} s", markup=False)

    def with_bar(self, scales: Sequence[float], what: str) -> Iterable[float]:
        """Iterate over a grid of scales with a progress bar, which disappears at the end."""
        quiet = not self.console.is_terminal
        return track(scales, what, console=self.console, transient=True, disable=quiet)

    def say(self, what: str, score: float) -> None:
        """Print the mean score of a candidate on validation data."""
        metrics = list(dict.fromkeys(self.measure.metrics.values()))
        mean = metrics[0] if len(metrics) == 1 else f"score ({', '.join(metrics)})"
        # For perplexity, the mean is over its inverse: the mean probability of a token.
        mean = mean.replace("perplexity", "1/perplexity")
        self.console.print(f"{what}: mean val {mean} {score:.3f}", markup=False)

    def fit(
        self,
        stage: StageFolder,
        module: L.LightningModule,
        data: L.LightningDataModule,
        overrides: Mapping[str, Any],
        resume: Path | None,
        monitor: str,
        mode: str = "max",
    ) -> Fit:
        """Run one Trainer fit, and print its name and progress.

        Args:
            stage: the stage of the fit.
            module: the module to fit.
            data: its data.
            overrides: the stage's Trainer arguments, over those of all fits.
            resume: the checkpoint to resume from; None to start anew.
            monitor: the metric by which the best checkpoint is chosen.
            mode: `max` or `min`: whether higher or lower is better.

        Raises:
            KeyboardInterrupt: the user pressed Ctrl-C; the message says which fit stopped and at which step.
            NotFiniteError: losses, outputs or weights became NaN or infinite.
        """
        best = BestCheckpoint(
            dirpath=stage.checkpoints,
            filename="best",
            monitor=monitor,
            mode=mode,
            enable_version_counter=False,
        )
        last = ResumeCheckpoint(
            stage.checkpoints / "last.ckpt",
            finishes=self.ckpt_path is None,
            steps=self.checkpoint_steps,
            minutes=self.checkpoint_minutes,
        )
        name = stage.path.relative_to(self.folder).as_posix()
        extra = [LogConfiguration(self._configuration(stage)), EpochStart(last), best, last]
        trainer = self.make_trainer(stage.path, name, overrides, extra)
        kept = last in trainer.callbacks  # type: ignore[attr-defined] # its connector sets them
        ckpt_path = str(resume) if resume else None
        where = [self.progress.place(stage.name), self.progress.left(), f"from {ckpt_path}" if ckpt_path else ""]
        notes = ", ".join(note for note in where if note)
        self.console.print(f"[bold]{escape(stage.name)}[/bold]" + (f" [dim]({escape(notes)})[/dim]" if notes else ""))
        wandb_run = active_wandb_run()
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
            signal.signal(signal.SIGINT, before)  # Lightning has replaced the handler
            raise KeyboardInterrupt(f"{stage.name} stopped at once") from None
        finally:
            end_wandb_run(wandb_run)
        value = trainer.callback_metrics.get(monitor)
        whole = not getattr(trainer, "fast_dev_run", False) and trainer.limit_val_batches == 1.0
        return Fit(best_of(trainer), last.metrics.get(monitor) if value is None else float(value), whole)

    def _configuration(self, stage: StageFolder) -> dict[str, Any]:
        """The configuration that loggers record: everything that the fit depends on, without hashes of files."""
        said = ("seed", "freemerge", "task", "tasks", "batch_size", "model", "trainer", *STAGES)
        merged = {"free": self.settings.merge.free} if "merged" in stage.inputs else {}
        return {"stage": stage.name} | {key: stage.inputs[key] for key in said if key in stage.inputs} | merged

    def write(self, path: Path, tensors: Mapping[str, Tensor]) -> None:
        """Write tensors to a file on rank 0; they may be on any device."""
        if is_first():
            save_checkpoint(path, {name: tensor.detach().cpu() for name, tensor in tensors.items()})

    def seed_stage(self, stage: StageFolder) -> None:
        """Seed all random generators from the run's seed and the stage's name."""
        digest = hashlib.sha256(f"{self.seed}:{stage.name}".encode()).digest()
        L.seed_everything(int.from_bytes(digest[:4], "big"), workers=True, verbose=False)

    def doubt(self, message: str) -> None:
        """Print a note: something unusual that does not stop the run."""
        self.console.print(f"[yellow]note:[/yellow] {escape(message)}", soft_wrap=True)

    def mean_score(self, scores: Callable[[], Mapping[str, float]]) -> float | None:
        """The mean score of a candidate over the tasks; None if its outputs are NaN or infinite."""
        try:
            return mean_score(scores(), self.measure.metrics)
        except NotFiniteError:
            return None


def would_replace(folder: Path, reason: str) -> str:
    """The message that finished results would be replaced."""
    return (
        f"{folder}: finished results would be replaced: {reason}; add --run.overwrite true to do them again, or choose "
        "another --run.folder"
    )
