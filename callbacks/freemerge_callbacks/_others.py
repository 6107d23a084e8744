"""Find the finished checkpoints of the other tasks from paths and globs."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from glob import glob
from pathlib import Path

from freemerge.checkpoints import expand, read_record


def find_others(patterns: Sequence[str], start: Path, own: Collection[Path], who: str) -> dict[str, Path]:
    """Resolve paths and globs in the given order; the matches of a glob are sorted.

    Args:
        patterns: paths of files or folders, and globs (`runs/*/backbone.safetensors`, `**` for any depth).
        start: the folder that relative paths start from.
        own: files of the merge itself (its base, its output). A glob skips them; naming one is an error.
        who: name of the callback, for error messages.

    Returns:
        Label → absolute path, each file once. The label is the path as it was given or matched.

    Raises:
        ValueError: `patterns` is empty, a path does not exist, or a glob matches nothing.
    """
    if isinstance(patterns, str):
        raise ValueError(f"{who}: `others` takes a list of paths; write [{patterns!r}]")
    if not patterns:
        raise ValueError(f"{who}: `others` is empty; name the other tasks' fine-tuned checkpoints")
    taken = {path.resolve() for path in own}
    found: dict[Path, tuple[str, Path]] = {}
    for pattern in map(str, patterns):
        given = expand(pattern)
        literal = start / given
        if literal.exists() and literal.resolve() in taken:
            raise ValueError(f"{who}: `others` names {pattern}, which is the merge's own base or output")
        matches = [literal] if literal.exists() else sorted(map(Path, glob(str(literal), recursive=True)))
        matches = [path for path in matches if path.resolve() not in taken]
        if not matches:
            raise ValueError(f"{who}: `others`: {pattern} does not exist and matches nothing; has that task finished?")
        for path in matches:
            label = path if given.is_absolute() or not path.is_relative_to(start) else path.relative_to(start)
            found.setdefault(path.resolve(), (str(label), path))
    return dict(found.values())


def base_hashes(paths: Iterable[Path]) -> dict[Path, str]:
    """The hashes of the bases that checkpoints were fine-tuned from.

    Args:
        paths: the checkpoints.

    Returns:
        Path → hash, for the checkpoints that have a record.
    """
    records = {path: read_record(path) for path in paths}
    return {path: record.base_hash for path, record in records.items() if record is not None}


def check_base_hashes(paths: Iterable[Path], expected: str | None, who: str) -> None:
    """Check that all checkpoints with a record were fine-tuned from this base.

    Args:
        paths: the other tasks' checkpoints.
        expected: hash of this fit's base.
        who: name of the callback, for error messages.

    Raises:
        ValueError: if a checkpoint was fine-tuned from another base.
    """
    for path, found in base_hashes(paths).items():
        if found != expected:
            raise ValueError(
                f"{who}: {path} was fine-tuned from another base than this fit (hash {found[:12]}…, here "
                f"{str(expected)[:12]}…), so their merge would be meaningless; fine-tune it again, or leave it out"
            )
