"""The origin of a merged model, for programs: the contents of `freemerge.json`."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from freemerge.checkpoints import Checkpoint, hash_tensors
from freemerge.checkpoints.places import cached_id
from freemerge.merging.engine.plan import Plan
from freemerge.merging.methods.base import MergeMethod

_PACKAGE = "freemerge.merging"


def describe_method(method: object) -> dict[str, Any]:
    """A method and its parameters as plain values: class path and arguments, as in a configuration file.

    Args:
        method: a dataclass; its fields may be dataclasses themselves (filters, methods behind methods).
    """
    kind = type(method)
    # Our own methods under their public name, because their module may change.
    home = _PACKAGE if kind.__module__.startswith(f"{_PACKAGE}.") else kind.__module__
    described: dict[str, Any] = {"class_path": f"{home}.{kind.__qualname__}"}
    if dataclasses.is_dataclass(method):
        values = {field.name: getattr(method, field.name) for field in dataclasses.fields(method)}
        described["init_args"] = {name: _describe_value(value) for name, value in values.items()}
    return described


def _describe_value(value: object) -> object:
    if isinstance(value, dict):
        return {key: _describe_value(inner) for key, inner in value.items()}
    return describe_method(value) if dataclasses.is_dataclass(value) else value


def make_record(
    plan: Plan,
    method: MergeMethod,
    *,
    include: Sequence[str] | None,
    exclude: Sequence[str] | None,
    hash_inputs: bool,
) -> dict[str, Any]:
    """Everything needed to reproduce the merge and to verify its inputs.

    Args:
        plan: the merge.
        method: its method.
        include: its patterns.
        exclude: its patterns.
        hash_inputs: read all inputs once more to hash them (`hash_tensors`).

    Returns:
        A table that JSON can hold.
    """
    checkpoints = (plan.base, *plan.models)
    hashes: list[str | None] = [None] * len(checkpoints)
    if hash_inputs:
        with ThreadPoolExecutor(max_workers=4, thread_name_prefix="freemerge-hash") as pool:
            hashes = list(pool.map(lambda checkpoint: hash_tensors(checkpoint.source), checkpoints))
    left_out = [[], *(plan.left_out(model) for model in plan.models)]
    base, *models = map(_input, checkpoints, hashes, left_out)
    return {
        "versions": {"freemerge": _version("freemerge"), "torch": torch.__version__},
        "method": describe_method(method),
        "base": base,
        "finetuned": models,
        "include": list(include) if include is not None else None,
        "exclude": list(exclude) if exclude is not None else None,
        "dtype": str(plan.dtype).removeprefix("torch.") if plan.dtype else None,
        "embeddings": plan.embeddings,
        "rows": {name: dict(zip((m.label for m in plan.models), own, strict=True)) for name, own in plan.rows.items()},
        "tensors": {
            "merged": len(plan.merged),
            "kept": list(plan.kept),
            "tied": dict(plan.tied),
            **({"untied": dict(plan.untied)} if plan.untied else {}),
        },
    }


def _input(checkpoint: Checkpoint, digest: str | None, left_out: list[str]) -> dict[str, Any]:
    identity = None if checkpoint.folder is None else cached_id(checkpoint.folder)
    return {
        "name": checkpoint.label,
        **({"hub": identity} if identity else {}),
        "hash": digest,
        "tensors": len(checkpoint),
        "left_out": left_out,
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:  # run from a source tree that is not installed
        return "0+unknown"
