"""Backbones, the router, and FreeModel, which puts backbone, experts, router and heads together."""

from freemerge.models.backbones import Backbone, TransformersBackbone, extract_features
from freemerge.models.free import FreeModel, FreeOutput
from freemerge.models.router import Router

__all__ = ["Backbone", "FreeModel", "FreeOutput", "Router", "TransformersBackbone", "extract_features"]
