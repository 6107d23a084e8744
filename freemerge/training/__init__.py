"""LightningModules: FineTuner trains task vectors, ExpertTrainer trains experts, RouterTrainer trains the router."""

from freemerge.training.adapters import fused_weights, plain_names
from freemerge.training.distillation import Distillation
from freemerge.training.experts import ExpertTrainer, check_mixup
from freemerge.training.finetuner import FineTuner
from freemerge.training.objectives import Objective
from freemerge.training.optimization import Schedule, plateau_monitor
from freemerge.training.probe import fit_probe, fit_regression_probe
from freemerge.training.resume import BestCheckpoint, EpochStart, Interrupted, ResumeCheckpoint, stopped_by_ctrl_c
from freemerge.training.router import RouterTrainer

__all__ = [
    "BestCheckpoint",
    "Distillation",
    "EpochStart",
    "ExpertTrainer",
    "FineTuner",
    "Interrupted",
    "Objective",
    "ResumeCheckpoint",
    "RouterTrainer",
    "Schedule",
    "check_mixup",
    "fit_probe",
    "fit_regression_probe",
    "fused_weights",
    "plain_names",
    "plateau_monitor",
    "stopped_by_ctrl_c",
]
