"""Run `python -m freemerge merge` with parsed options."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections.abc import Mapping, Sequence
from inspect import signature
from pathlib import Path
from typing import Any, get_type_hints

import jsonargparse
import torch

from freemerge.checkpoints import CheckpointError, check_repository, push_folder
from freemerge.cli.merge import build_parser
from freemerge.cli.parsing import ENV_PREFIX, OneLineErrors, instantiate
from freemerge.cli.printing import print_error
from freemerge.cli.showing import FAILURES, bar, describe, notes
from freemerge.merging import MergeMethod, merge, merge_to
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
    parser = build_parser()
    try:
        if config.push_to_hub is not None:
            _check_push(config)
        method = config.method
        if not isinstance(method, MergeMethod):
            method = instantiate(parser, jsonargparse.Namespace(method=method)).method
        with notes(parser), bar("merge", sys.stderr.isatty() and rank == 0) as progress:
            names = {
                **signature(merge).parameters,
                **signature(merge_to).parameters,
            }  # `merge_to` has the options of the output
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
    except FAILURES as error:
        if rank == 0:
            print_error(describe(error, parser))
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
        if config.push_to_hub is not None and not config.dry_run:
            return _push(path, config)
    return 0


def _check_push(config: jsonargparse.Namespace) -> None:
    """Refuse, before the merge, an upload that cannot succeed."""
    if config.output.endswith(".safetensors"):
        raise CheckpointError("push_to_hub: uploads a folder; give --output a path without the ending .safetensors")
    check_repository(config.push_to_hub)


def _push(path: Path, config: jsonargparse.Namespace) -> int:
    """Upload the written folder; the exit code."""
    try:
        print(f"uploaded to {push_folder(path, config.push_to_hub, private=config.private)}")
    except CheckpointError as error:
        print_error(f"{error}; the merged folder is {path}")
        return 2
    return 0


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
