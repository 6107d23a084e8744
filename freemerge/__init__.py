"""freemerge: fine-tune one backbone on several tasks, merge the task vectors, restore losses with lightweight experts.

The public names are loaded when they are first used, so that `import freemerge` and a merge of checkpoints start
without Lightning and transformers.
"""

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from freemerge import moved

if TYPE_CHECKING:
    from freemerge.data import Task as Task
    from freemerge.data import TaskSuite as TaskSuite
    from freemerge.experts import LowRankExpert as LowRankExpert
    from freemerge.experts import SparseExpert as SparseExpert
    from freemerge.experts import extract as extract
    from freemerge.experts import extract_low_rank as extract_low_rank
    from freemerge.merging import advise as advise
    from freemerge.merging import merge as merge
    from freemerge.models import FreeModel as FreeModel
    from freemerge.pipeline import SuiteRun as SuiteRun
    from freemerge.training import ExpertTrainer as ExpertTrainer
    from freemerge.training import FineTuner as FineTuner
    from freemerge.training import RouterTrainer as RouterTrainer

try:
    __version__ = version("freemerge")
except PackageNotFoundError:  # run from a source tree that is not installed
    __version__ = "0+unknown"

moved.install()

_HOMES = {
    "merge": "freemerge.merging",
    "advise": "freemerge.merging",
    "extract": "freemerge.experts",
    "extract_low_rank": "freemerge.experts",
    "LowRankExpert": "freemerge.experts",
    "SparseExpert": "freemerge.experts",
    "FreeModel": "freemerge.models",
    "Task": "freemerge.data",
    "TaskSuite": "freemerge.data",
    "SuiteRun": "freemerge.pipeline",
    "FineTuner": "freemerge.training",
    "ExpertTrainer": "freemerge.training",
    "RouterTrainer": "freemerge.training",
}

__all__ = ["__version__", *_HOMES]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'freemerge' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
