"""Export a FREE model for PEFT and servers of LoRA adapters, with this folder:

backbone/          the merged backbone as a Hugging Face folder, with its tokenizer
adapters/<task>/   each low-rank expert as a LoRA adapter of this backbone, in PEFT's format
adapters.json      the adapters, their ranks, and which servers can load them
README.md          how to load and serve them
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from freemerge.checkpoints import expand, hash_tensors, save_checkpoint
from freemerge.experts import LoraAdapter, LowRankExpert, as_lora, exclusive, kind_of
from freemerge.models.backbones.base import RECIPE
from freemerge.models.backbones.encoder import TransformersBackbone
from freemerge.models.backbones.language import LanguageBackbone
from freemerge.models.free_model import FreeModel

FORMAT = "freemerge-adapters-1"
_KINDS = {"causal_lm": "CAUSAL_LM", "seq2seq": "SEQ_2_SEQ_LM"}
_VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # the values of its --max-lora-rank


def export_experts(model: FreeModel, directory: str | Path) -> Path:
    """Write a model's backbone, and its experts as LoRA adapters; completely or not at all.

    Args:
        model: the model, with low-rank experts and a backbone of transformers.
        directory: the folder, which must not exist or be empty.

    Returns:
        The folder.

    Raises:
        ValueError: if the folder has files, the backbone is not one of transformers, an expert is not of low rank, or
            PEFT cannot express a change of an expert.
    """
    directory = expand(directory).resolve()
    if directory.is_file() or (directory.is_dir() and any(directory.iterdir())):
        raise ValueError(f"{directory}: exists already; choose another folder, or remove it")
    _check(model)
    directory.parent.mkdir(parents=True, exist_ok=True)
    place = Path(tempfile.mkdtemp(prefix=f".partial-{directory.name}-", dir=directory.parent))
    try:
        staged = place / directory.name  # unlike `place`, readable for whoever may read new folders
        staged.mkdir()
        with exclusive(model.backbone.model).shared():
            _write(model, staged, directory)
        os.replace(staged, directory)  # an empty folder is replaced
    finally:
        shutil.rmtree(place, ignore_errors=True)
    return directory


def _check(model: FreeModel) -> None:
    """Raise a ValueError if the model has no adapters to export."""
    if not isinstance(model.backbone, (LanguageBackbone, TransformersBackbone)):
        raise ValueError(
            f"the backbone is a {type(model.backbone).__name__}; PEFT adapters belong to models of transformers: a "
            "LanguageBackbone or a TransformersBackbone"
        )
    if not model.packed_experts:
        raise ValueError("the model has no experts to export; add the stage `experts` to its run")
    for task, packed in model.packed_experts.items():
        if not issubclass(packed.kind, LowRankExpert):
            raise ValueError(
                f"the expert of {task!r} is of kind {kind_of(packed.kind)}, and a LoRA adapter is of low rank; train "
                "the experts with experts.kind: low_rank, or serve the model with FreeModel"
            )


def _write(model: FreeModel, staged: Path, final: Path) -> None:
    """Write all files; `final` is where they will be."""
    adapters: dict[str, dict[str, Any]] = {}
    for task, packed in model.packed_experts.items():  # first, as they may be refused
        expert = packed.unpacked()
        assert isinstance(expert, LowRankExpert)  # see `_check`
        try:
            adapter = as_lora(model.backbone.model, expert)
        except ValueError as error:
            raise ValueError(f"the expert of {task!r}: {error}") from error
        kind = _KINDS[model.backbone.kind] if isinstance(model.backbone, LanguageBackbone) else None
        adapters[task] = _write_adapter(adapter, staged / "adapters" / task, final / "backbone", kind)
    model.backbone.save_pretrained(staged / "backbone")
    (staged / "backbone" / RECIPE).unlink(missing_ok=True)
    description = {
        "format": FORMAT,
        "backbone": "backbone",
        "merged_hash": hash_tensors(model.backbone.weights()),
        "adapters": {task: {"folder": f"adapters/{task}", **facts} for task, facts in adapters.items()},
        "without_expert": [task for task in model.tasks if task not in adapters],
    }
    text = json.dumps(description, indent=2, ensure_ascii=False)
    (staged / "adapters.json").write_text(text + "\n", encoding="utf-8")
    (staged / "README.md").write_text(_readme(model, adapters), encoding="utf-8")


def _write_adapter(adapter: LoraAdapter, folder: Path, backbone: Path, kind: str | None) -> dict[str, Any]:
    """Write an adapter's folder; returns what `adapters.json` says of it."""
    folder.mkdir(parents=True)
    save_checkpoint(folder / "adapter_model.safetensors", adapter.tensors)
    config = {"base_model_name_or_path": str(backbone), "task_type": kind, **adapter.config}
    text = json.dumps(config, indent=2, ensure_ascii=False)
    (folder / "adapter_config.json").write_text(text + "\n", encoding="utf-8")
    return {
        "rank": adapter.config["r"],
        "modules_to_save": adapter.config["modules_to_save"] or [],
        "lora_bias": adapter.config["lora_bias"],
        "only_factors": adapter.only_factors,
        "bytes": (folder / "adapter_model.safetensors").stat().st_size,
    }


def _readme(model: FreeModel, adapters: Mapping[str, Mapping[str, Any]]) -> str:
    """The text of README.md: how to load the adapters in PEFT and to serve those that vLLM takes."""
    first = next(iter(adapters))
    auto = getattr(model.backbone, "auto_class", None) or _auto_class(model)
    lines = [
        "# A merged backbone with a LoRA adapter per task",
        "",
        "Written by `python -m freemerge export-experts`. `adapters.json` lists the adapters. In this folder:",
        "",
        "```python",
        "from peft import PeftModel",
        f"from transformers import {auto}",
        "",
        f'model = PeftModel.from_pretrained({auto}.from_pretrained("backbone"), "adapters/{first}", "{first}")',
        *(f'model.load_adapter("adapters/{task}", "{task}")' for task in list(adapters)[1:]),
        f'model.set_adapter("{first}")',
        "```",
    ]
    if not isinstance(model.backbone, LanguageBackbone):
        return "\n".join([*lines, "", "The tasks' heads are in the FREE model, not here."]) + "\n"
    served = [task for task, facts in adapters.items() if facts["only_factors"]]
    if served and model.backbone.kind == "causal_lm":
        rank = max(adapters[task]["rank"] for task in served)
        limit = next((known for known in _VLLM_RANKS if known >= rank), rank)
        modules = " ".join(f"{task}=adapters/{task}" for task in served)
        command = f"vllm serve backbone --enable-lora --max-lora-rank {limit} --lora-modules {modules}"
        lines += [
            "",
            "vLLM serves all of them at once; a request names its task as `model`:",
            "",
            "```bash",
            command,
            "```",
        ]
    if left := [task for task in adapters if task not in served]:
        lines += [
            "",
            f"The adapters of {', '.join(left)} also change norms, biases, embeddings or convolutions "
            "(`modules_to_save` and `lora_bias` in `adapters.json`), which PEFT loads and most servers do not. For "
            "experts of linear layers alone, train with `experts.vectors: none` and `experts.arguments: {exclude: "
            "[...]}`, which names the embeddings.",
        ]
    return "\n".join(lines) + "\n"


def _auto_class(model: FreeModel) -> str:
    """The class of transformers that loads the backbone."""
    if not isinstance(model.backbone, LanguageBackbone):
        return "AutoModel"
    return "AutoModelForCausalLM" if model.backbone.kind == "causal_lm" else "AutoModelForSeq2SeqLM"
