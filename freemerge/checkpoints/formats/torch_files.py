"""Files of `torch.save`, read without running code in them: state dicts (.pt, .pth, .bin) and Lightning's .ckpt."""

from __future__ import annotations

import pickle
import threading
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from freemerge.checkpoints.checkpoint import Checkpoint
from freemerge.checkpoints.formats import inert
from freemerge.checkpoints.formats.index import Index
from freemerge.checkpoints.formats.inert import Inert
from freemerge.checkpoints.memory import from_tensors
from freemerge.checkpoints.tied_tensors import find_left_out
from freemerge.errors import CheckpointError

_AT_A_TIME = 1 << 22  # bytes

NESTED = ("state_dict", "model_state_dict", "model", "module")  # keys under which training frameworks store the weights


def open_torch(paths: list[Path], label: str, index: Index | None = None) -> Checkpoint:
    """Open the tensors of one or several `torch.save` files as one checkpoint.

    The tensors stay in the file (memory-mapped) unless it has the format used before torch 1.6. Objects of other
    classes beside the state dict (hyperparameters, callbacks) are skipped; see `inert`.

    Args:
        paths: the file, or all shards.
        label: the model's name in messages.
        index: of the shards, to compare them with.

    Raises:
        CheckpointError: a file is missing, broken, or holds no state dict; two shards hold the same tensor, or the
            index does not fit.
    """
    tensors: dict[str, Tensor] = {}
    place: dict[str, Path] = {}
    for path in paths:
        for name, tensor in _state_dict(_load(path), path).items():
            if name in place:
                raise CheckpointError(f"{path}: the tensor '{name}' is also in {place[name]}; keep one of them")
            place[name], tensors[name] = path, tensor
    if index is not None:
        missing = [name for name in index.files if name not in place]
        tied = find_left_out(index.path.parent, missing, place) if missing else {}
        index.check(place, tied)
        return _checked(from_tensors(tensors, label).tying(tied), place)
    return _checked(from_tensors(tensors, label), place)


def _checked(checkpoint: Checkpoint, place: Mapping[str, Path]) -> Checkpoint:
    """The same tensors; the checksums of a file are verified before its first value is read."""
    sums = {path: _Sums(path) for path in dict.fromkeys(place.values())}

    def check(name: str) -> None:
        if name in place:
            sums[place[name]].check()

    return checkpoint.after(check)


def _load(path: Path) -> object:
    try:
        with path.open("rb") as file:
            zipped = file.read(4) == b"PK\x03\x04"
        if zipped:
            _check_records(path)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from None
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except Exception as error:  # torch raises different errors depending on where a file is broken
        if isinstance(error, pickle.UnpicklingError) and "weights" in str(error).lower():
            return _load_past_objects(path, zipped)
        raise _broken(path) from None


def _load_past_objects(path: Path, zipped: bool) -> object:
    """Load a file with objects beside its tensors; they become `Inert`."""
    if not zipped:
        raise CheckpointError(
            f"{path}: holds Python objects besides tensors, in the format used before torch 1.6, and loading them "
            "could run code; save its state dict alone, best as .safetensors"
        )
    try:
        return torch.load(path, map_location="cpu", weights_only=False, pickle_module=inert, mmap=True)
    except Exception:
        raise _broken(path) from None


def _broken(path: Path) -> CheckpointError:
    return CheckpointError(f"{path}: truncated or not a torch file; copy or download it again")


def _check_records(path: Path) -> None:
    """Refuse an archive with compressed records, which could need far more memory than the file has bytes.

    Raises:
        CheckpointError: a record is compressed, as `torch.save` never writes it, or the archive is broken.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            packed = next((info for info in archive.infolist() if info.compress_type != zipfile.ZIP_STORED), None)
    # a broken archive raises different errors: as an archive, for a number, or for an undecodable name
    except Exception:
        raise _broken(path) from None
    if packed is not None:
        raise CheckpointError(
            f"{path}: its record '{packed.filename}' is compressed, as torch.save never writes it; unpack the archive, "
            "or load it with torch where you trust it, and save it again"
        )


class _Sums:
    """The CRC-32 checksums of a torch file's records, verified once, when its first value is read.

    Args:
        path: the file.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._checked = False

    def check(self) -> None:
        """Raise a CheckpointError if a record is damaged; files older than torch 1.6 have no checksums."""
        with self._lock:
            if not self._checked and zipfile.is_zipfile(self._path):
                self._compare()
            self._checked = True

    def _compare(self) -> None:
        with zipfile.ZipFile(self._path) as archive:
            for info in archive.infolist():
                if info.CRC == 0:  # written without CRC-32: torch.serialization.set_crc32_options(False)
                    continue
                try:
                    with archive.open(info) as record:  # zipfile verifies it when the record is read to its end
                        while record.read(_AT_A_TIME):
                            pass
                except Exception:  # the checksum, or the local header of the record
                    raise CheckpointError(
                        f"{self._path}: its record '{info.filename}' is damaged (its CRC-32 is another); copy or "
                        "download the file again"
                    ) from None


def _state_dict(loaded: object, path: Path) -> dict[str, Tensor]:
    if isinstance(loaded, Mapping):
        table: Mapping[Any, Any] = next((loaded[key] for key in NESTED if isinstance(loaded.get(key), Mapping)), loaded)
        # Modules may store other kinds of state (`_extra_state`) beside their tensors; only tensors can be merged.
        tensors = {name: value for name, value in table.items() if isinstance(value, Tensor)}
        if tensors and all(isinstance(name, str) for name in tensors):
            for name, value in table.items():
                if isinstance(value, Inert) and not str(name).endswith("_extra_state"):
                    raise CheckpointError(
                        f"{path}: holds Python objects besides tensors in its state dict ('{name}'), which may be "
                        "weights, and loading them could run code; save its state dict as plain tensors, best as "
                        ".safetensors"
                    )
            return tensors
        found = ", ".join(str(key) for key in list(table)[:8]) or "nothing"
    else:
        found = f"a {type(loaded).__name__}"
    raise CheckpointError(f"{path}: holds no state dict (found: {found}); save model.state_dict()")
