"""Every configuration of a fine-tuning runs: two steps of each fit, on a tiny random model and tiny files of its kind.

What a configuration says stays as it is (head, adapter, schedule, kinds of sources, metrics), but for what names
something to download or takes long: an overlay of a few lines goes over it, as on the command line.
"""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from freemerge.checkpoints import load_checkpoint
from freemerge.cli import main
from tests.configs import tiny_files

ROOT = Path(__file__).parent.parent.parent
MERGE = {"scales": [0.5], "methods": {"average": {"class_path": "WeightAverage"}, "FR": {"class_path": "FRMerging"}}}
COMMON = {
    "trainer": {
        "accelerator": "cpu", "devices": 1, "max_epochs": -1, "max_steps": 2, "precision": "32-true",
        "enable_progress_bar": False, "enable_model_summary": False, "log_every_n_steps": 1,
        "accumulate_grad_batches": 1,
    },
    "merge": MERGE,
}  # fmt: skip

ENCODER = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
VOCABULARY = {"vocab_size": len(tiny_files.WORDS), "pad_token_id": 0}
VIT = {"model_type": "vit", **ENCODER, "image_size": 8, "patch_size": 4, "num_channels": 3}
CONVNEXT = {
    "model_type": "convnextv2",
    "num_channels": 3,
    "hidden_sizes": [8, 8, 16, 16],
    "depths": [1, 1, 1, 1],
    "patch_size": 2,
}
ROBERTA = {"model_type": "roberta", **ENCODER, **VOCABULARY, "max_position_embeddings": 64, "type_vocab_size": 2}
BERT = {"model_type": "bert", **ENCODER, **VOCABULARY, "max_position_embeddings": 64}
CLIP = {
    "model_type": "clip",
    "projection_dim": 12,
    "text_config": {**ENCODER, **VOCABULARY, "max_position_embeddings": 16, "bos_token_id": 2, "eos_token_id": 3},
    "vision_config": {**ENCODER, "image_size": 8, "patch_size": 4},
}
T5 = {
    "model_type": "t5", **VOCABULARY, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_decoder_layers": 1,
    "num_heads": 2, "feed_forward_proj": "gated-gelu", "decoder_start_token_id": 0, "eos_token_id": 3,
}  # fmt: skip
QWEN = {
    "model_type": "qwen2", **ENCODER, **VOCABULARY, "num_key_value_heads": 2, "max_position_embeddings": 64,
    "bos_token_id": 2, "eos_token_id": 3,
}  # fmt: skip


def backbone(config: dict[str, Any], **arguments: Any) -> dict[str, Any]:
    """A random model in place of the pretrained one."""
    return {"model": {"init_args": {"backbone": {"init_args": {"pretrained": None, "config": config, **arguments}}}}}


