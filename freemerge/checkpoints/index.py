"""The index of a sharded checkpoint: which tensor lies in which file."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from freemerge.checkpoints.errors import CheckpointError

SUFFIX = ".index.json"


class Index(NamedTuple):
    """An index file and what it says."""

    path: Path
    files: dict[str, Path]  # tensor name → file

    @property
    def shards(self) -> list[Path]:
        """All files, each once, in the order in which the index names them."""
        return list(dict.fromkeys(self.files.values()))

    def check(self, held: Mapping[str, Path], tied: Iterable[str] = ()) -> None:
        """Compare the index with what the shards hold.

        Args:
            held: tensor name → the file that holds it.
            tied: names that the files leave out because they are tied to others.

        Raises:
            CheckpointError: a tensor is not where the index says, or the index does not know it.
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
    """Read an index and see that its files are there.

    Raises:
        CheckpointError: it is no index, names files elsewhere than beside it, or a file is missing.
    """
    try:
        weight_map = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        names = {str(name): Path(file) for name, file in weight_map.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path}: not an index of shards ({error}); copy or download it again") from None
    if not names:
        raise CheckpointError(f"{path}: lists no shards; copy or download it again")
    for file in dict.fromkeys(names.values()):
        if len(file.parts) != 1 or file.name == "..":
            raise CheckpointError(f"{path}: names the shard '{file}', which is not beside it; do not trust this index")
        if not (path.parent / file).is_file():
            raise CheckpointError(f"{path.parent / file}: missing, though {path.name} lists it; download it")
    return Index(path, {name: path.parent / file for name, file in names.items()})
