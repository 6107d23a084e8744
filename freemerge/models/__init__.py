"""Backbones, the router, and FreeModel, which puts backbone, experts, router and heads together."""

from freemerge.models.backbones import Backbone, TransformersBackbone, extract_features
from freemerge.models.free import FreeModel, FreeOutput, TaskModel
from freemerge.models.router import ConvRouter, EarlyRouter, Router, choose_threshold, feature_width, make_router

__all__ = [
    "Backbone",
    "ConvRouter",
    "EarlyRouter",
    "FreeModel",
    "FreeOutput",
    "Router",
    "TaskModel",
    "TransformersBackbone",
    "choose_threshold",
    "extract_features",
    "feature_width",
    "make_router",
]
