"""Old module names of version 0.1 and their current ones, so that saved configurations and checkpoints keep working.

The finder handles only the names below and returns the module of the current name.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

_MOVED = {
    "checkpoints.adapters": "checkpoints.formats.adapters",
    "checkpoints.bases": "checkpoints.base_hashes",
    "checkpoints.checksums": "checkpoints.writing.checksums",
    "checkpoints.distributed_files": "checkpoints.formats.distributed_files",
    "checkpoints.draft": "checkpoints.writing.draft",
    "checkpoints.errors": "errors",
    "checkpoints.folder": "checkpoints.writing.folder",
    "checkpoints.index": "checkpoints.formats.index",
    "checkpoints.inert": "checkpoints.formats.inert",
    "checkpoints.pages": "runtime.pages",
    "checkpoints.precision": "tensors.precision",
    "checkpoints.reading": "runtime.reading",
    "checkpoints.safetensors_files": "checkpoints.formats.safetensors_files",
    "checkpoints.safetensors_header": "checkpoints.formats.safetensors_header",
    "checkpoints.saving": "checkpoints.writing.saving",
    "checkpoints.task_files": "checkpoints.formats.task_files",
    "checkpoints.ties": "checkpoints.tied_tensors",
    "checkpoints.torch_files": "checkpoints.formats.torch_files",
    "data.canvas": "quickstart.canvas",
    "data.glyphs": "quickstart.glyphs",
    "data.photographs": "quickstart.photographs",
    "data.quickstart": "quickstart.suite",
    "data.quickstart_glyphs": "quickstart.glyph_tasks",
    "data.quickstart_pictures": "quickstart.image_tasks",
    "data.quickstart_pretraining": "quickstart.pretraining",
    "distributed": "runtime.process_group",
    "experts.exclusive": "experts.running.locks",
    "experts.expert": "experts.base",
    "experts.layerwise": "experts.running.layerwise",
    "experts.low_rank": "experts.kinds.low_rank",
    "experts.masked": "experts.kinds.masked",
    "experts.side_by_side": "experts.running.one_pass",
    "experts.sparse": "experts.kinds.sparse",
    "experts.switch": "experts.running.switch",
    "experts.ties": "experts.tied",
    "merging.adapter_output": "merging.engine.adapter_output",
    "merging.agreement": "merging.folders.agreement",
    "merging.alignment": "merging.matching.alignment",
    "merging.bases": "merging.checks.bases",
    "merging.brackets": "tensors.brackets",
    "merging.breadcrumbs": "merging.methods.breadcrumbs",
    "merging.candidates": "merging.engine.search",
    "merging.companions": "merging.folders.choice",
    "merging.complex_weights": "merging.checks.complex_weights",
    "merging.configuration": "merging.folders.configuration",
    "merging.dare": "merging.methods.dare",
    "merging.emr_merging": "merging.methods.emr",
    "merging.errors": "errors",
    "merging.fields": "merging.methods.parameters",
    "merging.filters": "merging.methods.filters",
    "merging.forecast": "merging.engine.estimate",
    "merging.fr_merging": "merging.methods.fr",
    "merging.heap": "runtime.heap",
    "merging.iso_c": "merging.methods.iso_c",
    "merging.low_rank": "tensors.low_rank",
    "merging.merging": "merging.engine.executor",
    "merging.method": "merging.methods.base",
    "merging.misfits": "merging.matching.misfits",
    "merging.parts": "merging.folders.parts",
    "merging.patterns": "tensors.patterns",
    "merging.pcb_merging": "merging.methods.pcb",
    "merging.per_pattern": "merging.methods.per_pattern",
    "merging.plan": "merging.engine.plan",
    "merging.processes": "runtime.processes",
    "merging.provenance": "merging.engine.record",
    "merging.quantized": "merging.checks.quantized",
    "merging.ranks": "tensors.order_statistics",
    "merging.rounding": "tensors.rounding",
    "merging.scaling": "merging.methods.scales",
    "merging.spectra": "tensors.spectra",
    "merging.streaming": "tensors.chunks",
    "merging.task_arithmetic": "merging.methods.task_arithmetic",
    "merging.threads": "runtime.threads",
    "merging.tied_weights": "merging.matching.tied_weights",
    "merging.ties": "merging.methods.ties",
    "merging.transfer": "runtime.device_copies",
    "merging.tsv_merge": "merging.methods.tsv",
    "merging.vectors": "merging.task_vectors",
    "merging.vocabulary": "merging.matching.vocabulary",
    "merging.weight_average": "merging.methods.weight_average",
    "models.encoder": "models.backbones.encoder",
    "models.familiarity": "models.out_of_distribution",
    "models.free": "models.free_model",
    "models.hugging_face": "models.backbones.hugging_face",
    "models.image_text": "models.backbones.image_text",
    "models.language": "models.backbones.language",
    "models.modules": "models.backbones.modules",
    "models.router": "models.routers",
    "pipeline.artifacts": "pipeline.store.artifacts",
    "pipeline.cache": "pipeline.store.cache",
    "pipeline.contents": "pipeline.store.contents",
    "pipeline.folder": "pipeline.store.stage_folder",
    "pipeline.held_out": "pipeline.stages.held_out",
    "pipeline.lock": "pipeline.store.lock",
    "pipeline.plan": "pipeline.store.replacing",
    "pipeline.tune": "pipeline.stages.tune",
    "quickstart.picture_tasks": "quickstart.image_tasks",
}

# (module, name) of what has moved or been renamed → its current module and name.
_MOVED_NAMES = {
    ("freemerge.data", "QuickstartSuite"): ("freemerge.quickstart", "QuickstartSuite"),
    ("freemerge.experts", "KeptWeights"): ("freemerge.experts", "WeightCache"),
    ("freemerge.experts", "forget_twins"): ("freemerge.experts", "drop_replicas"),
    ("freemerge.experts", "private"): ("freemerge.experts", "workspace"),
    ("freemerge.models.out_of_distribution", "Familiarity"): (
        "freemerge.models.out_of_distribution",
        "OutOfDistributionScore",
    ),
}


class _Finder(MetaPathFinder, Loader):
    """Resolves an old module name to the module of the current name."""

    def find_spec(self, fullname: str, path: object = None, target: object = None) -> ModuleSpec | None:
        room, _, name = fullname.partition(".")
        return ModuleSpec(fullname, self) if room == "freemerge" and _new_name(name) else None

    def create_module(self, spec: ModuleSpec) -> None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        name = module.__name__
        sys.modules[name] = import_module(f"freemerge.{_new_name(name.partition('.')[2])}")


def _new_name(name: str) -> str | None:
    """The current name of a module, or of a module in a package that moved as a whole; None if it has not moved."""
    inner = ""
    while name:
        if name in _MOVED:
            return _MOVED[name] + inner
        name, _, last = name.rpartition(".")
        inner = f".{last}{inner}"
    return None


def names_that_moved(room: str) -> Callable[[str], Any]:
    """A module's `__getattr__`, which resolves names that the module once had to what they are called now.

    Args:
        room: the module's dotted name.
    """

    def find(name: str) -> Any:
        if (room, name) not in _MOVED_NAMES:
            raise AttributeError(f"module {room!r} has no attribute {name!r}")
        home, current = _MOVED_NAMES[room, name]
        return getattr(import_module(home), current)

    return find


def install() -> None:
    """Make the old names importable; installs the finder once per process."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        # first, or the regular finder would load modules of a moved package a second time
        sys.meta_path.insert(0, _Finder())
