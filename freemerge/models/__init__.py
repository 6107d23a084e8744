"""Backbones, routers, and FreeModel, which combines a backbone, experts, a router and heads."""

from freemerge.models.answers import FreeAnswers
from freemerge.models.backbones.base import Backbone, extract_features, has_builtin_backbone, load_backbone
from freemerge.models.backbones.encoder import TransformersBackbone
from freemerge.models.backbones.image_text import ImageTextBackbone
from freemerge.models.backbones.language import LanguageBackbone
from freemerge.models.backbones.modules import ModuleBackbone, TorchvisionBackbone
from freemerge.models.batch_norm import batch_norms, reestimate_batch_norm
from freemerge.models.by_task import TaskModules
from freemerge.models.class_heads import CosineHead, prototypes
from freemerge.models.classes import instantiate_and_record
from freemerge.models.export import export_experts
from freemerge.models.free_folder import has_experts
from freemerge.models.free_model import FreeModel, FreeOutput, TaskModel
from freemerge.models.heads import head_from_state
from freemerge.models.routers import ConvRouter, EarlyRouter, Router, choose_thresholds, feature_width, make_router

__all__ = [
    "Backbone",
    "ConvRouter",
    "CosineHead",
    "EarlyRouter",
    "FreeAnswers",
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
    "export_experts",
    "extract_features",
    "feature_width",
    "has_builtin_backbone",
    "has_experts",
    "head_from_state",
    "instantiate_and_record",
    "load_backbone",
    "make_router",
    "prototypes",
    "reestimate_batch_norm",
]
