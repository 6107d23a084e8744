"""The CLIP benchmark runs on tiny models and tiny data of the Hub's shapes, and measures what transformers computes."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import CLIPTokenizer

from freemerge.cli import main
from freemerge.data import HuggingFaceImageSource, known_prompts, load_prompts
from tests.configs import tiny_files
from tests.configs.test_configs import CLIP

ROOT = Path(__file__).parent.parent.parent
CONFIG = ROOT / "configs" / "clip_benchmark.yaml"
WRITTEN = yaml.safe_load(CONFIG.read_text(encoding="utf-8"))
SOURCES = {task: source["init_args"] for task, source in WRITTEN["data"]["init_args"]["sources"].items()}
EIGHT = ["sun397", "stanford_cars", "resisc45", "eurosat", "svhn", "gtsrb", "mnist", "dtd"]
TRAIN, TEST, SIDE, LONGEST = 20, 24, 8, 32


def hub_names(task: str) -> list[str] | None:
    """What the Hub's data set calls its classes; None if its labels are numbers or truth values."""
    names = list(load_prompts(task).class_names)
    if task == "food101":
        at = names.index("cheesecake")
        names[at - 1 : at + 1] = ["cheesecake", "cheese plate"]
    if task in ("food101", "cifar100", "oxford_iiit_pet"):
        names = [
            name.replace(" ", "_").replace("crab", "cra") if task == "cifar100" else name.replace(" ", "_")
            for name in names
        ]
    return None if task in ("pcam", "fer2013") else names


def write_data(folder: Path, task: str) -> str:
    """A data set with the columns, splits and kind of labels of the Hub's; images are grey for digits."""
    import datasets

    names, source = hub_names(task), SOURCES[task]
    label = datasets.ClassLabel(names=names) if names else datasets.Value("bool" if task == "pcam" else "int64")
    image_column, label_column = source.get("image", "image"), source.get("label", "label")
    features = datasets.Features(
        {image_column: datasets.Image(), label_column: label, "other": datasets.Value("int64")}
    )
    generator, count = np.random.default_rng(len(task)), len(load_prompts(task).class_names)

    def part(size: int) -> Any:
        shape = (size, 9, 11) if task in ("mnist", "kmnist") else (size, 9, 11, 3)
        images = [Image.fromarray(pixels) for pixels in generator.integers(0, 256, shape, dtype=np.uint8)]
        labels = [number % count for number in range(size)]
        columns = {image_column: images, label_column: [bool(x) for x in labels] if task == "pcam" else labels}
        return datasets.Dataset.from_dict({**columns, "other": [0] * size}, features=features)

    sizes = {"train": TRAIN, "val": 10, "test": TEST}
    datasets.DatasetDict({name: part(sizes[split]) for split, name in source["splits"].items()}).save_to_disk(folder)
    return str(folder)


def words_of(task: str) -> set[str]:
    """The words of a task's prompts, so that no two classes are equal to the text tower."""
    prompts = load_prompts(task)
    return set(re.findall(r"\w+|[^\w\s]+", " ".join([*prompts.class_names, *prompts.templates])))


def write_models(folder: Path, tasks: list[str]) -> tuple[str, dict[str, str]]:
    """A whole CLIP as the base, and each task's image tower without projection, as transformers 4 and 5 name it."""
    from transformers import CLIPConfig, CLIPModel, CLIPVisionModel

    torch.manual_seed(0)
    words = [*tiny_files.SPECIAL, *sorted({word for task in tasks for word in words_of(task)})]
    text = {**CLIP["text_config"], "vocab_size": len(words), "max_position_embeddings": LONGEST}
    base = CLIPModel(CLIPConfig(text_config=text, vision_config=CLIP["vision_config"], projection_dim=12))
    base.save_pretrained(folder / "base")
    tiny_files.write_tokenizer(folder / "base", words)
    models = {}
    for number, task in enumerate(tasks):
        tower = CLIPVisionModel(base.config.vision_config)
        inner = getattr(tower, "vision_model", tower)  # itself, in later versions
        inner.load_state_dict(base.vision_model.state_dict())
        with torch.no_grad():
            for parameter in tower.parameters():
                parameter += 0.05 * torch.randn_like(parameter)
        tower.save_pretrained(folder / task)
        if number % 2 == 0:  # as FusionBench's: written by transformers 4
            state = {f"vision_model.{name}": tensor for name, tensor in inner.state_dict().items()}
            save_file(state, folder / task / "model.safetensors", {"format": "pt"})
        models[task] = str(folder / task)
    return str(folder / "base"), models


