"""A FREE model's folder: the merged backbone as its own library writes it, and beside it

experts/<task>.safetensors   heads.safetensors   router.safetensors   freemerge.json
"""

from __future__ import annotations

import json
from pathlib import Path

from torch import nn

from freemerge.checkpoints import CheckpointError, hash_tensors, load_checkpoint, save_checkpoint
from freemerge.experts import MaskedExpert, PackedExpert, load_expert, save_expert
from freemerge.models.backbones import Backbone, load_backbone
from freemerge.models.free import FreeModel
from freemerge.models.router import make_router

FORMAT = "freemerge-free-model-3"


def save_free_model(model: FreeModel, directory: str | Path) -> Path:
    """Write a FREE model to a folder.

    Args:
        model: the model; experts keep the encoding of the files they came from, others are stored in int8.
        directory: the folder, made if need be.

    Returns:
        The folder.

    Raises:
        ValueError: for masked experts, whose shared task vector has no place in the folder.
    """
    directory = Path(directory)
    experts = model.packed_experts
    for task, packed in experts.items():
        if packed.kind is MaskedExpert:
            raise ValueError(f"FreeModel: the expert of {task!r} shares a task vector, which the folder does not hold")
    directory.mkdir(parents=True, exist_ok=True)
    model.backbone.save_pretrained(directory)
    merged_hash = hash_tensors(model.backbone.weights())
    for task, packed in experts.items():  # unpacked one by one: they take six times the memory
        expert = packed.unpacked().tagged(task=task, merged_hash=merged_hash)
        save_expert(directory / "experts" / f"{task}.safetensors", expert)
    save_checkpoint(directory / "heads.safetensors", model.heads.state_dict())
    if model.router is not None:
        save_checkpoint(directory / "router.safetensors", model.router.stored())
    description = {
        "format": FORMAT,
        "merged_hash": merged_hash,
        "tasks": {
            task: {"num_classes": head.out_features, "class_names": model.class_names.get(task)}
            for task, head in model.heads.items()
        },
        "experts": sorted(experts),
        "router": model.router.config if model.router is not None else None,
        "threshold": model.threshold,
        "top_n": model.top_n,
    }
    (directory / "freemerge.json").write_text(json.dumps(description, indent=2, ensure_ascii=False) + "\n")
    return directory


def load_free_model(directory: str | Path, backbone: Backbone | None = None) -> FreeModel:
    """Load a folder written by `save_free_model`.

    Args:
        directory: the folder.
        backbone: a backbone with the folder's merged weights, for classes of your own.

    Raises:
        CheckpointError: if the folder is not a FREE model, or an expert belongs to other merged weights.
    """
    directory = Path(directory)
    try:
        description = json.loads((directory / "freemerge.json").read_text())
    except FileNotFoundError as error:
        raise CheckpointError(f"{directory}: not a FREE model (no freemerge.json)") from error
    if description.get("format") != FORMAT:
        raise CheckpointError(f"{directory}/freemerge.json: format {description.get('format')!r}, expected {FORMAT!r}")
    if backbone is None:
        backbone = load_backbone(directory)
    merged_hash = hash_tensors(backbone.weights())
    if merged_hash != description["merged_hash"]:
        raise CheckpointError(
            f"{directory}: the merged backbone has hash {merged_hash[:12]}, freemerge.json says "
            f"{description['merged_hash'][:12]}; the folder's files do not belong together"
        )
    experts = {  # packed one by one, for the same reason
        task: PackedExpert(load_expert(directory / "experts" / f"{task}.safetensors", merged=merged_hash))
        for task in description["experts"]
    }
    heads = {task: nn.Linear(backbone.feature_dim, info["num_classes"]) for task, info in description["tasks"].items()}
    router = make_router(description["router"]) if description["router"] is not None else None
    names = {task: info["class_names"] for task, info in description["tasks"].items() if info["class_names"]}
    model = FreeModel(backbone, heads, experts, router, names, description["threshold"], description["top_n"])
    model.heads.load_state_dict(load_checkpoint(directory / "heads.safetensors"))
    if router is not None:
        router.load_state_dict(load_checkpoint(directory / "router.safetensors"))
    return model.eval()
