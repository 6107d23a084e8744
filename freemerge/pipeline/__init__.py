"""The suite's pipeline: its stages, their folders and their settings."""

from freemerge.pipeline.checks import CheckError
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
from freemerge.pipeline.store.contents import content_hash
from freemerge.pipeline.store.stage_folder import from_rank_zero

__all__ = [
    "STAGES",
    "CheckError",
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
    "content_hash",
    "from_rank_zero",
]
