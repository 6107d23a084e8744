"""Checkpoints of torch.distributed.checkpoint: a folder with `.metadata` and one file or more from each process.

- Lightning writes them with ModelParallelStrategy and FSDP, through `torch.distributed.checkpoint.save`.
- Read without a process group, by tensor or chunk: `.metadata` gives the file of each block of a tensor.
- `.metadata` is a pickle. It is read with an unpickler that turns torch's few metadata classes into plain records and
  calls nothing. torch's own reader unpickles it without restriction, so this reader stays our own.
"""

from __future__ import annotations

import io
import pickle
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from freemerge.checkpoints.checkpoint import Checkpoint, TensorSpec
from freemerge.checkpoints.formats.torch_files import NESTED
from freemerge.checkpoints.memory import flat_range
from freemerge.errors import CheckpointError
from freemerge.runtime.reading import read_bytes

METADATA = ".metadata"

_AT_A_TIME = 1 << 22  # bytes
_COMPARED = 256  # blocks compared with all others at a time
_AGAIN = "save it again, or copy the whole folder again"


# The classes in `.metadata` and in a `torch.save` of one tensor. All are read as plain records.
_CLASSES = {
    "torch.distributed.checkpoint.metadata": (
        "Metadata", "TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata", "TensorProperties",
        "MetadataIndex", "StorageMeta", "_MEM_FORMAT_ENCODING",
    ),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo",),
    "torch.serialization": ("_get_layout",),
    "torch._utils": ("_rebuild_tensor_v2", "_rebuild_tensor_v3"),
    "torch.storage": ("UntypedStorage",),
    "pathlib": ("PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath"),
    "pathlib._local": ("PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath"),
}  # fmt: skip


class _Block(NamedTuple):
    """A block of a tensor and its location in a file."""

    offsets: tuple[int, ...]  # indices of its first value in the tensor
    sizes: tuple[int, ...]
    path: Path
    begin: int  # position of the saved block in the file
    length: int


class _Values(NamedTuple):
    """The location of a block's values in its file."""

    begin: int  # position of the first value
    stop: int  # position after the storage
    strides: tuple[int, ...]


