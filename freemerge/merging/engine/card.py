"""The model card of a merged model: its origin, for people and for the Hub."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from freemerge.merging.folders.configuration import to_json


def make_files(record: Mapping[str, Any], title: str) -> dict[str, bytes]:
    """The description of a merge in a model's folder: `freemerge.json` and the model card `README.md`.

    Args:
        record: see `make_record`, with what is in the folder (`Files.record`).
        title: the folder's name.
    """
    return {
        "freemerge.json": to_json(record),
        "README.md": _card(record, title).encode(),
    }


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

The method and its parameters:

```yaml
{_as_yaml({"method": record["method"]})}
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


def _card(record: Mapping[str, Any], title: str) -> str:
    tensors, files = record["tensors"], record["files"]
    library = _library(files["copied"])
    names = [name for name in files["left_out"] if name not in ("README.md", ".gitattributes")]
    left_out = f"\nFiles of the base that are left out: {', '.join(names)}.\n" if names else ""
    return f"""---
library_name: {library}
{_base_line([record["base"], *record["finetuned"]])}{_licence_lines(files.get("licences", {}))}tags:
- merge
- freemerge
---
# {title}

{_summary(record)}.
{_loading(library, title)}
{_table(record)}

{tensors["merged"]} tensors were merged, {len(tensors["kept"])} are the base's own.
{left_out}
The method and its parameters:

```yaml
{_as_yaml({"method": record["method"]})}
```

`freemerge.json` holds the whole record: full hashes, patterns, versions.
"""


def _library(files: Sequence[str]) -> str:
    """The library that loads a folder with these files."""
    if "modules.json" in files:
        return "sentence-transformers"
    return "transformers" if "config.json" in files else "pytorch"


def _loading(library: str, title: str) -> str:
    """The lines of Python that load the model."""
    if library == "pytorch":
        return ""
    package, name = ("sentence_transformers", "SentenceTransformer") if "-" in library else (library, "AutoModel")
    call = f'{name}("{title}")' if "-" in library else f'{name}.from_pretrained("{title}")'
    return f"\n```python\nfrom {package} import {name}\n\nmodel = {call}\n```\n"


def _licence_lines(licences: Mapping[str, Mapping[str, str]]) -> str:
    """The card's licence, the base's."""
    return "".join(f"{key}: {json.dumps(value)}\n" for key, value in licences.get("base", {}).items())


def _as_yaml(value: Any) -> str:
    """A table of plain values as YAML."""
    return "\n".join(_lines(value))


def _lines(value: Any) -> Iterator[str]:
    for key, inner in value.items():
        name = key if str(key).replace("_", "").isalnum() else json.dumps(key)
        if isinstance(inner, Mapping) and inner:
            yield f"{name}:"
            yield from (f"  {line}" for line in _lines(inner))
        else:
            yield f"{name}: {json.dumps(inner, ensure_ascii=False)}"  # scalars and lists of JSON are YAML
