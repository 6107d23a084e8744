"""Folders of FREE models: the merged backbone as its own library writes it, and these files:

    experts/<task>.safetensors       one expert per task
    shared_vectors/<i>.safetensors   the task vectors that masked experts share
    heads.safetensors                the weights of all heads
    router.safetensors               the weights of the router
    freemerge.json                   the description of all parts

A language model's folder also has its tokenizer, chat template and generation configuration.

Loading a folder runs no code from outside freemerge and torch by default. The folder names such classes; the caller
passes objects of them, or allows the import with `trust_remote_code=True`.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from freemerge.checkpoints import CheckpointError, expand, hash_tensors, load_checkpoint, locate, save_checkpoint
from freemerge.experts import PackedExpert, exclusive, is_registered, kind_of, load_expert, save_expert
from freemerge.models.backbones.base import Backbone, load_backbone
from freemerge.models.by_task import TaskModules
from freemerge.models.classes import import_class, instantiate, is_builtin, recipe_arguments
from freemerge.models.free_model import FreeModel
from freemerge.models.heads import build_head, describe_head
from freemerge.models.routers import ConvRouter, EarlyRouter, Router, make_router
from freemerge.names import class_name

FORMAT = "freemerge-free-model-4"
_OLD = "freemerge-free-model-3"  # heads are linear layers, and all classes are freemerge's own
_PATTERNS = (  # the files of a FREE model
    "backbone.json", "router.safetensors", "experts/*.safetensors", "shared_vectors/*.safetensors",
    "model*.safetensors", "model.safetensors.index.json", "tokenizer*.json", "chat_template.jinja",
    "generation_config.json",
)  # fmt: skip


def save_free_model(model: FreeModel, directory: str | Path) -> Path:
    """Write a FREE model to a folder, completely or not at all.

    Args:
        model: the model. Experts keep the encoding of the files that they came from; others are stored in int8.
        directory: the folder, created if it is missing. A FREE model in it is replaced; other files stay.

    Returns:
        The folder.

    Raises:
        ValueError: if a part cannot be described, or `directory` is a file; nothing is written then.
    """
    directory = expand(directory)
    description = _describe(model)
    with _staged(directory) as staged:
        _write(model, staged, description)
    return directory


def _describe(model: FreeModel) -> dict[str, Any]:
    """The content of `freemerge.json` without the hash.

    Raises:
        ValueError: if a part cannot be described.
    """
    heads: dict[str, dict[str, Any]] = {}
    first: dict[int, str] = {}
    for task, head in model.heads.items():
        same_as = first.setdefault(id(head), task)
        described = describe_head(head, f"the head of {task!r}") if same_as == task else {"same_as": same_as}
        heads[task] = {"head": described, "class_names": model.class_names.get(task)}
    experts, shared = model.packed_experts, _shared_vectors(model)
    classes = {task: packed.kind for task, packed in experts.items()}
    for task, kind in classes.items():
        try:
            kind_of(kind)
        except ValueError as error:
            raise ValueError(f"FreeModel: the expert of {task!r} cannot be saved: {error}") from error
    recipe_arguments(model.backbone, "FreeModel")
    return {
        "format": FORMAT,
        "backbone": class_name(type(model.backbone)),
        "tasks": heads,
        "experts": sorted(experts),
        "expert_classes": {
            task: {"kind": kind_of(kind), "class": name}
            for task, kind in classes.items()
            if not is_builtin(name := class_name(kind))
        },
        "shared": {
            task: next(i for i, vector in enumerate(shared) if vector is packed.shared)
            for task, packed in experts.items()
            if packed.shared is not None
        },
        "router": _describe_router(model.router) if model.router is not None else None,
        "threshold": model.threshold,
        "top_n": model.top_n,
    }


def _describe_router(router: nn.Module) -> dict[str, Any]:
    """A router as plain data: its `config`, or its class and arguments if it is from outside freemerge."""
    config: Any = getattr(router, "config", None)
    if type(router) in (ConvRouter, EarlyRouter):
        return config
    arguments = recipe_arguments(router, "FreeModel: the router")
    if arguments is None and isinstance(config, dict):
        arguments = {key: value for key, value in config.items() if key != "kind"}
    return {"class": class_name(type(router)), "arguments": arguments}


def _shared_vectors(model: FreeModel) -> list[Mapping]:
    """The task vectors that masked experts share, without duplicates."""
    vectors: list[Mapping] = []
    for packed in model.packed_experts.values():
        if packed.shared is not None and not any(packed.shared is vector for vector in vectors):
            vectors.append(packed.shared)
    return vectors


def _write(model: FreeModel, directory: Path, description: dict[str, Any]) -> None:
    """Write all files of a model to an empty folder."""
    model.backbone.save_pretrained(directory)
    merged_hash = hash_tensors(model.backbone.weights())
    for task, packed in model.packed_experts.items():  # one by one, as an unpacked expert takes six times the memory
        expert = packed.unpacked().tagged(task=task, merged_hash=merged_hash)
        save_expert(directory / "experts" / f"{task}.safetensors", expert)
    for index, vector in enumerate(_shared_vectors(model)):
        save_checkpoint(directory / "shared_vectors" / f"{index}.safetensors", vector)
    save_checkpoint(directory / "heads.safetensors", model.heads.state_dict())
    if model.router is not None:
        stored = getattr(model.router, "stored", model.router.state_dict)
        save_checkpoint(directory / "router.safetensors", stored())
    text = json.dumps({**description, "merged_hash": merged_hash}, indent=2, ensure_ascii=False)
    (directory / "freemerge.json").write_text(text + "\n", encoding="utf-8")


@contextmanager
def _staged(directory: Path) -> Iterator[Path]:
    """Provide a temporary folder whose files move to `directory` at the end of the block, or are removed on an error.

    `freemerge.json` moves last, so a folder that has it is complete.
    """
    directory = directory.resolve()
    if directory.is_file():
        raise ValueError(f"FreeModel: {directory} is a file; a model is saved as a folder")
    is_new = not directory.exists()
    directory.mkdir(parents=True, exist_ok=True)
    staged = Path(tempfile.mkdtemp(prefix=".partial-", dir=directory))
    try:
        yield staged
        written = [path.relative_to(staged) for path in staged.rglob("*") if path.is_file()]
        last, was_a_model = Path("freemerge.json"), (directory / "freemerge.json").exists()
        (directory / last).unlink(missing_ok=True)
        for path in sorted(written, key=lambda path: path == last):
            if path == last and was_a_model:
                _remove_old_files(directory, {directory / path for path in written})
            (directory / path).parent.mkdir(parents=True, exist_ok=True)
            os.replace(staged / path, directory / path)
    finally:
        shutil.rmtree(staged, ignore_errors=True)
        if is_new and not any(directory.iterdir()):
            directory.rmdir()


def _remove_old_files(directory: Path, written: Collection[Path]) -> None:
    """Remove the files of an earlier FREE model that the new one has not replaced, such as experts of other tasks."""
    for pattern in _PATTERNS:
        for path in directory.glob(pattern):
            if path not in written and path.is_file():
                path.unlink()


@torch.random.fork_rng(devices=[])  # building modules draws random weights, which the folder's then replace
def load_free_model(
    directory: str | Path,
    backbone: Backbone | None = None,
    *,
    heads: Mapping[str, nn.Module] | None = None,
    router: Router | None = None,
    trust_remote_code: bool = False,
) -> FreeModel:
    """Load a folder written by `save_free_model`.

    Args:
        directory: the folder, or the model's name on the Hub (`org/name`, `org/name@revision`).
        backbone: an object for a backbone of a class of your own; it gets the folder's weights.
        heads: task → object for a head of a class of your own; they get the folder's weights.
        router: an object for a router of a class of your own; it gets the folder's weights.
        trust_remote_code: whether classes from outside freemerge that the folder names may be imported, which runs
            their code.

    Returns:
        The model, in evaluation mode.

    Raises:
        CheckpointError: if the folder is not a FREE model, its files do not match each other, or it names a class that
            may not or cannot be imported.
    """
    directory, where = locate(directory), str(directory)
    description = _read_description(directory)
    passed = backbone is not None
    if backbone is None:
        backbone = load_backbone(directory, trust_remote_code)
    with exclusive(backbone.model):  # a backbone that is passed may be in use
        merged_hash = hash_tensors(backbone.weights())
        if passed and merged_hash != description["merged_hash"]:
            backbone.load_folder(directory)
            merged_hash = hash_tensors(backbone.weights())
    if merged_hash != description["merged_hash"]:
        raise CheckpointError(
            f"{directory}: the merged backbone has hash {merged_hash[:12]}, and freemerge.json was written for "
            f"{description['merged_hash'][:12]}; the folder's files do not belong together, save the model again"
        )
    own_heads = _load_heads(directory, description, backbone, heads or {}, trust_remote_code)
    if router is None and description["router"] is not None:
        router = _build_router(description["router"], where, trust_remote_code)
    if router is not None:
        _load_state(router, load_checkpoint(directory / "router.safetensors"), where, "the router")
    model = FreeModel(
        backbone,
        own_heads,
        _load_experts(directory, description, merged_hash, trust_remote_code),
        router,
        {task: info["class_names"] for task, info in description["tasks"].items() if info["class_names"]},
        description["threshold"],
        description["top_n"],
    )
    return model.eval()


def has_experts(directory: str | Path) -> bool:
    """Whether a folder is a FREE model with experts.

    Args:
        directory: the folder.

    Raises:
        CheckpointError: if its `freemerge.json` is damaged or of another format.
    """
    path = expand(directory) / "freemerge.json"
    return path.is_file() and bool(_read_description(expand(directory))["experts"])


def _read_description(directory: Path) -> dict[str, Any]:
    """The content of `freemerge.json`."""
    try:
        description = json.loads((directory / "freemerge.json").read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{directory}: not a FREE model (no freemerge.json)") from error
    except ValueError as error:
        raise CheckpointError(f"{directory}/freemerge.json: damaged ({error}); save the model again") from error
    found = description.get("format") if isinstance(description, dict) else None
    if found not in (FORMAT, _OLD):
        raise CheckpointError(f"{directory}/freemerge.json: format {found!r}, expected {FORMAT!r}")
    return description


def _load_heads(
    directory: Path, description: Mapping[str, Any], backbone: Backbone, given: Mapping[str, nn.Module], trust: bool
) -> dict[str, nn.Module]:
    """Task → head with the folder's weights."""
    heads: dict[str, nn.Module] = {}
    for task, info in description["tasks"].items():
        described = info.get("head")
        if task in given:
            heads[task] = given[task]
        elif described is None:  # in the old format
            heads[task] = nn.Linear(backbone.feature_dim, info["num_classes"])
        elif "same_as" in described:
            heads[task] = heads[described["same_as"]]
        else:
            what, remedy = f"the head of {task!r}", f"pass heads={{{task!r}: …}}"
            heads[task] = build_head(described, str(directory), what, remedy, trust)
    if unknown := given.keys() - heads.keys():
        raise CheckpointError(f"{directory}: no tasks {', '.join(unknown)} for the heads; tasks: {', '.join(heads)}")
    stored = {name: tensor.clone() for name, tensor in load_checkpoint(directory / "heads.safetensors").items()}
    _load_state(TaskModules(heads), stored, str(directory), "a head", assign=True)  # keep the dtype of the file
    return heads


