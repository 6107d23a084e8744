"""Backbones, one kind per file; `base` has their common class."""

from freemerge.models.backbones.base import Backbone, extract_features, load_backbone
from freemerge.models.backbones.encoder import TransformersBackbone
from freemerge.models.backbones.image_text import ImageTextBackbone
from freemerge.models.backbones.language import LanguageBackbone
from freemerge.models.backbones.modules import ModuleBackbone, TorchvisionBackbone

__all__ = [
    "Backbone",
    "ImageTextBackbone",
    "LanguageBackbone",
    "ModuleBackbone",
    "TorchvisionBackbone",
    "TransformersBackbone",
    "extract_features",
    "load_backbone",
]
