"""The models that the benchmarks merge: random, with real names and shapes and the statistics of real fine-tuning.

- The base is N(0, 0.02), norms about one.
- A task vector has heavy tails (normal × log-normal), a size per model and one per tensor, and is zero in the tensors
  that a fine-tuning leaves frozen: the embedding of every other model.
- Every tensor has a seed of its own, from its name: the same models on every machine.
- Models are written once, with plain safetensors; a folder with models of the same description is reused.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

DEFAULT_FOLDER = Path(__file__).resolve().parents[2] / "runs" / "benchmarks"
_VERSION = 1  # version of the written models: after a change, existing folders are written again
_SHARD = 200_000_000


@dataclass(frozen=True)
class Case:
    """A base and its fine-tuned models.

    Args:
        name: of the folder.
        title: for tables.
        shapes: name → shape of every tensor.
        dtype: "float32" or "bfloat16".
        models: K.
        config: of the Hugging Face folders; None for plain files, one per model.
        frozen: names of the tensors that every other model leaves unchanged.
    """

    name: str
    title: str
    shapes: Mapping[str, tuple[int, ...]]
    dtype: str
    models: int
    config: Mapping[str, Any] | None = None
    frozen: tuple[str, ...] = field(default=())

    @property
    def parameters(self) -> int:
        """Number of values of one model."""
        return sum(_count(shape) for shape in self.shapes.values())

    @property
    def largest(self) -> int:
        """Bytes of the largest tensor in float32."""
        return 4 * max(_count(shape) for shape in self.shapes.values())


class Inputs(NamedTuple):
    """The paths of the models: files or folders."""

    base: Path
    models: list[Path]

    @property
    def files(self) -> list[Path]:
        """All files of weights."""
        found = []
        for path in (self.base, *self.models):
            found += sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
        return found

    @property
    def bytes(self) -> int:
        """Size of all of them."""
        return sum(path.stat().st_size for path in self.files)


def vit_large(models: int = 8, *, layers: int = 24) -> Case:
    """The vision tower of CLIP ViT-L/14 (303 M parameters), or its first layers."""
    case = vit(models, layers=layers, width=1024, patch=14, positions=257)
    depth = "" if layers == 24 else f", the first {layers} of its 24 layers"
    return replace(case, name=f"vit-l-{layers}-{models}", title=f"CLIP ViT-L/14's vision tower{depth}, float32")


def vit(models: int = 8, *, layers: int = 12, width: int = 768, patch: int = 32, positions: int = 50) -> Case:
    """The vision tower of CLIP ViT-B/32 (88 M parameters) in float32, one file per model."""
    shapes: dict[str, tuple[int, ...]] = {
        "embeddings.class_embedding": (width,),
        "embeddings.patch_embedding.weight": (width, 3, patch, patch),
        "embeddings.position_embedding.weight": (positions, width),
        "pre_layrnorm.weight": (width,),
        "pre_layrnorm.bias": (width,),
    }
    for layer in range(layers):
        prefix = f"encoder.layers.{layer}."
        for projection in ("k", "v", "q", "out"):
            shapes[f"{prefix}self_attn.{projection}_proj.weight"] = (width, width)
            shapes[f"{prefix}self_attn.{projection}_proj.bias"] = (width,)
        for norm in ("layer_norm1", "layer_norm2"):
            shapes[f"{prefix}{norm}.weight"] = shapes[f"{prefix}{norm}.bias"] = (width,)
        shapes |= {f"{prefix}mlp.fc1.weight": (4 * width, width), f"{prefix}mlp.fc1.bias": (4 * width,)}
        shapes |= {f"{prefix}mlp.fc2.weight": (width, 4 * width), f"{prefix}mlp.fc2.bias": (width,)}
    shapes |= {"post_layernorm.weight": (width,), "post_layernorm.bias": (width,)}
    shapes = {f"vision_model.{name}": shape for name, shape in shapes.items()}
    return Case(
        f"vit-{layers}x{width}-{models}",
        "CLIP ViT-B/32's vision tower, float32",
        shapes,
        "float32",
        models,
        frozen=("vision_model.embeddings.patch_embedding.weight",),
    )


def llama(models: int = 4, *, layers: int = 24, width: int = 1024, vocabulary: int = 32_000) -> Case:
    """A Llama of 0.35 B parameters in bfloat16, Hugging Face folders with shards and an index."""
    inner, head = width * 11 // 4, 64
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, width)}
    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        for projection, rows in {"q": width, "k": width // 2, "v": width // 2, "o": width}.items():
            shapes[f"{prefix}self_attn.{projection}_proj.weight"] = (rows, width)
        for projection, shape in {"gate": (inner, width), "up": (inner, width), "down": (width, inner)}.items():
            shapes[f"{prefix}mlp.{projection}_proj.weight"] = shape
        for norm in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"{prefix}{norm}.weight"] = (width,)
    shapes |= {"model.norm.weight": (width,), "lm_head.weight": (vocabulary, width)}
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": width // head,
        "num_key_value_heads": width // head // 2,
        "head_dim": head,
        "vocab_size": vocabulary,
        "hidden_act": "silu",
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10_000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return Case(
        f"llama-{layers}x{width}-{models}",
        "Llama, bfloat16, shards",
        shapes,
        "bfloat16",
        models,
        config,
        frozen=("model.embed_tokens.weight",),
    )


def small(case: Case) -> Case:
    """The same tensor names in a small size, to try a benchmark out."""
    if case.config is None:
        return vit(case.models, layers=2, width=128)
    return replace(llama(case.models, layers=2, width=256, vocabulary=1000), title=case.title)


def write_case(case: Case, folder: Path) -> Inputs:
    """Write a case's models into a folder, unless they exist; returns their paths."""
    home = folder / case.name
    suffix = ".safetensors" if case.config is None else ""
    inputs = Inputs(home / f"base{suffix}", [home / f"model{index}{suffix}" for index in range(case.models)])
    described = json.dumps({"version": _VERSION, **asdict(case)}, sort_keys=True)
    stamp = home / "case.json"
    if not (stamp.is_file() and stamp.read_text() == described):
        shutil.rmtree(home, ignore_errors=True)
        home.mkdir(parents=True)
        for index, path in enumerate((inputs.base, *inputs.models)):
            _write_model(case, path, index - 1)
        stamp.write_text(described)
    return inputs