def _load_state(module: nn.Module, state: Mapping[str, Any], where: str, what: str, assign: bool = False) -> None:
    """`load_state_dict` with a one-line CheckpointError; `where` and `what` are for its message."""
    try:
        module.load_state_dict(state, assign=assign)
    except RuntimeError as error:
        raise CheckpointError(f"{where}: {what} does not match its file ({' '.join(str(error).split())})") from error


def _load_experts(
    directory: Path, description: Mapping[str, Any], merged_hash: str, trust: bool
) -> dict[str, PackedExpert]:
    """Task → expert."""
    vectors, experts = {}, {}
    for task in description["experts"]:
        if (named := description.get("expert_classes", {}).get(task)) is not None and not is_registered(named["kind"]):
            remedy = "import its module first"
            import_class(named["class"], str(directory), f"the expert of {task!r}", remedy, trust)
        index = description.get("shared", {}).get(task)
        if index is not None and index not in vectors:
            vectors[index] = load_checkpoint(directory / "shared_vectors" / f"{index}.safetensors")
        path = directory / "experts" / f"{task}.safetensors"
        expert = load_expert(path, merged=merged_hash, shared=vectors.get(index))
        experts[task] = PackedExpert(expert)  # one by one, as an unpacked expert takes six times the memory
    return experts


def _build_router(description: Mapping[str, Any], where: str, trust: bool) -> Router:
    """An untrained router from its description."""
    if (name := description.get("class")) is None:
        return make_router(description)
    kind = import_class(name, where, "the router", "pass router=…", trust)
    return instantiate(kind, description["arguments"], where, "the router", "pass router=…")
