"""The files around a model's weights: those that any model of its architecture can use, and those that it cannot.

- Companions are configuration, tokenizer, code and licence: everything in and below the folder that is not left out.
- Weights in a subfolder that `open_checkpoint` can open (`2_Dense/model.safetensors`) are a part of the model.
- Other files of weights (`colbert_linear.pt`) are companions too, but fit only this model's weights.
- Left out: this model's weights in any format, training state, caches, and anything that is not a file.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from freemerge.checkpoints.formats.index import SUFFIX, read_index
from freemerge.checkpoints.opening import WEIGHT_FILES
from freemerge.checkpoints.writing.folder import MARKER
from freemerge.errors import CheckpointError

_WEIGHTS = re.compile(
    r".*\.(safetensors|bin|pt|pth|ckpt|h5|keras|msgpack|ot|onnx|onnx_data|gguf|ggml|tflite|pb|mlmodel|engine|distcp"
    r"|pkl|pickle|nemo|pte|npz)"
)
_OWN = re.compile(r"(model|pytorch_model)([-._].*)?\.(safetensors|bin)(\.index(\..*)?\.json)?")
# The same weights for other programs: recognized by name beside the model's own weights, by extension everywhere.
_COPIES = re.compile(r"(model|pytorch_model|tf_model|flax_model|consolidated)([-._].*)?\.(pt|pth|ckpt|safetensors)")
_FOREIGN = re.compile(
    r".*\.(h5|keras|msgpack|ot|onnx|onnx_data|gguf|ggml|tflite|pb|mlmodel|engine|distcp|nemo|pte|index\.json)"
    r"|model\.ckpt.*|openvino_.*"
)
_TRAINING = re.compile(
    r"trainer_state\.json|training_args\.(bin|json|ya?ml)|(all|train|eval|test|predict)_results\.(json|txt)"
    r"|(optimizer|scheduler|scaler)[-._\d]*\.(pt|bin|safetensors)|(rng_state|random_states).*|events\.out\..*"
    r"|latest|zero_to_fp32\.py|.*\.(lock|incomplete|tmp)"
)
_NOT_THE_MODELS = ("README.md", MARKER, "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")
_FOLDERS = re.compile(
    r"\..*|__pycache__|checkpoint-\d+|global_step\d+|runs|wandb|mlruns|lightning_logs"
    r"|original|metal|onnx|openvino|coreml|.*\.ml(package|modelc)|tflite|gguf"
)

_DEEPEST = 32  # depth of nested folders


class Companions(NamedTuple):
    """The files and folders around a model's weights."""

    files: dict[str, Path]  # relative path → full path
    weights: list[str]  # those that are weights and cannot be merged
    modules: list[str]  # subfolders with weights that can be merged
    left_out: list[str]  # files and folders that are left out


def find_companions(folder: Path, apart: Iterable[Path] = (), below: bool = True) -> Companions:
    """List the files around the weights of a model folder, and below it.

    Links to files are treated as the files; links to folders are not followed.

    Args:
        folder: the model's.
        apart: files and folders of other models to skip, which may lie inside this one.
        below: include subfolders.

    Raises:
        CheckpointError: a folder cannot be read.
    """
    others = {path.resolve() for path in apart}
    index = next((folder / name for name in WEIGHT_FILES if name.endswith(SUFFIX) and (folder / name).is_file()), None)
    own = {path.name for path in read_index(index).shards} if index else set()
    found = _walk(folder, others, below)
    modules = {name.rpartition("/")[0] for name, path in found if path and name.rpartition("/")[2] in WEIGHT_FILES}
    result = Companions({}, [], sorted(modules - {""}), [])
    for name, path in found:
        parent, _, last = name.rpartition("/")
        beside_weights = not parent or parent in modules
        if path is not None and (name in own or (beside_weights and _OWN.fullmatch(last))):
            continue
        if (
            path is None
            or name in _NOT_THE_MODELS
            or _TRAINING.fullmatch(last)
            or _FOREIGN.fullmatch(last)
            or (beside_weights and _COPIES.fullmatch(last))
        ):
            result.left_out.append(name)
            continue
        result.files[name] = path
        if _WEIGHTS.fullmatch(last):
            result.weights.append(name)
    return result


def top_companions(folder: Path) -> Companions:
    """List the files beside a file of weights that shares its folder with others: no other weights, no subfolders."""
    found = find_companions(folder, below=False)
    return Companions({name: path for name, path in found.files.items() if name not in found.weights}, [], [], [])


def _walk(folder: Path, apart: set[Path], deep: bool) -> list[tuple[str, Path | None]]:
    """Name and path of every file, sorted; the path is None for entries that are left out, such as folders or pipes."""
    found: list[tuple[str, Path | None]] = []
    below = [("", folder)]
    while below:
        above, place = below.pop()
        try:
            with os.scandir(place) as entries:
                inside = list(entries)
        except OSError as error:
            raise CheckpointError(f"{place}: cannot be read: {error.strerror or error}") from None
        for entry in inside:
            name, path = above + entry.name, Path(entry.path)
            if apart and path.resolve() in apart:
                continue
            if not entry.is_dir():
                found.append((name, path if entry.is_file() and not entry.name.startswith(".") else None))
            elif (
                entry.is_symlink()
                or _FOLDERS.fullmatch(entry.name)
                or (path / MARKER).is_file()
                or above.count("/") == _DEEPEST
            ):
                found.append((f"{name}/", None))
            elif deep:
                below.append((f"{name}/", path))
    return sorted(found)