def open_distributed(folder: Path, label: str) -> Checkpoint:
    """Open the model's tensors in a distributed checkpoint; optimizer states are not part of it.

    Args:
        folder: the folder with `.metadata`.
        label: the model's name in messages.

    Raises:
        CheckpointError: a file is missing or too short, `.metadata` is damaged or contains code, or the blocks of a
            tensor do not cover it.
    """
    path = folder / METADATA
    try:
        specs, blocks = _read_tables(_unpickle(path.read_bytes(), path), folder)
        _check_files(blocks)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from None
    except CheckpointError:
        raise
    except Exception as error:  # tables that torch did not write can fail anywhere
        what = " ".join(str(error).split())
        raise CheckpointError(f"{path}: not the metadata of a distributed checkpoint ({what}); {_AGAIN}") from None
    if not specs:
        raise CheckpointError(f"{path}: lists no tensors of a model; save the model's state dict with it")
    for name, spec in specs.items():
        if not _tiles(spec.shape, blocks[name]):
            raise CheckpointError(
                f"{path}: the blocks of the tensor '{name}' do not cover its shape {list(spec.shape)}; did every "
                f"process write its own? {_AGAIN}"
            )
    found: dict[_Block, _Values] = {}

    def values(name: str, block: _Block, start: int, stop: int) -> Tensor:
        """A chunk of a block's values; their location in the file is looked up once."""
        if block not in found:  # two threads may both look it up, with the same result
            found[block] = _find_values(name, block, specs[name].dtype)
        return _read_values(name, block, found[block], specs[name].dtype, start, stop)

    def read(name: str, run: tuple[int, int] | None) -> Tensor:
        shape, dtype = specs[name]
        start, stop = run or (0, torch.Size(shape).numel())
        if len(blocks[name]) == 1:
            flat = values(name, blocks[name][0], start, stop)
            return flat if run else flat.view(shape)
        row = torch.Size(shape[1:]).numel()
        first, last = (start // row, -(-stop // row)) if row else (0, shape[0])
        rows = torch.empty(last - first, *shape[1:], dtype=dtype)
        for block in blocks[name]:
            above, height = block.offsets[0], block.sizes[0]
            low, high = max(first, above), min(last, above + height)
            if low < high:
                width = torch.Size(block.sizes[1:]).numel()
                part = values(name, block, (low - above) * width, (high - above) * width)
                place = [slice(o, o + s) for o, s in zip(block.offsets[1:], block.sizes[1:], strict=True)]
                rows[(slice(low - first, high - first), *place)] = part.view(high - low, *block.sizes[1:])
        return rows.reshape(-1)[start - first * row : stop - first * row] if run else rows

    return Checkpoint(label, specs, read)


class _Record:
    """A placeholder for an object in a pickle: its constructor arguments and state, without behaviour."""

    arguments: tuple[object, ...]
    state: Any

    def __new__(cls, *arguments: object) -> _Record:
        record = super().__new__(cls)
        record.arguments, record.state = arguments, {}
        return record

    def __setstate__(self, state: object) -> None:
        self.state = state


class _Unpickler(pickle._Unpickler):  # pure Python: a number in the file cannot make its memo huge
    """Reads the pickles of a distributed checkpoint; any other name in a pickle is refused, and nothing is called."""

    def __init__(self, data: bytes, path: Path) -> None:
        super().__init__(io.BytesIO(data))
        self.path = path

    def find_class(self, module: str, name: str) -> Any:
        if name in _CLASSES.get(module, ()):
            return type(name, (_Record,), {})
        if (module, name) == ("torch", "Size"):
            return tuple
        if (module, name) == ("collections", "OrderedDict"):
            return dict
        if module == "torch" and isinstance(vars(torch).get(name), torch.dtype):  # getattr could import modules
            return vars(torch)[name]
        if module == "torch" and name.endswith("Storage"):
            return name
        raise CheckpointError(
            f"{self.path}: names {module}.{name}, which no checkpoint of tensors needs, and loading it could run code; "
            "do not trust this file"
        )

    def persistent_load(self, pid: Any) -> Any:
        return pid  # the persistent id that `torch.save` writes for a storage


def _unpickle(data: bytes, path: Path) -> Any:
    return _Unpickler(data, path).load()


def _read_tables(metadata: Any, folder: Path) -> tuple[dict[str, TensorSpec], dict[str, list[_Block]]]:
    """Specs and blocks of the model's tensors, from the records of `.metadata`."""
    tables = metadata.state
    places: dict[tuple[str, tuple[int, ...] | None], dict[str, Any]] = {}
    for index, info in tables["storage_data"].items():
        places[index.state["fqn"], index.state.get("offset")] = info.state
    tensors = {
        name: entry.state
        for name, entry in tables["state_dict_metadata"].items()
        if type(entry).__name__ == "TensorStorageMetadata"
    }
    specs: dict[str, TensorSpec] = {}
    blocks: dict[str, list[_Block]] = {}
    for name, key in _model_names(tensors, tables.get("planner_data") or {}).items():
        properties = tensors[key]["properties"].state
        dtype = properties[0] if isinstance(properties, tuple) else properties["dtype"]
        if not isinstance(dtype, torch.dtype):
            raise TypeError(f"the tensor '{name}' has no dtype")
        specs[name] = TensorSpec(_indices(tensors[key]["size"]), dtype)
        blocks[name] = []
        for chunk in tensors[key]["chunks"]:
            offsets, sizes = _indices(chunk.state["offsets"]), _indices(chunk.state["sizes"])
            place = places[key, offsets]
            if place.get("transform_descriptors"):
                raise CheckpointError(
                    f"{folder}: the tensor '{name}' was transformed by {place['transform_descriptors'][0]} when it "
                    "was saved, which is not supported; save it without"
                )
            path = folder / place["relative_path"]
            if folder.resolve() not in path.resolve().parents:
                raise CheckpointError(
                    f"{folder / METADATA}: looks for the tensor '{name}' in {path}, outside the folder; do not "
                    "trust this file"
                )
            begin, length = _indices((place["offset"], place["length"]))
            blocks[name].append(_Block(offsets, sizes, path, begin, length))
    return specs, blocks


def _indices(values: Sequence[int]) -> tuple[int, ...]:
    if not all(type(value) is int and value >= 0 for value in values):
        raise ValueError(f"{values!r} are not sizes")
    return tuple(values)


def _model_names(tensors: Mapping[str, Any], paths: Mapping[str, tuple]) -> dict[str, str]:
    """Name in the model → name in the checkpoint, for the model's tensors.

    Args:
        tensors: the checkpoint's tensors.
        paths: for names flattened from nested dicts, the path of keys.
    """
    split = {name: tuple(str(key) for key in paths.get(name, (name,))) for name in tensors}
    for outer in NESTED:
        inside = {".".join(keys[1:]): name for name, keys in split.items() if keys[0] == outer and len(keys) > 1}
        if inside:
            return inside
    return {".".join(keys): name for name, keys in split.items()}


def _check_files(blocks: Mapping[str, list[_Block]]) -> None:
    ends: dict[Path, int] = {}
    for block in (block for own in blocks.values() for block in own):
        ends[block.path] = max(ends.get(block.path, 0), block.begin + block.length)
    for path, end in ends.items():
        if not path.is_file():
            raise CheckpointError(f"{path}: missing, though {METADATA} lists it; {_AGAIN}")
        if (size := path.stat().st_size) < end:
            raise CheckpointError(f"{path}: truncated: {METADATA} promises {end:,} bytes and it has {size:,}; {_AGAIN}")


def _tiles(shape: tuple[int, ...], blocks: Sequence[_Block]) -> bool:
    """Whether blocks cover every entry of a tensor exactly once."""
    if any(len(block.offsets) != len(shape) or len(block.sizes) != len(shape) for block in blocks):
        return False
    total = sum(torch.Size(block.sizes).numel() for block in blocks)
    if total != torch.Size(shape).numel():
        return False
    offsets = torch.tensor([block.offsets for block in blocks], dtype=torch.int64).view(len(blocks), len(shape))
    ends = offsets + torch.tensor([block.sizes for block in blocks], dtype=torch.int64).view(len(blocks), len(shape))
    if bool((ends > torch.tensor(shape, dtype=torch.int64)).any()):
        return False
    # Two blocks share an entry if they overlap in every dimension; empty blocks share none.
    shared = 0
    for some, their_ends in zip(offsets.split(_COMPARED), ends.split(_COMPARED), strict=True):
        low, high = torch.maximum(some[:, None], offsets), torch.minimum(their_ends[:, None], ends)
        shared += int((low < high).all(dim=-1).sum())
    return shared == sum(torch.Size(block.sizes).numel() > 0 for block in blocks)


class _Window(io.RawIOBase):
    """A part of a file as a separate file object."""

    def __init__(self, path: Path, begin: int, length: int) -> None:
        self._file = path.open("rb")
        self._begin, self._length, self._position = begin, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._position = offset + (0, self._position, self._length)[whence]
        return self._position

    def readinto(self, buffer) -> int:
        view = memoryview(buffer)[: max(self._length - self._position, 0)]
        self._file.seek(self._begin + self._position)
        count = self._file.readinto(view)
        self._position += count
        return count

    def close(self) -> None:
        self._file.close()
        super().close()


def _find_values(name: str, block: _Block, dtype: torch.dtype) -> _Values:
    """Locate the values of a block, which is the zip archive of a `torch.save` of one tensor."""
    try:
        with _Window(block.path, block.begin, block.length) as window, zipfile.ZipFile(window) as archive:
            files = {info.filename.split("/", 1)[-1]: info for info in archive.infolist()}
            if any(info.compress_type != zipfile.ZIP_STORED for info in files.values()):
                raise ValueError("it is compressed, as torch.save never writes it")
            record = _unpickle(archive.read(files["data.pkl"]), block.path)
            if archive.read(files["byteorder"]) != b"little":
                raise ValueError("it was written on a big-endian machine")
            (_, _, key, *_), offset, sizes, strides, *_ = record.arguments
            values = files[f"data/{key}"]
            if values.CRC != 0:  # a missing CRC-32 is zero
                with archive.open(values) as stored:  # zipfile verifies it when the record is read to its end
                    while stored.read(_AT_A_TIME):
                        pass
            window.seek(values.header_offset)
            header = window.read(30)  # its last two numbers are the lengths of the name and of the padding
            begin = values.header_offset + 30 + int.from_bytes(header[26:28], "little")
            begin += int.from_bytes(header[28:30], "little")
        if tuple(sizes) != block.sizes:
            raise ValueError(f"it has the shape {list(sizes)}, not {list(block.sizes)}")
        strides, (offset,) = _indices(strides), _indices((offset,))
        empty = torch.Size(sizes).numel() == 0
        last = 0 if empty else 1 + sum((size - 1) * stride for size, stride in zip(sizes, strides, strict=True))
        if (offset + last) * dtype.itemsize > values.file_size or begin + values.file_size > block.length:
            raise ValueError("it is shorter than its shape asks for")
    except CheckpointError:
        raise
    except OSError as error:
        raise CheckpointError(f"{block.path}: cannot be read: {error.strerror or error}") from None
    except Exception as error:  # a damaged archive, or a pickle of something other than a tensor
        what = " ".join(str(error).split())
        raise CheckpointError(
            f"{block.path}: damaged where the tensor '{name}' should be, at byte {block.begin:,} ({what}); {_AGAIN}"
        ) from None
    first = block.begin + begin + offset * dtype.itemsize
    return _Values(first, first + last * dtype.itemsize, strides)


def _read_values(name: str, block: _Block, values: _Values, dtype: torch.dtype, start: int, stop: int) -> Tensor:
    """Values `start` to `stop` of a block in row-major order, as (stop − start,)."""
    if values.begin == values.stop or _is_row_major(block.sizes, values.strides):
        begin = values.begin + start * dtype.itemsize
        return read_bytes(block.path, begin, begin + (stop - start) * dtype.itemsize, name).view(dtype)
    stored = read_bytes(block.path, values.begin, values.stop, name).view(dtype)
    return flat_range(stored.as_strided(block.sizes, values.strides), start, stop)


def _is_row_major(sizes: Sequence[int], strides: Sequence[int]) -> bool:
    step = 1
    for size, stride in zip(reversed(sizes), reversed(strides), strict=True):
        if size != 1 and stride != step:  # the stride of a single row is arbitrary
            return False
        step *= size
    return True
