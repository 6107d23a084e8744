"""Run `python -m freemerge merge` with parsed options."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from inspect import signature
from pathlib import Path
from typing import Any, get_type_hints

import jsonargparse
import torch

from freemerge.checkpoints import CheckpointError
from freemerge.cli.merge import build_parser
from freemerge.cli.parsing import ENV_PREFIX, OneLineErrors, instantiate
from freemerge.cli.printing import print_error
from freemerge.cli.problems import options
from freemerge.cli.syntax import as_options
from freemerge.merging import MergeError, MergeMethod, MergeWarning, merge, merge_to
from freemerge.runtime import own_process


def run(config: jsonargparse.Namespace) -> int:
    """Merge according to a parsed configuration.

    Args:
        config: the result of `build_parser().parse_args()`; its method may still be a description of a class.

    Returns:
        The exit code: 0, or 2 after an error, which is printed as one line on stderr.
    """
    own_process()
    rank, shared = _join()
    try:
        method = config.method
        if not isinstance(method, MergeMethod):
            method = instantiate(build_parser(), jsonargparse.Namespace(method=method)).method
        with _notes(), _bar(sys.stderr.isatty() and rank == 0) as progress:
            names = {
                **signature(merge).parameters,
                **signature(merge_to).parameters,
            }  # the latter has what is written how
            given = {name: config[name] for name in names if name in config}
            computed = {
                "finetuned": dict(config.finetuned) if isinstance(config.finetuned, dict) else list(config.finetuned),
                "method": method,
                "overrides": _instantiated(method, config.overrides),
                "device": _own_device(config.device),
                "distributed": shared,
                "progress": progress,
            }
            path = merge(**{**given, **computed})
    except (MergeError, CheckpointError, ValueError, OSError, MemoryError, torch.OutOfMemoryError) as error:
        if rank == 0:
            print_error(_said(error))
        return 2
    except KeyboardInterrupt:
        if rank == 0:
            print_error(_left(config))
        raise
    finally:
        if shared:
            torch.distributed.destroy_process_group()
    if rank == 0:
        print(path if config.dry_run else f"merged into {path}" + _truncation(path, config.output_format))
    return 0


def _said(error: Exception) -> str:
    """An error's message, in the command line's syntax."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return f"there is not enough memory: {str(error).split('. ')[0]}"
    if isinstance(error, UnicodeEncodeError):
        return f"'{error.object!s}' cannot be written in this locale's encoding ({error.encoding}); set PYTHONUTF8=1"
    if isinstance(error, OSError) and error.filename:
        return f"{error.filename}: {error.strerror}"
    return _in_options(str(error))


def _in_options(message: str) -> str:
    return as_options(message, options(build_parser()))


def _left(config: jsonargparse.Namespace) -> str:
    """The message after an interruption, with the way to continue."""
    if config.dry_run:
        return "interrupted"
    if config.resume:
        return "interrupted; the finished part is kept beside the output, and the same command continues from it"
    return "interrupted; nothing was written (--resume keeps the finished part, so that a merge can continue)"


def _truncation(path: Path, output_format: str) -> str:
    """A note on the error that the rank of a written adapter causes; "" for other formats."""
    if output_format != "lora":
        return ""
    record = json.loads((path / "freemerge.json").read_text(encoding="utf-8"))
    error = record["truncation"]["overall"]
    return f", a LoRA adapter of rank {record['rank']} that loses {error:.2e} of the merged task vector"


def _join() -> tuple[int, bool]:
    """The rank of this process among those that torchrun started, and whether there are several."""
    if int(os.environ.get("WORLD_SIZE", "1")) < 2 or "RANK" not in os.environ:
        return 0, False
    torch.distributed.init_process_group("gloo")
    return torch.distributed.get_rank(), True


def _own_device(device: str | None) -> str | None:
    """The device of this process: each process on a machine uses its own GPU."""
    return f"cuda:{os.environ['LOCAL_RANK']}" if device == "cuda" and "LOCAL_RANK" in os.environ else device


@contextmanager
def _notes() -> Iterator[None]:
    """Inside the block, print a merge's warnings as one-line notes; other warnings are shown as usual."""
    with warnings.catch_warnings():
        warnings.simplefilter("always", MergeWarning)
        show = warnings.showwarning

        def show_note(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
            if issubclass(category, MergeWarning):
                print("note:", " ".join(_in_options(str(message)).split()), file=sys.stderr)
            else:
                show(message, category, *where, **more)

        warnings.showwarning = show_note
        yield


@contextmanager
def _bar(visible: bool) -> Iterator[Callable[[int, int], None] | None]:
    """A progress bar of the bytes read, with the remaining time; None if it is not visible."""
    if not visible:
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("merge", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _instantiated(method: MergeMethod, overrides: Sequence[Mapping[str, Any]] | None) -> list[dict[str, Any]] | None:
    """Overrides in which class descriptions, such as another filter, are replaced by objects."""
    if overrides is None:
        return None
    hints = get_type_hints(type(method)) if dataclasses.is_dataclass(method) else {}
    return [{key: _object(hints.get(key, Any), key, value) for key, value in each.items()} for each in overrides]


def _object(hint: Any, key: str, value: Any) -> Any:
    if not (isinstance(value, dict) and "class_path" in value):
        return value
    parser = OneLineErrors(env_prefix=f"{ENV_PREFIX}_MERGE_", default_env=False)
    parser.add_argument(f"--overrides.{key}", type=hint)
    config = parser.parse_object({"overrides": {key: value}})
    return instantiate(parser, config).overrides[key]
