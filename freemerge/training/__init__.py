"""LightningModules: FineTuner makes task vectors, ExpertTrainer experts, RouterTrainer the router."""

from freemerge.training.adapters import fused_weights, plain_names
from freemerge.training.distillation import Distillation
from freemerge.training.experts import ExpertTrainer
from freemerge.training.finetuner import FineTuner
from freemerge.training.objectives import Objective
from freemerge.training.probe import fit_probe, fit_regression_probe
from freemerge.training.router import RouterTrainer

__all__ = [
    "Distillation",
    "ExpertTrainer",
    "FineTuner",
    "Objective",
    "RouterTrainer",
    "fit_probe",
    "fit_regression_probe",
    "fused_weights",
    "plain_names",
]