def arguments(tmp_path: Path, tasks: list[str], *further: str, **merge: Any) -> list[str]:
    base, models = write_models(tmp_path / "models", tasks)
    sources = {}
    for task, source in SOURCES.items():
        path = write_data(tmp_path / "data" / task, task) if task in tasks else "nowhere"
        given = {**source, "path": path, "subset": None, "image_size": SIDE, "val_size": 10}
        sources[task] = {"class_path": "HuggingFaceImageSource", "init_args": given}
    overlay = {
        "trainer": {"accelerator": "cpu", "devices": 1, "enable_progress_bar": False},
        "model": {"init_args": {"backbone": {"init_args": {"pretrained": base}}}},
        "finetune": {"models": {task: models.get(task, "nowhere") for task in SOURCES}},
        "data": {"init_args": {"sources": sources, "num_workers": 0}},
        "merge": merge,
    }
    path = tmp_path / "overlay.yaml"
    path.write_text(yaml.safe_dump(overlay))
    configs = [CONFIG, *(ROOT / "configs" / "clip" / f"{name}.yaml" for name in further), path]
    given = [part for config in configs for part in ("--config", str(config))]
    return ["fit", *given, "--run.folder", str(tmp_path / "run")]


def rows(tmp_path: Path) -> dict[str, dict[str, Any]]:
    return {row["name"]: row for row in json.loads((tmp_path / "run" / "report.json").read_text())["rows"]}


