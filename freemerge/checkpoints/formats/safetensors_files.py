"""Safetensors files, read and written tensor by tensor.

- Plain reads into fresh memory instead of a memory map (so not the safetensors library's reader): the caller owns the
  tensors, only memory in use is resident, and several threads may read at once.
- The header is checked in full when a file is opened: a truncated download or a damaged header fails at once.
- Writing is atomic: a temporary sibling is written, synced, read back and renamed.
"""

from __future__ import annotations

import contextlib
import json
import os
import struct
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from freemerge.checkpoints.checkpoint import Checkpoint, TensorSpec
from freemerge.checkpoints.formats.index import Index
from freemerge.checkpoints.formats.safetensors_header import DIGEST, DTYPES, MARK, digest_table, parse_header
from freemerge.checkpoints.places import landing
from freemerge.checkpoints.tied_tensors import find_left_out
from freemerge.checkpoints.writing.checksums import KEY as SUMS
from freemerge.checkpoints.writing.checksums import add_up, read_sums, write_sums
from freemerge.errors import CheckpointError
from freemerge.runtime.reading import read_bytes

_CODES = {dtype: code for code, dtype in DTYPES.items()}
_TIED = "freemerge.tied"  # metadata: the omitted names, one a line, where they would be ambiguous
_MAX_HEADER = 100_000_000  # the format's limit


class SafetensorsFile:
    """The header of a safetensors file and a reader of its tensors.

    Args:
        path: the file.

    Raises:
        CheckpointError: the file is missing, truncated or not a safetensors file.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        try:
            with self.path.open("rb") as file:
                text, size = self._read_header(file)
        except OSError as error:
            raise CheckpointError(f"{self.path}: cannot be read: {error.strerror or error}") from None
        try:
            header = parse_header(text, size - 8 - len(text))
        except ValueError as error:
            raise self._corrupt(str(error)) from None
        self.specs, self.metadata = header.specs, header.metadata
        start = 8 + len(text)
        self._places = {name: (start + begin, start + stop) for name, (begin, stop) in header.places.items()}
        self.tied = self._read_tied()
        self._sums = read_sums(self.metadata.get(SUMS, ""), self.specs)
        self._seen: dict[str, tuple[int, int]] = {}  # name → number of bytes read in order so far, and their sum

    def _read_tied(self) -> dict[str, str]:
        """Omitted name → stored name, of tensors that share their memory.

        safetensors' convention is a metadata entry for each omitted name. Such an entry cannot be distinguished from
        other metadata that happens to equal a tensor's name; in that case, files written here also list the omitted
        names.
        """
        tied = _look_tied(self.metadata, self.specs)
        if _TIED in self.metadata:
            listed = set(self.metadata[_TIED].split("\n"))
            return {name: first for name, first in tied.items() if name in listed}
        return tied

    def _read_header(self, file) -> tuple[bytes, int]:
        """The header's text and the size of the whole file."""
        size = os.fstat(file.fileno()).st_size
        head = file.read(8)
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else 0
        if not 0 < length <= _MAX_HEADER:
            raise self._corrupt("it does not begin with a safetensors header")
        if 8 + length > size:
            raise self._corrupt(f"truncated: its header alone has {length:,} bytes and the file has {size:,}")
        return file.read(length), size

    def _corrupt(self, what: str) -> CheckpointError:
        if what.startswith("truncated"):
            return CheckpointError(f"{self.path}: {what}; copy or download it again")
        if what.endswith("not supported"):
            return CheckpointError(f"{self.path}: {what}; convert the file to bfloat16 or float32 first")
        return CheckpointError(f"{self.path}: truncated or not a safetensors file: {what}; copy or download it again")

    def read(self, name: str, run: tuple[int, int] | None = None) -> Tensor:
        """Read a tensor, or a chunk of its values as a 1-D tensor, into fresh memory.

        Raises:
            CheckpointError: the file vanished or was truncated since it was opened; or the checksum of a tensor, read
                whole or in consecutive chunks, does not match the file's.
        """
        spec, (first, last) = self.specs[name], self._places[name]
        begin, stop = first, last
        if run is not None:
            begin, stop = (first + position * spec.dtype.itemsize for position in run)
        data = read_bytes(self.path, begin, stop, name)
        if name in self._sums:
            self._check(name, data, begin - first, last - first)
        return data.view(spec.dtype).view(spec.shape if run is None else -1)

    def _check(self, name: str, data: Tensor, begin: int, size: int) -> None:
        """Verify the checksum of a tensor once all its bytes have been read in order; otherwise it is not checked.

        Args:
            name: of the tensor.
            data: a chunk of its bytes.
            begin: position of the first byte.
            size: number of bytes of the tensor.
        """
        seen, total = self._seen.pop(name, (0, 0)) if begin else (0, 0)
        if begin != seen:
            return
        total = (total + add_up(data.numpy(), begin)) % 2**64
        if begin + len(data) < size:
            self._seen[name] = (begin + len(data), total)
        elif total == self._sums.get(name, total):
            self._sums.pop(name, None)  # verified once per file
        else:
            raise CheckpointError(
                f"{self.path}: the values of the tensor '{name}' are not those that were written (their sum is "
                "another); copy or download the file again"
            )


