"""Backbones, the router, and FreeModel, which puts backbone, experts, router and heads together."""

from freemerge.models.backbones import Backbone, extract_features, load_backbone
from freemerge.models.batch_norm import batch_norms, reestimate_batch_norm
from freemerge.models.encoder import TransformersBackbone
from freemerge.models.free import FreeModel, FreeOutput
from freemerge.models.image_text import ImageTextBackbone
from freemerge.models.language import LanguageBackbone
from freemerge.models.modules import ModuleBackbone, TorchvisionBackbone
from freemerge.models.router import Router

__all__ = [
    "Backbone",
    "FreeModel",
    "FreeOutput",
    "ImageTextBackbone",
    "LanguageBackbone",
    "ModuleBackbone",
    "Router",
    "TorchvisionBackbone",
    "TransformersBackbone",
    "batch_norms",
    "extract_features",
    "load_backbone",
    "reestimate_batch_norm",
]
