"""The cache of pretrained backbones: a folder of finished pretrain stages, by their keys, that runs copy from."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from freemerge.pipeline.store.stage_folder import StageFolder, copy_file

_FILES = ("base.safetensors", "stage.json")


def find(stage: StageFolder, cache: Path) -> StageFolder | None:
    """Find a stage in the cache; None if it is not there.

    Args:
        stage: the pretrain stage of a run.
        cache: the cache's folder.
    """
    kept = _place(stage, cache)
    return kept if kept.record() is not None and (kept.path / "base.safetensors").is_file() else None


def store(stage: StageFolder, cache: Path) -> None:
    """Put a finished stage into the cache, atomically; an entry that another run has put there stays."""
    kept = _place(stage, cache)
    draft = kept.path.with_name(f".{kept.path.name}.{os.getpid()}.partial")
    draft.mkdir(parents=True)
    try:
        for name in _FILES:
            copy_file(stage.path / name, draft / name)
        os.replace(draft, kept.path)
    except OSError:
        if not kept.path.exists():
            raise
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _place(stage: StageFolder, cache: Path) -> StageFolder:
    return StageFolder(cache / stage.key[:16], stage.name, stage.inputs)
