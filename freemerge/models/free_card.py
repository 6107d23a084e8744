"""A FREE model on the Hugging Face Hub: its folder, with a model card."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from freemerge.checkpoints import check_repository, push_folder
from freemerge.models.free_model import FreeModel


def make_card(model: FreeModel, repository: str) -> str:
    """The model card of a FREE model.

    Args:
        model: the model.
        repository: its name on the Hub.
    """
    experts = {task: f"{packed.num_bytes:,} bytes" for task, packed in model.packed_experts.items()}
    rows = "\n".join(f"| {task} | {experts.get(task, 'none')} |" for task in model.tasks)
    return f"""---
library_name: freemerge
tags:
- merge
- freemerge
---
# {repository.partition("/")[2]}

A merged model with a lightweight expert and a head for each task, and a router that chooses among them.

```python
from freemerge.models import FreeModel

model = FreeModel.from_pretrained({json.dumps(repository)})
```

| task | expert |
|---|---|
{rows}

`freemerge.json` describes all parts.
"""


def push_free_model(model: FreeModel, repository: str, private: bool) -> str:
    """Upload a FREE model with a model card; see `FreeModel.push_to_hub`."""
    check_repository(repository)
    with tempfile.TemporaryDirectory(prefix="freemerge-") as place:
        folder = model.save_pretrained(Path(place) / repository.partition("/")[2])
        (folder / "README.md").write_text(make_card(model, repository), encoding="utf-8")
        return push_folder(folder, repository, private=private)
