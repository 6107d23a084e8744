"""The minimum work of a merge, hand-written in plain torch and safetensors: base + c·Σ(delta).

    python floor.py OUTPUT BASE MODEL... [--sync]

Tensor by tensor in float32, shard by shard in the base's shards; files or Hugging Face folders. With `--sync` the
output is on the disk when it ends, as freemerge's is; without, it is in the page cache.
"""

import os
import sys
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

SCALE = 0.3
arguments = [argument for argument in sys.argv[1:] if argument != "--sync"]
output, base, *models = map(Path, arguments)


def places(model):
    """Name → the open file that holds it."""
    paths = sorted(model.glob("*.safetensors")) if model.is_dir() else [model]
    files = [safe_open(path, "pt") for path in paths]
    return {name: file for file in files for name in file.keys()}  # noqa: SIM118 - not a dict


sources = [places(model) for model in models]
shards = sorted(base.glob("*.safetensors")) if base.is_dir() else [base]
if base.is_dir():
    output.mkdir()
    for path in base.glob("*.json"):
        (output / path.name).write_bytes(path.read_bytes())
for shard in shards:
    merged = {}
    with safe_open(shard, "pt") as file:
        for name in file.keys():  # noqa: SIM118
            stored = file.get_tensor(name)
            weight = stored.float()
            total = torch.zeros_like(weight)
            for source in sources:
                total += source[name].get_tensor(name).float() - weight
            merged[name] = (weight + SCALE * total).to(stored.dtype)
    path = output / shard.name if base.is_dir() else output
    save_file(merged, path, metadata={"format": "pt"})
    if "--sync" in sys.argv:
        with path.open("rb") as written:
            os.fsync(written.fileno())
