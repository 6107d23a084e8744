"""The suite's pipeline: stages, their folders, and what they can be told."""

from freemerge.pipeline.folder import from_rank_zero
from freemerge.pipeline.others import Others
from freemerge.pipeline.run import SuiteRun
from freemerge.pipeline.settings import (
    STAGES,
    ExpertsSettings,
    FinetuneSettings,
    MergeSettings,
    PretrainSettings,
    RouterSettings,
    RunSettings,
    Settings,
    TuneSettings,
)

__all__ = [
    "STAGES",
    "ExpertsSettings",
    "FinetuneSettings",
    "MergeSettings",
    "Others",
    "PretrainSettings",
    "RouterSettings",
    "RunSettings",
    "Settings",
    "SuiteRun",
    "TuneSettings",
    "from_rank_zero",
]