def accuracy(base: str, tower: str | None, data: str, task: str) -> float:
    """Zero-shot accuracy by transformers alone: its processor's pixels, its towers, embeddings averaged by hand."""
    import datasets
    import transformers
    from transformers import AutoTokenizer, CLIPModel

    def embedded(output: Any) -> torch.Tensor:  # (N, F), of length 1; earlier versions return the tensor itself
        return torch.nn.functional.normalize(getattr(output, "pooler_output", output), dim=-1)

    model = CLIPModel.from_pretrained(base).eval()
    if tower is not None:
        state = load_file(Path(tower) / "model.safetensors")
        model.vision_model.load_state_dict({name.removeprefix("vision_model."): state[name] for name in state})
    tokenizer, prompts = AutoTokenizer.from_pretrained(base), load_prompts(task)
    kind = getattr(transformers, "CLIPImageProcessorPil", transformers.CLIPImageProcessor)
    processor = kind(size={"shortest_edge": SIDE}, crop_size=SIDE)
    part = datasets.load_from_disk(data)["test"]
    pixels = processor([image.convert("RGB") for image in part["image"]], return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        classes = []
        for name in prompts.class_names:
            texts = [template.replace("{}", name) for template in prompts.templates]
            tokens = tokenizer(texts, padding=True, truncation=True, max_length=LONGEST, return_tensors="pt")
            text = embedded(model.get_text_features(**tokens))
            classes.append(torch.nn.functional.normalize(text.mean(0), dim=0))
        image = embedded(model.get_image_features(pixels))
        guesses = (image @ torch.stack(classes).T).argmax(1)
    return float((guesses == torch.tensor(part["label"])).float().mean())


def test_eight_tasks_are_merged_at_the_published_scales_and_measured_as_by_transformers(tmp_path: Path) -> None:
    assert main(arguments(tmp_path, EIGHT, scales=None)) == 0
    lines, base, places = rows(tmp_path), str(tmp_path / "models" / "base"), tmp_path / "data"
    assert set(WRITTEN["merge"]["methods"]) < set(lines)
    for task in ("eurosat", "svhn", "mnist", "dtd"):
        own = str(tmp_path / "models" / task)
        assert lines["individual"]["scores"][task] == pytest.approx(accuracy(base, own, str(places / task), task))
        assert lines["base (zero-shot)"]["scores"][task] == pytest.approx(
            accuracy(base, None, str(places / task), task)
        )
    kept = load_file(tmp_path / "models" / "base" / "model.safetensors")
    for path in (tmp_path / "run" / "merge").glob("*.safetensors"):
        merged = load_file(path)
        assert all(tensor.isfinite().all() for tensor in merged.values())
        assert torch.equal(merged["visual_projection.weight"], kept["visual_projection.weight"])
    found = json.loads((tmp_path / "run" / "merge" / "stage.json").read_text())["results"]["methods"]
    tried = {name: [candidate["scale"] for candidate in method["search"]] for name, method in found.items()}
    assert tried == {
        name: [{"task arithmetic": 0.3, "PCB": 1.2}.get(name, 1.0)] for name in WRITTEN["merge"]["methods"]
    }


def test_twenty_tasks_of_every_kind_of_data(tmp_path: Path) -> None:
    methods = {"average": {"class_path": "WeightAverage"}, "FR": {"class_path": "FRMerging"}}
    given = arguments(tmp_path, list(SOURCES), "vit_l14", "tasks20", scales=[0.3], methods=methods)
    assert main(given) == 0
    lines = rows(tmp_path)
    assert list(lines["FR"]["scores"]) == list(SOURCES) == list(lines["individual"]["scores"])
    said = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert said["data"]["init_args"]["tasks"] == list(SOURCES)
    base, places = str(tmp_path / "models" / "base"), tmp_path / "data"
    for task in ("kmnist", "emnist_letters", "rendered_sst2", "stl10", "fashion_mnist"):
        own = str(tmp_path / "models" / task)
        assert lines["individual"]["scores"][task] == pytest.approx(accuracy(base, own, str(places / task), task))


def test_the_overlays_name_the_models_and_tasks() -> None:
    assert set(SOURCES) == set(known_prompts())
    assert WRITTEN["data"]["init_args"]["tasks"] == EIGHT
    for number in (14, 20):
        overlay = yaml.safe_load((ROOT / "configs" / "clip" / f"tasks{number}.yaml").read_text())
        assert overlay["data"]["init_args"]["tasks"] == list(SOURCES)[:number]
    for name in ("vit_b16", "vit_l14"):
        overlay = yaml.safe_load((ROOT / "configs" / "clip" / f"{name}.yaml").read_text())
        base = overlay["model"]["init_args"]["backbone"]["init_args"]["pretrained"].removeprefix("openai/")
        models = {
            task: model.replace("clip-vit-base-patch32", base) for task, model in WRITTEN["finetune"]["models"].items()
        }
        assert overlay["finetune"]["models"] == models
    for path in (ROOT / "configs" / "clip").glob("*.yaml"):
        assert f"--config configs/clip_benchmark.yaml --config configs/clip/{path.name}" in path.read_text()


@pytest.mark.parametrize("task", ["oxford_iiit_pet", "cifar100"])
def test_underscores_are_kept_where_the_checkpoints_were_trained_with_them(tmp_path: Path, task: str) -> None:
    source = {**SOURCES[task], "path": write_data(tmp_path, task), "image_size": SIDE}
    names = HuggingFaceImageSource(**source).build(task, 0).class_names
    assert [name.replace(" _ ", "_") for name in names] == hub_names(task)
    # CLIP's tokenizer gives `a_b` and `a _ b` the same tokens. No model is needed to see it split texts.
    signs = sorted({sign for name in names for sign in name} - {" "})
    tokens = [*signs, *(f"{sign}</w>" for sign in signs), "<|startoftext|>", "<|endoftext|>"]
    tokenizer = CLIPTokenizer(vocab={token: index for index, token in enumerate(tokens)}, merges=[])
    written, trained = tokenizer(list(names))["input_ids"], tokenizer(hub_names(task))["input_ids"]
    assert written == trained


def test_food_is_named_as_its_checkpoint_was_trained(tmp_path: Path) -> None:
    """The Hub has cheesecake before cheese plate; FusionBench's names are the other way round."""
    source = {**SOURCES["food101"], "path": write_data(tmp_path, "food101"), "image_size": SIDE}
    names = HuggingFaceImageSource(**source).build("food101", 0).class_names
    assert names == load_prompts("food101").class_names
    right = HuggingFaceImageSource(**{**source, "class_names": None}).build("food101", 0).class_names
    assert right[16:18] == ("cheesecake", "cheese plate")
