"""A model being written: a hidden folder beside the output, moved into place atomically when it is complete.

- Every value's position is fixed from the start, so any thread and process can write values in any order.
- Disk space is allocated first, so that a full disk is reported before the work starts.
- A journal records which tensors are safely on disk, so that an interrupted draft can be resumed.
- Finally, files are verified, synced and moved into place; an existing folder is exchanged with the new one atomically
  where the platform supports it (Linux), so that even a kill leaves either the old or the new one.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import os
import shutil
import threading
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from freemerge.checkpoints.checkpoint import TensorSpec
from freemerge.checkpoints.formats.safetensors_files import (
    Layout,
    SafetensorsFile,
    lay_out,
    make_public,
    sync_folder,
    tensor_bytes,
)
from freemerge.checkpoints.places import landing
from freemerge.checkpoints.writing.checksums import add_up, write_sums
from freemerge.errors import CheckpointError

_NOTED = 1 << 28  # bytes written between two syncs
_PLAN = ".plan.json"
_DONE = ".done-"


class Draft:
    """The files of a model that is being written.

    Args:
        place: the file or folder to create; a link is followed.
        shards: file name → specs of its tensors; if `place` is a file, a single one with its name. A file in a
            subfolder (`2_Dense/model.safetensors`) stores its tensors without the subfolder's name.
        tied: omitted name → stored name, of tensors that share their memory.
        writer: the rank of this process among the writers; the first must have called `begin`.

    Attributes:
        finished: names of the tensors that an earlier writer of this draft had finished.
    """

    def __init__(
        self,
        place: Path,
        shards: Mapping[str, Mapping[str, TensorSpec]],
        tied: Mapping[str, str] | None = None,
        writer: int = 0,
    ) -> None:
        self.place = place = landing(place)
        self.folder = place.with_name(f".{place.name}.partial")
        self.finished: set[str] = set()
        self._shards = {file: dict(specs) for file, specs in shards.items()}
        self._file_of = {name: file for file, specs in shards.items() for name in specs}
        self._layouts: dict[str, Layout] = {}
        for file, specs in self._shards.items():
            own = {_inside(file, name): _inside(file, first) for name, first in (tied or {}).items() if first in specs}
            self._layouts[file] = lay_out(place, {_inside(file, name): spec for name, spec in specs.items()}, tied=own)
        self._writer = writer
        self._handles: dict[str, int] = {}
        self._lock_handle: int | None = None
        self._missing: dict[str, int] = {}  # number of values still missing of partly written tensors
        self._sums: dict[str, int] = {}  # checksums of the bytes written so far; see `add_up`
        self._unnoted: list[str] = []
        self._unnoted_bytes = 0
        self._lock = threading.Lock()

    # -- by the first writer only -------------------------------------------------------------------------------------

    def begin(self, key: str, resume: bool = False) -> None:
        """Create the folder and its files.

        Args:
            key: identifies everything that the contents depend on.
            resume: continue an interrupted draft with the same key; otherwise an interrupted draft is removed.

        Raises:
            CheckpointError: the disk is full, another process is writing this model, or the interrupted draft has
                another key.
        """
        try:
            self.place.parent.mkdir(parents=True, exist_ok=True)
            if self.folder.is_symlink():  # a link does not lead to a draft of ours
                self.folder.unlink()
            with contextlib.suppress(FileExistsError):
                self.folder.mkdir()
            self._claim()
            plan = self._read_plan()
            if resume and plan is not None and plan != key:
                raise CheckpointError(
                    f"{self.folder}: an interrupted merge with other inputs or parameters, which these cannot resume; "
                    "merge without resume to start again"
                )
            if not (resume and plan == key):
                self._clear()
                for file, layout in self._layouts.items():
                    self._create(self._beside(file), layout)
                (self.folder / _PLAN).write_text(json.dumps(key), encoding="utf-8")
            make_public(self.folder, 0o777)
        except OSError as error:
            self.discard()
            raise self._unwritable(error) from None
        except CheckpointError:  # the existing folder belongs to another process
            self.close()
            raise

    def copy(self, files: Mapping[str, Path]) -> None:
        """Copy files beside the weights, without reading them into memory as a whole.

        Args:
            files: name in the folder, with `/` → the file.

        Raises:
            CheckpointError: the disk is full, or a file cannot be read.
        """
        try:
            sizes = {source: source.stat().st_size for source in files.values()}
            free = shutil.disk_usage(self.folder).free
            if sum(sizes.values()) > free:
                largest = max(sizes, key=sizes.__getitem__)
                raise CheckpointError(
                    f"{self.place}: the files beside the base's weights take {sum(sizes.values()) / 1e9:,.1f} GB "
                    f"({largest} {sizes[largest] / 1e9:,.1f} GB) and {free / 1e9:,.1f} GB are free; move away files "
                    "that do not belong to the model, or choose another output"
                )
            for name, source in files.items():
                _copy(source, self._beside(name))
        except OSError as error:
            raise self._unwritable(error) from None

    def commit(self, files: Mapping[str, bytes] | None = None) -> None:
        """Verify the files of all writers and move them into place.

        Args:
            files: contents of the folder's small files by relative path; None for a single file.

        Raises:
            CheckpointError: the written files do not read back, or cannot be moved.
            ValueError: a tensor was not finished.
        """
        sums = self._noted()
        if missing := sorted(self._file_of.keys() - sums.keys()):
            raise ValueError(f"{self.place}: the tensor '{missing[0]}' was not written")
        self.close_files()
        try:
            for file, specs in self._shards.items():
                layout = self._layouts[file]
                with (self.folder / file).open("r+b") as weights:
                    weights.seek(layout.sums)
                    full = {_inside(file, name): name for name in specs}
                    weights.write(write_sums(sums[full[name]] for name in layout.places))
                    weights.flush()
                    os.fsync(weights.fileno())
                if SafetensorsFile(self.folder / file).specs != {_inside(file, n): spec for n, spec in specs.items()}:
                    raise CheckpointError(f"{self.place}: the written file does not read back; is the disk full?")
            if files is None:
                os.replace(self.folder / self.place.name, self.place)
            else:
                for name, content in files.items():
                    with self._beside(name).open("wb") as companion:
                        companion.write(content)
                        companion.flush()
                        os.fsync(companion.fileno())
                for note in (*self.folder.glob(f"{_DONE}*"), self.folder / _PLAN):
                    note.unlink()
                for folder in {self.folder, *(self._beside(name).parent for name in (*files, *self._shards))}:
                    sync_folder(folder)
                _put(self.folder, self.place)
            sync_folder(self.place.parent)
        except OSError as error:
            raise self._unwritable(error) from None
        self.discard()

    def discard(self) -> None:
        """Remove the folder and everything in it."""
        self.close()
        shutil.rmtree(self.folder, ignore_errors=True)

    # -- by every writer ----------------------------------------------------------------------------------------------

    def open(self) -> None:
        """Load the journal of finished tensors."""
        self.finished = set(self._noted())

    def write(self, name: str, start: int, values: Tensor) -> None:
        """Write a chunk of a tensor's values; may be called from any thread.

        Args:
            name: the tensor.
            start: position of the first value in row-major order.
            values: any shape, in the tensor's dtype.

        Raises:
            CheckpointError: the file cannot be written.
            ValueError: the chunk is not part of this tensor, or its values were written twice.
        """
        spec = self._shards[self._file_of[name]][name]
        total = torch.Size(spec.shape).numel()
        if values.dtype != spec.dtype or start + values.numel() > total:
            raise ValueError(f"{self.place}: the tensor '{name}' is {spec}, got {values.numel()} × {values.dtype}")
        file = self._file_of[name]
        begin = self._layouts[file].places[_inside(file, name)][0] + start * spec.dtype.itemsize
        data = tensor_bytes(values)
        part = add_up(data, start * spec.dtype.itemsize)
        try:
            if len(data):
                _write_at(self._handle(file), memoryview(data), begin)
            with self._lock:
                self._sums[name] = self._sums.get(name, 0) + part
                missing = self._missing.get(name, total) - values.numel()
                self._missing[name] = missing
                if missing < 0:
                    raise ValueError(f"{self.place}: values of the tensor '{name}' were written twice")
                if missing == 0:
                    self._unnoted.append(name)
                self._unnoted_bytes += values.numel() * spec.dtype.itemsize
                due = self._unnoted_bytes >= _NOTED
            if due:
                self._note()
        except OSError as error:
            raise self._unwritable(error) from None

    def flush(self) -> None:
        """Sync everything that this process wrote to disk, and record it in the journal."""
        try:
            self._note()
        except OSError as error:
            raise self._unwritable(error) from None

    def close(self) -> None:
        """Close the files without removing them."""
        self.close_files()
        if self._lock_handle is not None:
            os.close(self._lock_handle)
            self._lock_handle = None

    # -----------------------------------------------------------------------------------------------------------------

    def _claim(self) -> None:
        """Lock the folder until it is released or this process ends."""
        if os.name != "posix":
            return
        import fcntl

        handle = os.open(self.folder, os.O_RDONLY)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(handle)
            raise CheckpointError(
                f"{self.place}: another process is writing it now; wait for it, or choose another output"
            ) from None
        except OSError:  # the file system does not support locks
            os.close(handle)
            return
        self._lock_handle = handle

    def _clear(self) -> None:
        for path in self.folder.iterdir():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()

    def _beside(self, name: str) -> Path:
        """The path of a file in or below the folder; creates its parent."""
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def _create(self, path: Path, layout: Layout) -> None:
        with path.open("wb") as file:
            file.write(layout.head)
            file.flush()
            try:
                os.posix_fallocate(file.fileno(), 0, layout.size)
            except (AttributeError, OSError) as error:
                if isinstance(error, OSError) and error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
                    raise
                file.truncate(layout.size)

    def _read_plan(self) -> str | None:
        try:
            return json.loads((self.folder / _PLAN).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None

    def _noted(self) -> dict[str, int]:
        """The finished tensors and their checksums."""
        sums: dict[str, int] = {}
        for path in self.folder.glob(f"{_DONE}*"):
            # A last line that was cut short by a kill is ignored.
            sums.update(json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1])
        return sums

    def _note(self) -> None:
        with self._lock:
            names, self._unnoted, self._unnoted_bytes = self._unnoted, [], 0
            handles = [self._handles[file] for file in {self._file_of[name] for name in names} if file in self._handles]
        for handle in handles:
            getattr(os, "fdatasync", os.fsync)(handle)
        with self._lock, (self.folder / f"{_DONE}{self._writer}").open("a", encoding="utf-8") as file:
            file.write("".join(f"{json.dumps([name, self._sums[name]])}\n" for name in names))
            file.flush()
            os.fsync(file.fileno())

    def _handle(self, file: str) -> int:
        with self._lock:
            if file not in self._handles:
                self._handles[file] = os.open(self.folder / file, os.O_WRONLY | getattr(os, "O_BINARY", 0))
            return self._handles[file]

    def close_files(self) -> None:
        """Close the weight files before they are moved."""
        with self._lock:
            for handle in self._handles.values():
                os.close(handle)
            self._handles.clear()

    def _unwritable(self, error: OSError) -> CheckpointError:
        return CheckpointError(f"{self.place}: cannot be written: {error.strerror or error}")


def _inside(file: str, name: str) -> str:
    """The name under which a file stores a tensor: a file in a subfolder omits the subfolder's name."""
    folder, slash, _ = file.rpartition("/")
    return name.removeprefix(folder + slash)


