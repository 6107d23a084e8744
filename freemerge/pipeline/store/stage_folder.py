"""Stage folders: the results of a stage, with a record of its inputs, so that it can be skipped or resumed.

A stage's key is a hash of everything its result depends on: its settings, and the content of the files that it reads.
`stage.json` with that key is written last, so its presence means that the folder is whole. `started.json` with that key
means that a fit was interrupted there and may go on from its last checkpoint; with another key the folder is stale and
is emptied. The plan of the run decides before whether finished results may be emptied (`freemerge.pipeline.store.
replacing`).
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist

from freemerge.pipeline.ranks import is_first
from freemerge.pipeline.store.contents import content_hash
from freemerge.runtime.process_group import in_process_group

NOT_MADE = "not made yet"
"""The placeholder, in a stage's inputs, for a file that an earlier stage has not written yet."""


def from_rank_zero(compute: Any) -> Any:
    """`compute()` on rank 0, its result on all ranks, and so is a ValueError that it raises.

    Before the first fit has launched the other ranks, they do not exist, and when they start they run this code anew
    and find what rank 0 left behind; so without a process group each computes for itself.
    """
    if not in_process_group():
        return compute()
    box: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            box[0] = compute()
        except ValueError as error:
            box[1] = error
    dist.broadcast_object_list(box, src=0)
    if box[1] is not None:
        raise box[1]
    return box[0]


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file atomically."""
    temporary = path.with_name(f".{path.name}.partial")
    temporary.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def make_writable(folder: Path, setting: str) -> None:
    """Make a folder and test that it can be written, before any work is done.

    Args:
        folder: the folder.
        setting: its configuration key, for the message.

    Raises:
        ValueError: the folder cannot be made or written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(f"{folder}: cannot be written ({error.strerror}); choose another {setting}") from error


def copy_file(source: Path, target: Path) -> None:
    """Copy a file atomically, with its modification time, so that the cached hash of its content stays valid."""
    temporary = target.with_name(f".{target.name}.partial")
    shutil.copy2(source, temporary)
    os.replace(temporary, target)


