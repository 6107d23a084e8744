"""The index of a sharded checkpoint: the file of each tensor."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from freemerge.checkpoints.json_files import read_object
from freemerge.errors import CheckpointError

SUFFIX = ".index.json"


class Index(NamedTuple):
    """An index file and its contents."""

    path: Path
    files: dict[str, Path]  # tensor name → file

    @property
    def shards(self) -> list[Path]:
        """All files, each once, in the order of the index."""
        return list(dict.fromkeys(self.files.values()))

    def check(self, held: Mapping[str, Path], tied: Iterable[str] = ()) -> None:
        """Compare the index with the contents of the shards.

        Args:
            held: tensor name → the file that holds it.
            tied: names that the files omit because they are tied to others.

        Raises:
            CheckpointError: a tensor is not in the file that the index names, or is not in the index.
        """
        left_out = set(tied)
        for name, file in self.files.items():
            if held.get(name) != file and name not in left_out:
                where = f"it is in {held[name].name}" if name in held else "no shard holds it"
                raise CheckpointError(
                    f"{self.path}: lists the tensor '{name}' in {file.name}, but {where}; the shards are of another "
                    "model or broken: download them again"
                )
        for name, file in held.items():
            if name not in self.files:
                raise CheckpointError(
                    f"{self.path}: does not list the tensor '{name}', which {file.name} holds; the shards are of "
                    "another model or broken: download them again"
                )


def read_index(path: Path) -> Index:
    """Read an index and check that its files exist.

    Raises:
        CheckpointError: it is not an index, names files outside its folder, or a file is missing.
    """
    try:
        weight_map = read_object(path).get("weight_map")
    except CheckpointError as error:
        reason = str(error).removeprefix(f"{path}: ")
        raise CheckpointError(f"{path}: not an index of shards: {reason}") from None
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise CheckpointError(
            f"{path}: not an index of shards: expected a `weight_map` from tensors to files; copy or download it again"
        )
    names = {name: Path(file) for name, file in weight_map.items()}
    if not names:
        raise CheckpointError(f"{path}: lists no shards; copy or download it again")
    for file in dict.fromkeys(names.values()):
        if len(file.parts) != 1 or file.name == "..":
            raise CheckpointError(f"{path}: names the shard '{file}', which is not beside it; do not trust this index")
        try:
            there = (path.parent / file).is_file()
        except OSError as error:
            reason = error.strerror or type(error).__name__
            raise CheckpointError(
                f"{path}: names the shard '{file}', which cannot be a file here ({reason}); do not trust this index"
            ) from None
        if not there:
            raise CheckpointError(f"{path.parent / file}: missing, though {path.name} lists it; download it")
    return Index(path, {name: path.parent / file for name, file in names.items()})
