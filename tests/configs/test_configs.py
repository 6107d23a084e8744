"""Every configuration of a fine-tuning runs: two steps of each fit, on a tiny random model and tiny files of its kind.

An overlay of a few lines, as on the command line, replaces the parts that name downloads or take long. The rest of the
configuration is used unchanged: head, adapter, schedule, kinds of sources, metrics.
"""

from __future__ import annotations

import csv
import json
import math
import re
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from jsonargparse import ArgumentParser

from freemerge.checkpoints import CheckpointError, load_checkpoint
from freemerge.cli import main
from freemerge.data import TaskSuite
from freemerge.models import FreeModel, LanguageBackbone
from tests import processes
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
    """Settings that replace the pretrained model by a random one."""
    return {"model": {"init_args": {"backbone": {"init_args": {"pretrained": None, "config": config, **arguments}}}}}


class Overlays:
    """Configuration → overlay; one method per configuration, which also writes the files it needs."""

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
        places = {task: {"folder": tiny_files.write_image_folders(self.folder / task)} for task in ("birds", "planes")}
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
        path = tiny_files.write_dataset(self.folder / "texts", images=False)
        changes = {"path": path, "subset": None, "splits": {"train": "train", "test": "test"}}
        tasks = {task: {**changes, "tokenizer": self.tokenizer} for task in ("cola", "mrpc", "sst2", "rte")}
        return backbone(ROBERTA) | self.sources("text_classification", **tasks)

    def hugging_face_images(self) -> dict[str, Any]:
        path = tiny_files.write_dataset(self.folder / "pictures", images=True)
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

    def text_zero_shot(self) -> dict[str, Any]:
        written = yaml.safe_load((ROOT / "configs" / "text_zero_shot.yaml").read_text())
        for task, names in written["data"]["init_args"]["class_names"].items():
            rows = [
                {**row, "text_a": row["text"], "text_b": "", "label": number // 5 % len(names)}
                for number, row in enumerate(tiny_files.rows(60))
            ]
            columns = ["split", "text_a", "text_b", "label"]
            tiny_files.write_table(self.folder / "tables" / f"{task}.tsv", columns, rows)
        data = {"folder": str(self.folder / "tables"), "tokenizer": self.tokenizer, "batch_size": 8, "train_size": 30}
        methods = written["merge"]["methods"]
        return backbone(BERT) | {"data": {"init_args": data}, "merge": {"scales": [0.5], "methods": methods}}

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
    measured_elsewhere = {"clip_benchmark", "merge", "quickstart", "quickstart_base", "short", "vision8"}
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
    assert "is for images, but the inputs of task 'acceptable' are not images (C, H, W)" in said
    assert said.endswith(f"they have the keys input_ids, attention_mask; {instead}")
    assert not (tmp_path / "run" / "finetune").exists()


@pytest.mark.parametrize("name", CONFIGS)
def test_a_configuration_runs_and_its_model_is_used(name: str, tmp_path: Path, monkeypatch, capsys) -> None:
    """Run all stages of the configuration, then every other command, and the model in a fresh process."""
    run = tmp_path / "run"
    overlay = {**COMMON, **getattr(Overlays(tmp_path), name)()}
    (tmp_path / "overlay.yaml").write_text(yaml.safe_dump(overlay))
    monkeypatch.chdir(ROOT)
    arguments = ["--config", f"configs/{name}.yaml", "--config", str(tmp_path / "overlay.yaml")]
    arguments += ["--run.folder", str(run)]
    assert main(["fit", *arguments]) == 0
    written = yaml.safe_load((ROOT / "configs" / f"{name}.yaml").read_text())
    check_files(run, written)
    lines = {row["name"]: row for row in json.loads((run / "report.json").read_text())["rows"]}
    routed = "experts" in written["run"].get("stages", ["experts"])
    check_other_commands(arguments, lines["FREE trained (routed)" if routed else "FR"]["scores"], capsys)
    rows = read_predictions(run)
    assert all(row["sample"] for row in rows)
    own = name == "own_module"  # a folder imports nobody's module by itself
    with pytest.raises(CheckpointError, match="SqueezeNet, which is not imported by default") if own else nullcontext():
        check_in_a_fresh_process(run, rows)
    if own:
        check_in_a_fresh_process(run, rows, trust_remote_code=True)


def check_files(run: Path, written: dict[str, Any]) -> None:
    """Check the files of the stages, and the report."""
    tasks = [path.name for path in sorted((run / "finetune").iterdir())]
    lines = {row["name"]: row for row in json.loads((run / "report.json").read_text())["rows"]}
    assert set(lines["FR"]["scores"]) == set(tasks)
    assert all(isinstance(score, float) for score in lines["individual"]["scores"].values())
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
    assert set(lines["FR"]["held_out"]) == set(written["data"]["init_args"].get("held_out", ()))


def check_other_commands(arguments: list[str], scores: dict[str, float], capsys) -> None:
    """`test` gives the report's numbers, `validate` runs, `predict` writes one line per test sample."""
    capsys.readouterr()
    assert main(["test", *arguments]) == 0
    said = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for task, score in scores.items():
        assert re.search(rf"{task} \w+ {100 * score:.1f}\b", said)
    assert main(["validate", *arguments]) == 0
    assert main(["predict", *arguments]) == 0
    for task in scores:
        places = [int(row["index"]) for row in read_predictions(Path(arguments[-1])) if row["loader"] == task]
        assert places == list(range(len(places))) != []


def read_predictions(run: Path) -> list[dict[str, str]]:
    with (run / "predictions.csv").open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def check_in_a_fresh_process(run: Path, rows: list[dict[str, str]], trust_remote_code: bool = False) -> None:
    """A fresh process predicts for each task's first samples what `predict` wrote."""
    inputs, suite = {}, suite_of(run)
    for task in suite.names:
        inputs[task] = next(iter(suite[task].predict_dataloader()))[0]
    with processes.forkserver().Pool(1) as pool:
        said = pool.apply(in_a_fresh_process, (str(run / "free_model"), inputs, trust_remote_code))
    for task, values in said.items():
        own = [row for row in rows if row["loader"] == task][: len(values)]
        for row, (routed, label, logits) in zip(own, values, strict=True):
            assert row["routed_task"] == routed
            if isinstance(label, str):
                # transformers reads the words' tokenizer as Qwen2's, which joins tokens without spaces
                assert row["value"].replace(" ", "") == label.replace(" ", "")
            elif row["class"]:
                names = suite.task(routed).class_names
                assert row["class"] == names[label]
            elif len(logits) == 1:
                assert float(row["value"]) == pytest.approx(logits[0], rel=1e-4, abs=1e-5)


def in_a_fresh_process(
    folder: str, inputs: dict[str, Any], trust_remote_code: bool
) -> dict[str, list[tuple[str, int | str, list[float]]]]:
    """Task → routed task, class or answer, and outputs of each sample; runs in a process of its own."""
    assert "freemerge.training" not in sys.modules
    model = FreeModel.from_pretrained(folder, trust_remote_code=trust_remote_code)
    said = {}
    with torch.no_grad():
        for task, batch in inputs.items():
            if isinstance(model.backbone, LanguageBackbone):
                told = None if model.router is not None else task
                answers = model.generate(batch, task=told, max_new_tokens=128, do_sample=False)
                decode = model.backbone.load_tokenizer().decode
                texts = [decode(tokens, skip_special_tokens=True) for tokens in answers.token_lists()]
                said[task] = [(routed, text, []) for routed, text in zip(answers.task_names, texts, strict=True)]
                continue
            output = model(batch, task=None if model.router is not None else task)
            finite = [[value for value in row if math.isfinite(value)] for row in output.logits.flatten(1).tolist()]
            said[task] = list(zip(output.task_names, output.labels.tolist(), finite, strict=True))
    return said


def suite_of(run: Path) -> TaskSuite:
    """The suite of a run, built from the configuration in its folder."""
    parser = ArgumentParser()
    parser.add_subclass_arguments(TaskSuite, "data")
    config = parser.parse_object({"data": yaml.safe_load((run / "config.yaml").read_text())["data"]})
    return parser.instantiate_classes(config).data
