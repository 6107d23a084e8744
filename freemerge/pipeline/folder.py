"""Stage folders: what has been done, from what, and whether it can be skipped or resumed.

A stage's key is a hash of everything its result depends on, the keys of earlier stages included. `stage.json` with that
key is written last, so its presence means that the folder is whole. `started.json` with that key means that a fit was
interrupted there and may go on from its last checkpoint; with another key the folder is stale and is emptied.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from freemerge.distributed import in_process_group


def from_rank_zero(compute: Any) -> Any:
    """`compute()` on rank 0, its result on all ranks.

    Before the first fit has launched the other ranks, they do not exist, and when they start they run this code anew
    and find what rank 0 left behind; so without a process group each computes for itself.
    """
    if not in_process_group():
        return compute()
    box = [compute() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file atomically."""
    temporary = path.with_name(f".{path.name}.partial")
    temporary.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n")
    os.replace(temporary, path)


class StageFolder:
    """One stage of a run, and the folder its results are in.

    Args:
        path: the folder.
        name: what the stage is called in messages.
        inputs: everything the result depends on, as plain data.
    """

    def __init__(self, path: Path, name: str, inputs: Mapping[str, Any]) -> None:
        self.path = path
        self.name = name
        self.inputs = dict(inputs)
        canonical = json.dumps(self.inputs, sort_keys=True, ensure_ascii=False, default=str)
        self.key = hashlib.sha256(canonical.encode()).hexdigest()
        self._began = time.monotonic()

    @property
    def checkpoints(self) -> Path:
        """Where the stage's fit keeps its checkpoints."""
        return self.path / "checkpoints"

    def record(self) -> dict[str, Any] | None:
        """What `finish` recorded, if the stage is done; None if it is not, or was done from other inputs."""
        recorded = from_rank_zero(lambda: _read_json(self.path / "stage.json"))
        return recorded if recorded is not None and recorded["key"] == self.key else None

    def is_stale(self) -> bool:
        """Whether `begin` will empty the folder, as what it holds was made from other inputs."""
        current = self._current()
        return current is not None and current["key"] != self.key

    def _current(self) -> dict[str, Any] | None:
        """What says whose the folder is: the stage that began in it last."""
        return _read_json(self.path / "started.json") or _read_json(self.path / "stage.json")

    def begin(self, ckpt_path: str | None = None) -> Path | None:
        """Make the folder ready for the stage to be done in it.

        Args:
            ckpt_path: checkpoint that the caller wants to resume from.

        Returns:
            The checkpoint to resume from: `ckpt_path`, or the last one if this very stage was interrupted here.

        Raises:
            ValueError: if the folder holds something else, or `ckpt_path` lies in it and would be lost.
        """
        self._began = time.monotonic()
        resume = from_rank_zero(lambda: self._prepare(ckpt_path))
        return Path(resume) if resume else None

    def _prepare(self, ckpt_path: str | None) -> str | None:
        interrupted = (self.path / "started.json").exists()
        current = self._current()
        same = current is not None and current["key"] == self.key
        if rank_zero_only.rank == 0:
            if self.path.exists() and not same:
                if current is None and any(self.path.iterdir()):
                    raise ValueError(
                        f"{self.path}: holds files that no stage of a run made; choose another run.folder or move them"
                    )
                if ckpt_path is not None and self.path.resolve() in Path(ckpt_path).resolve().parents:
                    raise ValueError(f"{ckpt_path}: lies in {self.path}, which is about to be redone; move it first")
                shutil.rmtree(self.path)
            self.path.mkdir(parents=True, exist_ok=True)
            write_json(self.path / "started.json", {"key": self.key})
            (self.path / "stage.json").unlink(missing_ok=True)
        last = self.checkpoints / "last.ckpt"
        if ckpt_path is not None:
            return ckpt_path
        return str(last) if same and interrupted and last.exists() else None

    def finish(self, results: Mapping[str, Any]) -> dict[str, Any]:
        """Record that the stage is done; returns the record."""
        record = {
            "stage": self.name,
            "key": self.key,
            "seconds": round(time.monotonic() - self._began, 2),
            "results": dict(results),
            "inputs": self.inputs,
        }
        if rank_zero_only.rank == 0:
            write_json(self.path / "stage.json", record)
            (self.path / "started.json").unlink(missing_ok=True)
        if in_process_group():
            dist.barrier()  # nobody reads the results before they are complete
        return record


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return None
