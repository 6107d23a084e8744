"""The Trainer of each fit: arguments that Lightning accepts, and callbacks that find the metric they monitor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import lightning as L
import torch
from lightning.pytorch.callbacks import DeviceStatsMonitor, EarlyStopping, LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from freemerge.data import listed
from freemerge.pipeline.checks.findings import Findings
from freemerge.pipeline.loggers import has_logger
from freemerge.pipeline.settings import Settings
from freemerge.pipeline.trainers import MakeTrainer, as_list
from freemerge.training import Schedule, plateau_monitor


@dataclass(frozen=True)
class StageMetrics:
    """The metrics that the fits of a stage log.

    Args:
        of_fits: name of the fit (such as its task) → names of the metrics.
        may_log_more: class of the stage's module, if it overrides a step or hook in which it may log further metrics.
        schedule: the fits' learning-rate schedule.
    """

    of_fits: Mapping[str, Sequence[str]]
    may_log_more: type | None = None
    schedule: Schedule = "constant"


def check_fits(
    stages: Mapping[str, StageMetrics], settings: Settings, make_trainer: MakeTrainer, findings: Findings
) -> None:
    """Check the Trainer arguments and the callbacks of every fit, before the first one.

    Args:
        stages: stage → the metrics of its fits.
        settings: the stages' settings.
        make_trainer: makes the Trainers of the run.
        findings: receives the faults and doubts.
    """
    for stage, metrics in stages.items():
        overrides = getattr(settings, stage).trainer
        try:
            trainer = make_trainer.without_logger(overrides)
        except (MisconfigurationException, ValueError, TypeError) as error:
            findings.fault(f"{stage}.trainer: Lightning's Trainer refuses the arguments of this stage: {error}")
            continue
        if not trainer.fast_dev_run:  # type: ignore[attr-defined] # set by a connector
            given = {**make_trainer.arguments, **overrides}
            key = f"{stage}.trainer" if "callbacks" in overrides else "trainer"
            callbacks = as_list(given.get("callbacks"))
            _check_loggers(stage, key, callbacks, has_logger(given.get("logger")), findings)
            _Monitors(stage, key, callbacks, metrics, trainer.limit_val_batches != 0, findings).check()


def may_log_more(module: type[L.LightningModule], declaration: str) -> bool:
    """Whether a module's class overrides a step or hook of Lightning's below the class that declares its metrics.

    Args:
        module: the class.
        declaration: name of the attribute that declares what a fit logs; a subclass that overrides it is believed.
    """
    for each in module.__mro__:
        if declaration in vars(each):
            return False
        if any(hasattr(L.LightningModule, name) for name in vars(each) if not name.startswith("__")):
            return True
    return True


def _scheduler(schedule: Schedule) -> object:
    """The scheduler that a callable schedule makes for an optimizer of one parameter; None for a named schedule."""
    if not callable(schedule):
        return None
    try:
        return schedule(torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0))
    except Exception:  # a schedule for the parameters of one model alone; its fit will tell
        return None


def _check_loggers(stage: str, key: str, callbacks: Sequence[object], logs: bool, findings: Findings) -> None:
    """Find callbacks that Lightning refuses in a fit without a logger."""
    for each in callbacks:
        if isinstance(each, (LearningRateMonitor, DeviceStatsMonitor)) and not logs:
            findings.fault(
                f"{stage}: {type(each).__name__} in {key}.callbacks needs a logger, and the stage has none; remove the "
                f"callback, or set {stage}.trainer.logger to true"
            )


@dataclass(frozen=True)
class _Monitors:
    """The callbacks of a stage, and what they monitor.

    Args:
        stage: name of the stage.
        key: the configuration key that holds the callbacks, without `.callbacks`.
        callbacks: the callbacks.
        metrics: what the fits log.
        validates: whether the fits validate; without validation no fit logs metrics of it.
        findings: receives the faults and doubts.
    """

    stage: str
    key: str
    callbacks: Sequence[object]
    metrics: StageMetrics
    validates: bool
    findings: Findings

    def check(self) -> None:
        """Find monitors that the fits do not log; Lightning would stop the fit after its first epoch."""
        for each in self.callbacks:
            if isinstance(each, EarlyStopping):
                self._check(each, each.monitor, each.strict)
            # Without validation, Lightning only warns that a ModelCheckpoint misses its metric.
            elif isinstance(each, ModelCheckpoint) and each.monitor and each.save_top_k != 0 and self.validates:
                self._check(each, each.monitor, True)
        scheduler = _scheduler(self.metrics.schedule)
        if (monitor := plateau_monitor(scheduler)) is not None:
            key = "model.schedule" if self.stage == "finetune" else f"{self.stage}.schedule"
            self._check(scheduler, monitor, True, key)

    def _check(self, who: object, monitor: str, strict: bool, key: str | None = None) -> None:
        key = key or f"{self.key}.callbacks"
        if isinstance(who, ModelCheckpoint) and monitor in ("epoch", "step"):
            return  # Lightning adds these two for every ModelCheckpoint
        if monitor.startswith("lr-") and any(isinstance(each, LearningRateMonitor) for each in self.callbacks):
            return  # it adds the learning rates to the metrics
        logged = {fit: self._logged(names) for fit, names in self.metrics.of_fits.items()}
        missing = [fit for fit, names in logged.items() if monitor not in names]
        if not missing:
            return
        where = "" if len(missing) == len(logged) else f" for {listed(missing)}"
        message = (
            f"{self.stage}: {type(who).__name__} in {key} monitors {monitor!r}, but this stage "
            f"logs {', '.join(logged[missing[0]])}{where}"
        )
        if others := self._who_may_log(who):
            self.findings.doubt(f"{message}, unless {' or '.join(others)} logs it")
        elif not strict:
            self.findings.doubt(f"{message}: it has no effect; monitor one of these")
        else:
            own = f"; or set {self.stage}.trainer.callbacks, which replaces trainer.callbacks in this stage"
            self.findings.fault(f"{message}; monitor one of these{own if key == 'trainer.callbacks' else ''}")

    def _logged(self, names: Sequence[str]) -> list[str]:
        return sorted(name for name in names if self.validates or not name.startswith("val/"))

    def _who_may_log(self, who: object) -> list[str]:
        """Names of the classes not known here that may log the metric: the module's, and other callbacks'."""
        kinds = [type(each) for each in self.callbacks if each is not who]
        unknown = [kind for kind in kinds if not kind.__module__.startswith("lightning.")]
        unknown += [self.metrics.may_log_more] if self.metrics.may_log_more else []
        return sorted({kind.__name__ for kind in unknown})