class StageFolder:
    """One stage of a run, and the folder of its results.

    Args:
        path: the folder.
        name: name of the stage in messages.
        inputs: everything that the result depends on, as plain data.
        made_from: names of the stages whose files it reads.
    """

    def __init__(self, path: Path, name: str, inputs: Mapping[str, Any], made_from: tuple[str, ...] = ()) -> None:
        self.path = path
        self.name = name
        self.made_from = made_from
        canonical = json.dumps(dict(inputs), sort_keys=True, ensure_ascii=False, default=str)
        self.inputs = json.loads(canonical)  # as they will be read from `stage.json`
        self.key = hashlib.sha256(canonical.encode()).hexdigest()
        self._began = time.monotonic()

    @property
    def checkpoints(self) -> Path:
        """The folder of the fit's checkpoints."""
        return self.path / "checkpoints"

    @property
    def last_checkpoint(self) -> Path | None:
        """The checkpoint that an interrupted fit can resume from; None if there is none."""
        # A sharded checkpoint is a folder, which is replaced in two steps; in between only the previous one exists.
        for name in ("last.ckpt", "last.ckpt.before"):
            if (self.checkpoints / name).exists():
                return self.checkpoints / name
        return None

    def record(self) -> dict[str, Any] | None:
        """The record of `finish`; None if the stage is not finished, or was finished with other inputs."""
        return from_rank_zero(self._record)

    def _record(self) -> dict[str, Any] | None:
        recorded = self.finished()
        return recorded if recorded is not None and recorded["key"] == self.key else None

    def finished(self) -> dict[str, Any] | None:
        """The record of the finished stage, whatever its inputs; None if there is none or a result file is missing."""
        recorded = _read_json(self.path / "stage.json")
        if recorded is None or any(not (self.path / name).is_file() for name in recorded.get("files", {})):
            return None
        return recorded

    def begun(self) -> str | None:
        """The key of the fit that was interrupted here and has a checkpoint; None if there is none."""
        started = _read_json(self.path / "started.json")
        return started["key"] if started is not None and self.last_checkpoint is not None else None

    def is_stale(self) -> bool:
        """Whether `begin` will empty the folder, because its files were made from other inputs."""
        current = self._current()
        return current is not None and current["key"] != self.key

    def _current(self) -> dict[str, Any] | None:
        """The file that records which stage last began in the folder."""
        return _read_json(self.path / "started.json") or _read_json(self.path / "stage.json")

    def begin(self, ckpt_path: str | None = None) -> Path | None:
        """Prepare the folder for the stage.

        Args:
            ckpt_path: checkpoint that the caller wants to resume from.

        Returns:
            The checkpoint to resume from: `ckpt_path`, or the last one if a fit with the same key was interrupted here.

        Raises:
            ValueError: the folder holds other files, or `ckpt_path` lies in it and would be deleted.
        """
        self._began = time.monotonic()
        resume = from_rank_zero(lambda: self._prepare(ckpt_path))
        return Path(resume) if resume else None

    def _prepare(self, ckpt_path: str | None) -> str | None:
        interrupted = (self.path / "started.json").exists()
        current = self._current()
        same = current is not None and current["key"] == self.key
        if is_first():
            if self.path.exists() and not same:
                if current is None and any(not path.name.endswith(".partial") for path in self.path.iterdir()):
                    raise ValueError(
                        f"{self.path}: holds files that no stage of a run made; choose another run.folder or move them"
                    )
                if ckpt_path is not None and self.path.resolve() in Path(ckpt_path).resolve().parents:
                    raise ValueError(f"{ckpt_path}: lies in {self.path}, which is about to be redone; move it first")
                self._empty()
            self.path.mkdir(parents=True, exist_ok=True)
            write_json(self.path / "started.json", {"key": self.key})
            (self.path / "stage.json").unlink(missing_ok=True)
        if ckpt_path is not None:
            return ckpt_path
        last = self.last_checkpoint
        return str(last) if same and interrupted and last is not None else None

    def _empty(self) -> None:
        """Delete the folder; it is renamed first, so that an interruption leaves no half-empty folder."""
        aside = self.path.with_name(f".{self.path.name}.removed")
        shutil.rmtree(aside, ignore_errors=True)
        os.replace(self.path, aside)
        shutil.rmtree(aside)

    def finish(self, results: Mapping[str, Any]) -> dict[str, Any]:
        """Record that the stage is finished, with the hashes of its files.

        Args:
            results: values to record.

        Returns:
            The record.
        """
        record = {
            "stage": self.name,
            "key": self.key,
            "seconds": round(time.monotonic() - self._began, 2),
            "results": dict(results),
            "inputs": self.inputs,
        }
        if is_first():
            record["files"] = {path.name: _fingerprint(path) for path in sorted(self.path.glob("*.safetensors"))}
            write_json(self.path / "stage.json", record)
            (self.path / "started.json").unlink(missing_ok=True)
        if in_process_group():
            dist.barrier()  # no rank may read the results before they are complete
        return record


def content(path: Path) -> str:
    """SHA-256 of a file that a stage wrote, or `NOT_MADE`; the file is read only if its stage's record has no hash."""
    try:
        status = path.stat()
    except FileNotFoundError:
        return NOT_MADE
    known = (_read_json(path.with_name("stage.json")) or {}).get("files", {}).get(path.name)
    if known is not None and (known["bytes"], known["modified"]) == (status.st_size, status.st_mtime_ns):
        return known["sha256"]
    return content_hash(path)


def _fingerprint(path: Path) -> dict[str, Any]:
    status = path.stat()
    return {"sha256": content_hash(path), "bytes": status.st_size, "modified": status.st_mtime_ns}


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
