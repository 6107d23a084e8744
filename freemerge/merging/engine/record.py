"""The origin of a merged model: `freemerge.json` for programs, the model card for people."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from freemerge.checkpoints import Checkpoint, hash_tensors
from freemerge.checkpoints.places import cached_id
from freemerge.merging.engine.plan import Plan
from freemerge.merging.folders.configuration import to_json
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


def make_files(record: Mapping[str, Any], title: str) -> dict[str, bytes]:
    """The description of a merge in a model's folder: `freemerge.json` and the model card `README.md`.

    Args:
        record: see `make_record`, with what is in the folder (`Files.record`).
        title: the folder's name.
    """
    return {
        "freemerge.json": to_json(record),
        "README.md": _card(record, title, "config.json" in record["files"]["copied"]).encode(),
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


def make_adapter_card(record: Mapping[str, Any], title: str) -> str:
    """The model card of a merge that is written as a LoRA adapter.

    Args:
        record: see `make_record` and `write_adapter`.
        title: the folder's name.
    """
    truncation = record["truncation"]
    worst = sorted(truncation["tensors"].items(), key=lambda item: -item[1])[:10]
    errors = "\n".join(f"| {name} | {error:.2e} |" for name, error in worst)
    whole = len(record["tensors"]["whole"])
    return f"""---
library_name: peft
{_base_line([record["base"]])}tags:
- merge
- freemerge
- lora
---
# {title}

{_summary(record)}, and cut to a LoRA adapter of rank {record["rank"]}.

```python
from peft import PeftModel

model = PeftModel.from_pretrained(base_model, "{title}")
```

{_table(record)}

The cut loses {truncation["overall"]:.2e} of the merged task vector (relative error, Frobenius norm); {whole} tensors
are stored whole. The tensors with the largest errors:

| tensor | relative error |
|---|---|
{errors}

The method's parameters are

```json
{json.dumps(record["method"], indent=2)}
```

`freemerge.json` holds the whole record: full hashes, patterns, versions, the error of every tensor.
"""


def _base_line(models: Sequence[Mapping[str, Any]]) -> str:
    """The card's `base_model`: names on the Hub only, because the Hub refuses a card with a path."""
    names = list(dict.fromkeys(model["hub"] for model in models if model.get("hub")))
    if len(names) == 1:
        return f"base_model: {json.dumps(names[0])}\n"
    return "".join(["base_model:\n", *(f"- {json.dumps(name)}\n" for name in names)]) if names else ""


def _summary(record: Mapping[str, Any]) -> str:
    name = record["method"]["class_path"].rpartition(".")[2]
    return (
        f"{len(record['finetuned'])} fine-tuned models of one base, merged with **{name}** by freemerge\n"
        f"{record['versions']['freemerge']}"
    )


def _table(record: Mapping[str, Any]) -> str:
    rows = [("base", record["base"]), *(("fine-tuned", model) for model in record["finetuned"])]
    lines = []
    for role, item in rows:
        name = item["name"] if item.get("hub") else Path(item["name"]).name
        lines.append(f"| {role} | {name} | {'`' + item['hash'][:16] + '`' if item['hash'] else 'not hashed'} |")
    return "\n".join(["| | model | SHA-256 of the weights |", "|---|---|---|", *lines])


def _card(record: Mapping[str, Any], title: str, loadable: bool) -> str:
    tensors = record["tensors"]
    load = f'\n```python\nfrom transformers import AutoModel\n\nmodel = AutoModel.from_pretrained("{title}")\n```\n'
    return f"""---
{"library_name: transformers" if loadable else "library_name: pytorch"}
{_base_line([record["base"], *record["finetuned"]])}tags:
- merge
- freemerge
---
# {title}

{_summary(record)}.
{load if loadable else ""}
{_table(record)}

{tensors["merged"]} tensors were merged, {len(tensors["kept"])} are the base's own. The method's parameters are

```json
{json.dumps(record["method"], indent=2)}
```

`freemerge.json` holds the whole record: full hashes, patterns, versions.
"""