def open_safetensors(paths: Iterable[Path], label: str, index: Index | None = None) -> Checkpoint:
    """Open the tensors of one or several safetensors files as one checkpoint.

    Args:
        paths: the file, or all shards.
        label: the model's name in messages.
        index: of the shards, to compare them with.

    Raises:
        CheckpointError: a file is missing or broken, two shards hold the same tensor, or the index does not fit.
    """
    place: dict[str, SafetensorsFile] = {}
    specs: dict[str, TensorSpec] = {}
    tied: dict[str, str] = {}
    metadata: dict[str, str] = {}
    for path in paths:
        file = SafetensorsFile(path)
        metadata |= file.metadata
        for name, spec in file.specs.items():
            if name in place:
                raise CheckpointError(f"{path}: the tensor '{name}' is also in {place[name].path}; keep one of them")
            place[name], specs[name] = file, spec
        tied.update(file.tied)
    if index is not None:
        missing = [name for name in index.files if name not in place and name not in tied]
        tied |= find_left_out(index.path.parent, missing, place) if missing else {}
        index.check({name: file.path for name, file in place.items()}, tied)
    tied = {name: first for name, first in tied.items() if name not in specs}
    return Checkpoint(label, specs, lambda name, run: place[name].read(name, run), tied=tied, metadata=metadata)


def write_safetensors(
    path: str | os.PathLike[str],
    specs: Mapping[str, TensorSpec],
    tensors: Iterable[tuple[str, Tensor]],
    metadata: Mapping[str, str] | None = None,
    tied: Mapping[str, str] | None = None,
) -> None:
    """Write a safetensors file from a stream of tensors, atomically.

    If it is interrupted (an error in the stream, a full disk, a kill), `path` is still the complete old file or already
    the complete new one.

    Args:
        path: the file to write; its folder is created. An existing file is replaced; for a link, its target is.
        specs: shape and dtype of every tensor to come.
        tensors: name and tensor for every entry of `specs`, in the order of `storage_order(specs)`.
        metadata: strings for the header.
        tied: omitted name → stored name, of tensors that share their memory.

    Raises:
        CheckpointError: a dtype that the format does not support, or a file that cannot be written.
        ValueError: the stream does not match `specs`.
    """
    path = landing(path)
    layout = lay_out(path, specs, metadata, tied)
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
        with os.fdopen(handle, "wb") as file:
            file.write(layout.head)
            sums = []
            for expected, (name, tensor) in zip(storage_order(specs), tensors, strict=True):
                if name != expected or TensorSpec(tuple(tensor.shape), tensor.dtype) != specs[name]:
                    raise ValueError(f"{path}: expected the tensor '{expected}' {specs[expected]}, got '{name}'")
                data = tensor_bytes(tensor)
                sums.append(add_up(data))
                if len(data):
                    file.write(memoryview(data))
            file.seek(layout.sums)
            file.write(write_sums(sums))
            file.flush()
            os.fsync(file.fileno())
        if SafetensorsFile(temporary).specs != dict(specs):
            raise CheckpointError(f"{path}: the written file does not read back; is the disk full?")
        make_public(temporary, 0o666)  # mkstemp creates private files
        os.replace(temporary, path)
        sync_folder(path.parent)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be written: {error.strerror or error}") from None
    finally:
        if temporary is not None:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary)


