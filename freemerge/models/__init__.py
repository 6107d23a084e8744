"""Backbones, the router, and FreeModel, which puts backbone, experts, router and heads together."""

from freemerge.models.backbones import Backbone, extract_features, load_backbone
from freemerge.models.batch_norm import batch_norms, reestimate_batch_norm
from freemerge.models.by_task import TaskModules
from freemerge.models.encoder import TransformersBackbone
from freemerge.models.free import FreeModel, FreeOutput, TaskModel
from freemerge.models.image_text import ImageTextBackbone
from freemerge.models.language import LanguageBackbone
from freemerge.models.modules import ModuleBackbone, TorchvisionBackbone
from freemerge.models.router import ConvRouter, EarlyRouter, Router, choose_thresholds, feature_width, make_router

__all__ = [
    "Backbone",
    "ConvRouter",
    "EarlyRouter",
    "FreeModel",
    "FreeOutput",
    "ImageTextBackbone",
    "LanguageBackbone",
    "ModuleBackbone",
    "Router",
    "TaskModel",
    "TaskModules",
    "TorchvisionBackbone",
    "TransformersBackbone",
    "batch_norms",
    "choose_thresholds",
    "extract_features",
    "feature_width",
    "load_backbone",
    "make_router",
    "reestimate_batch_norm",
]
