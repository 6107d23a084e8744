"""One file for each stage of a run."""

from collections.abc import Callable
from typing import Any

from freemerge.pipeline.context import RunContext
from freemerge.pipeline.stages.evaluate import evaluate
from freemerge.pipeline.stages.experts import experts
from freemerge.pipeline.stages.finetune import finetune
from freemerge.pipeline.stages.merge import merge_all
from freemerge.pipeline.stages.pretrain import pretrain
from freemerge.pipeline.stages.router import router

RUN_STAGE: dict[str, Callable[[RunContext], Any]] = {
    "pretrain": pretrain,
    "finetune": finetune,
    "merge": merge_all,
    "experts": experts,
    "router": router,
    "evaluate": evaluate,
}