class Layout(NamedTuple):
    """The layout of a safetensors file."""

    head: bytes  # the bytes before the data
    places: dict[str, tuple[int, int]]  # name → position of its first byte in the file, and of the byte after its last
    sums: int  # position of the checksums, in the order of `places`; see `checksums.write_sums`

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return max((stop for _, stop in self.places.values()), default=len(self.head))


def lay_out(
    path: Path,
    specs: Mapping[str, TensorSpec],
    metadata: Mapping[str, str] | None = None,
    tied: Mapping[str, str] | None = None,
) -> Layout:
    """Plan a file, so that its tensors can be written in any order; see `write_safetensors`.

    Raises:
        CheckpointError: a dtype that the format does not support.
    """
    order = storage_order(specs)
    notes = _notes(specs, metadata or {}, tied or {})
    notes[SUMS] = write_sums([0] * len(order)).decode()
    notes[DIGEST] = digest_table({name: specs[name] for name in order}, notes)
    header: dict[str, object] = {"__metadata__": notes}
    places = {}
    offset = 0
    for name in order:
        shape, dtype = specs[name]
        if dtype not in _CODES:
            raise CheckpointError(f"{path}: safetensors has no {dtype}, the dtype of the tensor '{name}'")
        places[name] = (offset, offset + torch.Size(shape).numel() * dtype.itemsize)
        header[name] = {"dtype": _CODES[dtype], "shape": list(shape), "data_offsets": list(places[name])}
        offset = places[name][1]
    text = MARK + json.dumps(header, separators=(",", ":")).encode().removeprefix(MARK.replace(b" ", b""))
    text += b" " * (-len(text) % 8)  # keeps the data aligned
    head = struct.pack("<Q", len(text)) + text
    inside = {name: (len(head) + begin, len(head) + stop) for name, (begin, stop) in places.items()}
    entry = json.dumps({SUMS: notes[SUMS]}, separators=(",", ":")).encode()[1:-1]
    return Layout(head, inside, sums=head.index(entry) + len(SUMS) + len('"":"'))


def make_public(path: str | os.PathLike[str], mode: int) -> None:
    """Give a temporary file or folder the default permissions of a new one."""
    mask = os.umask(0)
    os.umask(mask)
    os.chmod(path, mode & ~mask)


def _look_tied(metadata: Mapping[str, str], specs: Mapping[str, TensorSpec]) -> dict[str, str]:
    return {name: first for name, first in metadata.items() if first in specs and name != "format"}


def _notes(specs: Mapping[str, TensorSpec], metadata: Mapping[str, str], tied: Mapping[str, str]) -> dict[str, str]:
    notes = {**metadata, **tied, "format": "pt"}
    return notes if _look_tied(notes, specs) == tied else {**notes, _TIED: "\n".join(tied)}


def storage_order(specs: Mapping[str, TensorSpec]) -> list[str]:
    """The order of tensors in a file: widest dtype first, so that all stay aligned, otherwise as given."""
    return sorted(specs, key=lambda name: -specs[name].dtype.itemsize)


def tensor_bytes(tensor: Tensor):
    """The bytes of a tensor in row-major order, as a flat uint8 NumPy array."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy()


def sync_folder(folder: Path) -> None:
    """Make a rename durable, if the platform can sync folders."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