def _copy(source: Path, target: Path) -> None:
    try:
        reading = source.open("rb")
    except OSError as error:
        raise CheckpointError(f"{source}: cannot be copied: {error.strerror or error}") from None
    with reading, target.open("wb") as file:
        shutil.copyfileobj(reading, file, 1 << 20)
        file.flush()
        os.fsync(file.fileno())


def _write_at(handle: int, data: memoryview, position: int) -> None:
    while data:  # a single write takes at most 2 GiB
        count = os.pwrite(handle, data, position)
        data, position = data[count:], position + count


def _put(temporary: Path, path: Path) -> None:
    """Move the new folder into place; an existing folder is then at `temporary`."""
    if not path.exists():
        temporary.rename(path)
    elif not _exchange(temporary, path):
        # The platform cannot exchange two folders: for a moment `place` is missing, but both folders exist beside it.
        old = temporary.with_suffix(".old")
        path.rename(old)
        temporary.rename(path)
        shutil.rmtree(old, ignore_errors=True)


def _exchange(first: Path, second: Path) -> bool:
    """Exchange two folders atomically; False if the system cannot."""
    at_working_directory, exchange = -100, 2
    with contextlib.suppress(OSError, AttributeError):
        call = ctypes.CDLL(None, use_errno=True).renameat2
        names = [os.fsencode(path) for path in (first, second)]
        return call(at_working_directory, names[0], at_working_directory, names[1], ctypes.c_uint(exchange)) == 0
    return False