def draw_model(case: Case, index: int, device: str = "cpu"):
    """The base (index −1) or a fine-tuned model, name → tensor; each device draws numbers of its own."""
    return {name: _tensor(case, name, index, device) for name in case.shapes}


def _write_model(case: Case, path: Path, index: int) -> None:
    """Write the base (index −1) or a fine-tuned model."""
    from safetensors.torch import save_file

    metadata = {"format": "pt"}
    if case.config is None:
        save_file(draw_model(case, index), path, metadata=metadata)
        return
    path.mkdir()
    (path / "config.json").write_text(json.dumps(case.config, indent=2))
    shards: list[list[str]] = [[]]
    filled = 0
    for name, shape in case.shapes.items():
        size = 2 * _count(shape)
        if shards[-1] and filled + size > _SHARD:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    weight_map = {}
    for number, names in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file({name: _tensor(case, name, index) for name in names}, path / file, metadata=metadata)
        weight_map |= dict.fromkeys(names, file)
    table = {"metadata": {"total_size": 2 * case.parameters}, "weight_map": weight_map}
    (path / "model.safetensors.index.json").write_text(json.dumps(table))


def _tensor(case: Case, name: str, index: int, device: str = "cpu"):
    import torch

    def draw(seed: str, shape: tuple[int, ...]):
        digest = hashlib.sha256(f"{seed}|{name}".encode()).digest()
        generator = torch.Generator(device).manual_seed(int.from_bytes(digest[:7], "little"))
        return torch.randn(shape, generator=generator, device=device)

    shape = case.shapes[name]
    tensor = draw("base", shape) * 0.02
    if "norm" in name and name.endswith("weight"):
        tensor += 1
    dtype = getattr(torch, case.dtype)
    tensor = tensor.to(dtype)
    if index < 0 or (name in case.frozen and index % 2):
        return tensor
    size = 3e-4 * 1.35**index * float(draw(f"size {index}", ()).mul(0.4).exp())
    delta = draw(f"delta {index}", shape) * draw(f"tail {index}", shape).mul_(0.7).exp_() * size
    return (tensor.float() + delta).to(dtype)


def _count(shape: tuple[int, ...]) -> int:
    count = 1
    for length in shape:
        count *= length
    return count


def write_tiny_tensors(count: int, models: int, folder: Path) -> Inputs:
    """Write models of many tensors with four values each: little to merge, much to plan."""
    import torch
    from safetensors.torch import save_file

    home = folder / f"tiny-{count}"
    home.mkdir(parents=True, exist_ok=True)
    inputs = Inputs(home / "base.safetensors", [home / f"model{index}.safetensors" for index in range(models)])
    for index, path in enumerate((inputs.base, *inputs.models)):
        tensors = {f"model.layers.{layer}.mlp.weight": torch.full((4,), float(index)) for layer in range(count)}
        save_file(tensors, path, metadata={"format": "pt"})
    return inputs