class Overlays:
    """Configuration → what goes over it; a method for each, which writes the files that it needs."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tokenizer = tiny_files.write_tokenizer(folder / "tokenizer")

    def sources(self, name: str, **changes: dict[str, Any]) -> dict[str, Any]:
        """The sources of a configuration with some arguments changed, by task."""
        written = yaml.safe_load((ROOT / "configs" / f"{name}.yaml").read_text())["data"]["init_args"]["sources"]
        for task, arguments in changes.items():
            written[task]["init_args"].update(arguments)
        return {"data": {"init_args": {"sources": written, "num_workers": 0, "batch_size": 8}}}

    def image_folders(self) -> dict[str, Any]:
        places = {
            task: {"folder": tiny_files.write_picture_folders(self.folder / task)} for task in ("birds", "planes")
        }
        tasks = {task: {**place, "image_size": 8} for task, place in places.items()}
        return backbone(VIT) | self.sources("image_folders", **tasks)

    def clip_zero_shot(self) -> dict[str, Any]:
        fake = {"dataset": "FakeData", "root": None, "image_size": 8, "val": None,
                "train": {"size": 24, "image_size": [3, 9, 9], "num_classes": 3}}  # fmt: skip
        tasks = dict.fromkeys(("svhn", "mnist", "eurosat", "dtd", "cifar10"), fake)
        return backbone(CLIP, tokenizer=self.tokenizer) | self.sources("clip_zero_shot", **tasks)

    def torchvision_resnet(self) -> dict[str, Any]:
        tiny_files.write_npz(self.folder / "npz" / "one.npz")
        tiny_files.write_npz(self.folder / "npz" / "two.npz", grey=True)
        model = {"name": "shufflenet_v2_x0_5", "weights": None}
        return {
            "model": {"init_args": {"backbone": {"init_args": model}}},
            "data": {"init_args": {"folder": str(self.folder / "npz"), "image_size": 32, "batch_size": 8}},
            "merge": {**MERGE, "batch_norm_batches": 2},
        }

    def vision8_vit(self) -> dict[str, Any]:
        for task, grey in (("one", False), ("two", True)):
            tiny_files.write_npz(self.folder / "npz" / f"{task}.npz", grey=grey)
        data = {"folder": str(self.folder / "npz"), "image_size": 8, "batch_size": 8}
        cache = {"cache": str(self.folder / "cache")}
        return backbone(VIT) | {"data": {"init_args": data}, "pretrain": cache}

    def own_module(self) -> dict[str, Any]:
        overlay = self.torchvision_resnet()
        module = {"init_args": {"num_classes": 20}}
        overlay["model"] = {"init_args": {"backbone": {"init_args": {"module": module, "feature_dim": 20}}}}
        return overlay

    def text_classification(self) -> dict[str, Any]:
        path = tiny_files.write_dataset(self.folder / "texts", pictures=False)
        changes = {"path": path, "subset": None, "splits": {"train": "train", "test": "test"}}
        tasks = {task: {**changes, "tokenizer": self.tokenizer} for task in ("cola", "mrpc", "sst2", "rte")}
        return backbone(ROBERTA) | self.sources("text_classification", **tasks)

    def hugging_face_images(self) -> dict[str, Any]:
        path = tiny_files.write_dataset(self.folder / "pictures", pictures=True)
        whole = {"path": path, "splits": {"train": "train", "test": "test"}, "image_size": 32}
        # A stream needs a builder: the files that `save_to_disk` wrote are read as what they are, Arrow.
        files = {split: str(next((self.folder / "pictures" / split).glob("*.arrow"))) for split in ("train", "test")}
        streamed = {"path": "arrow", "data_files": files, "train_size": 20, "test_size": 6}
        food = {**whole, **streamed}
        return backbone(CONVNEXT) | self.sources("hugging_face_images", pets=whole, food=food)

    def text_regression(self) -> dict[str, Any]:
        columns, table = ["text", "score"], tiny_files.rows()
        renamed = [{**row, "first": row["text"]} for row in table]
        similarity = tiny_files.write_table(self.folder / "s.csv", ["split", "first", "second", "score"], renamed)
        parts = {
            split: tiny_files.write_table(self.folder / f"q_{split}.jsonl", columns, part)
            for split, part in (("train", table[:20]), ("test", table[20:]))
        }
        return backbone(BERT) | self.sources(
            "text_regression",
            similarity={"path": similarity, "tokenizer": self.tokenizer},
            quality={"path": parts, "tokenizer": self.tokenizer},
        )

    def text_lora(self) -> dict[str, Any]:
        tiny_files.write_table(self.folder / "tables" / "acceptable.tsv", ["split", "text", "label"])
        tiny_files.write_table(self.folder / "tables" / "alike.parquet", ["split", "text", "second", "label"])
        data = {"folder": str(self.folder / "tables"), "tokenizer": self.tokenizer, "batch_size": 8}
        return backbone(ROBERTA) | {"data": {"init_args": data}}

    def text8(self) -> dict[str, Any]:
        pairs = [{**row, "text_a": row["text"], "text_b": row["second"]} for row in tiny_files.rows()]
        for task, rows in (("cola", [{**row, "text_b": ""} for row in pairs]), ("rte", pairs)):
            columns = ["split", "text_a", "text_b", "label"]
            tiny_files.write_table(self.folder / "tables" / f"{task}.tsv", columns, rows)
        data = {"folder": str(self.folder / "tables"), "tokenizer": self.tokenizer, "batch_size": 8}
        return backbone(BERT) | {"data": {"init_args": data}}

    def cross_domain(self) -> dict[str, Any]:
        for task in ("books", "films", "tweets", "dialogues"):
            tiny_files.write_table(self.folder / "domains" / f"{task}.csv", ["split", "text", "label"])
        data = {"folder": str(self.folder / "domains"), "tokenizer": self.tokenizer, "batch_size": 8}
        return backbone(ROBERTA) | {"data": {"init_args": data}}

    def seq2seq(self) -> dict[str, Any]:
        asked = [{**row, "question": row["text"]} for row in tiny_files.rows()]
        for task in ("one", "two"):
            tiny_files.write_table(self.folder / "q" / f"{task}.jsonl", ["split", "question", "answer"], asked)
        data = {"folder": str(self.folder / "q"), "tokenizer": self.tokenizer, "batch_size": 8}
        return backbone(T5) | {"data": {"init_args": data}}

    def ia3(self) -> dict[str, Any]:
        overlay = self.seq2seq()
        overlay["model"]["init_args"]["backbone"]["init_args"]["dtype"] = "float32"
        return overlay

    def causal_lm_lora(self) -> dict[str, Any]:
        asked = [{**row, "prompt": row["text"]} for row in tiny_files.rows()]
        path = tiny_files.write_table(self.folder / "p.jsonl", ["split", "prompt", "answer"], asked)
        change = {"path": path, "tokenizer": self.tokenizer, "max_length": 32}
        return backbone(QWEN, dtype="float32") | self.sources("causal_lm_lora", arithmetic=change, code=change)


CONFIGS = sorted(name for name in vars(Overlays) if (ROOT / "configs" / f"{name}.yaml").exists())


def test_no_configuration_is_left_out() -> None:
    measured_elsewhere = {"merge", "quickstart", "short", "vision8"}
    written = {path.stem for path in (ROOT / "configs").glob("*.yaml")} - measured_elsewhere
    known = {name for name in written if "FineTuner" in (ROOT / "configs" / f"{name}.yaml").read_text()}
    assert set(CONFIGS) == known


@pytest.mark.parametrize(
    ("option", "instead"),
    [("--experts.mixup=1", "set it to 0"), ("--router.kind=conv", "choose router.kind: early")],
)
def test_what_is_for_images_is_refused_for_texts_before_anything_is_trained(
    option: str, instead: str, tmp_path: Path, monkeypatch, capsys
) -> None:
    (tmp_path / "overlay.yaml").write_text(yaml.safe_dump({**COMMON, **Overlays(tmp_path).text_lora()}))
    monkeypatch.chdir(ROOT)
    arguments = ["fit", "--config", "configs/text_lora.yaml", "--config", str(tmp_path / "overlay.yaml"), option]
    assert main([*arguments, "--run.folder", str(tmp_path / "run")]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "is for images, but the inputs of task 'acceptable' are no images (C, H, W)" in said
    assert said.endswith(f"they have the keys input_ids, attention_mask; {instead}")
    assert not (tmp_path / "run" / "finetune").exists()


@pytest.mark.parametrize("name", CONFIGS)
def test_a_configuration_runs(name: str, tmp_path: Path, monkeypatch, capsys) -> None:
    run = tmp_path / "run"
    overlay = {**COMMON, **getattr(Overlays(tmp_path), name)()}
    (tmp_path / "overlay.yaml").write_text(yaml.safe_dump(overlay))
    monkeypatch.chdir(ROOT)
    arguments = ["fit", "--config", f"configs/{name}.yaml", "--config", str(tmp_path / "overlay.yaml")]
    # Experts and router on one suite of texts, one of images with batch norm, and a module that a folder cannot build:
    # the rest would only repeat it.
    whole = name in ("text_lora", "torchvision_resnet", "own_module")
    stages = [] if whole else ["--run.stages", "[pretrain, finetune, merge, evaluate]"]
    assert main([*arguments, "--run.folder", str(run), *stages]) == 0
    assert (run / "free_model").is_dir() == (not stages)
    report = json.loads((run / "report.json").read_text())
    tasks = [path.name for path in sorted((run / "finetune").iterdir())]
    lines = {row["name"]: row for row in report["rows"]}
    assert set(lines["FR"]["scores"]) == set(tasks)
    assert all(isinstance(score, float) for score in lines["individual"]["scores"].values())
    written = yaml.safe_load((ROOT / "configs" / f"{name}.yaml").read_text())
    assert (run / "base.safetensors").exists() == ("pretraining" in written["data"]["init_args"])
    with_adapter = "peft" in written["model"]["init_args"]
    assert all((run / "finetune" / task / "adapter").is_dir() == with_adapter for task in tasks)
    base = load_checkpoint(run / "base.safetensors") if (run / "base.safetensors").exists() else None
    for task in tasks:
        weights = load_checkpoint(run / "finetune" / task / "backbone.safetensors")
        merged = load_checkpoint(run / "merge" / "fr.safetensors")
        assert weights.keys() == merged.keys()
        assert not any("lora" in key or "base_layer" in key for key in weights)
        assert base is None or weights.keys() == base.keys()
    if not stages:
        check_other_commands([*arguments[1:], "--run.folder", str(run)], lines["FREE trained (routed)"], capsys)
    assert set(lines["FR"]["held_out"]) == set(written["data"]["init_args"].get("held_out", ()))


def check_other_commands(arguments: list[str], routed: dict[str, Any], capsys) -> None:
    """`test` measures what the report says of the routed model; `predict` writes a line for each test sample."""
    capsys.readouterr()
    assert main(["test", *arguments]) == 0
    said = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for task, score in routed["scores"].items():
        assert re.search(rf"{task} \w+ {100 * score:.1f}\b", said)
    assert main(["predict", *arguments]) == 0
    with (Path(arguments[-1]) / "predictions.csv").open() as file:
        rows = list(csv.DictReader(file))
    for task in routed["scores"]:
        assert [int(row["index"]) for row in rows if row["loader"] == task] == list(range(len(rows) // 2))
