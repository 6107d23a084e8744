"""What a run refuses before its first fit: each fault in one line, all of them together, and nothing made."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch.utils.data import Dataset

from freemerge.cli import main
from freemerge.data import ArrayDataset, Task
from freemerge.merging import TaskArithmetic, WeightAverage
from freemerge.pipeline import (
    STAGES,
    ExpertsSettings,
    MergeSettings,
    RouterSettings,
    Settings,
    TuneSettings,
)
from freemerge.pipeline.checks import CheckError, check_run
from freemerge.pipeline.store.artifacts import Artifacts
from freemerge.pipeline.trainers import MakeTrainer
from freemerge.training import FineTuner
from freemerge.tuning import Range
from tests.tiny import TinySuite, tiny_backbone, tiny_text_backbone

TINY = str(Path(__file__).parent.parent / "tiny.yaml")


class Samples(Dataset):
    """Inputs and labels as they are given."""

    def __init__(self, inputs: Any, labels: Any) -> None:
        self.inputs, self.labels = inputs, labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Any:
        inputs = {name: part[index] for name, part in self.inputs.items()} if isinstance(self.inputs, dict) else None
        return (self.inputs[index] if inputs is None else inputs), self.labels[index]


class GivenSuite(TinySuite):
    """`corners` as it is, and a second task that is given."""

    def __init__(self, second: Task, tasks: list[str] | None = None) -> None:
        self.second = second
        super().__init__(tasks)

    def build(self, name: str) -> Task:
        return self.second if name == "bars" else super().build(name)


def images(count: int = 20, channels: int = 1, size: int = 8) -> torch.Tensor:
    return torch.rand(count, channels, size, size, generator=torch.Generator().manual_seed(0)) * 2 - 1


def labels(count: int = 20, classes: int = 2) -> torch.Tensor:
    return torch.arange(count) % classes


def task(inputs: Any, answers: Any, **options: Any) -> Task:
    data = Samples(inputs, answers)
    names = () if options.get("kind", "classification") != "classification" else ("a", "b")
    return Task("bars", names, **{"train": data, "val": data, "test": data, **options})


def look(
    suite: TinySuite, folder: Path, settings: Settings | None = None, stages: tuple[str, ...] = STAGES, **options: Any
) -> list[str]:
    """What the checks say without stopping."""
    tuner = options.pop("tuner", None) or FineTuner(tiny_backbone())
    files = Artifacts(tuner, suite, folder, settings or Settings(), {}, seed=0)
    return check_run(files, stages, MakeTrainer({"accelerator": "cpu", "devices": 1, **options.pop("trainer", {})}))


def faults(*arguments: Any, **options: Any) -> list[str]:
    with pytest.raises(CheckError) as caught:
        look(*arguments, **options)
    return caught.value.faults


def test_a_valid_run_passes_without_random_draws_or_changes_to_the_model(tmp_path) -> None:
    tuner = FineTuner(tiny_backbone())
    before = {name: tensor.clone() for name, tensor in tuner.backbone.weights().items()}
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    assert look(TinySuite(), tmp_path, tuner=tuner) == []
    assert torch.equal(torch.rand(4), expected)
    assert all(torch.equal(tensor, before[name]) for name, tensor in tuner.backbone.weights().items())
    assert tuner.backbone.training
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("second", "expected"),
    [
        (task(images(size=16), labels()), r"task 'bars', train: ViTModel \(image_size 8, num_channels 1\) cannot take"),
        (task(images(channels=3), labels()), "set the data's image_size and channels"),
        (task((images() * 100 + 100).byte(), labels()), "images are uint8, expected float32"),
        (task(images(), labels() + 1), "labels range from 1 to 2, expected 0 to 1 .* labels count from 0: subtract 1"),
        (task(images(), labels(classes=3)), "labels range from 0 to 2, expected 0 to 1 for the 2 classes"),
        (task(images(), labels() - 1), "labels range from -1 to 0"),
        (task(images(), labels().float()), "labels are float32, a classification wants int64; set the task's kind"),
        (task(images(), labels()[:, None]), r"labels have shape \(16, 1\), a classification wants one class's index"),
        (task(images() / 0, labels()), "the first batch contains NaN or infinite values"),
        (task(images(), labels(), val=Samples(images(0), labels(0))), "its val data are empty"),
        (task(images(), labels(), test=Samples(images(0), labels(0))), "its test data are empty"),
        (
            task(images(), torch.full((20,), 0.5), kind="regression"),
            "all 20 labels of its val data are 0.5, so pearson",
        ),
        (task(images(), labels() / 0, kind="regression"), "the label of sample 0 is nan, expected a number"),
        (task(images(), torch.rand(20, 2), kind="regression"), "a regression wants one number per sample"),
        (task({"pixels": images()}, labels()), "let the dataset give what the model's forward"),
        (task({"input_ids": torch.ones(20, 5).long()}, labels(), kind="seq2seq"), "the task is seq2seq"),
    ],
)
def test_a_task_that_would_fail_is_named_with_what_to_do(second: Task, expected: str, tmp_path) -> None:
    found = faults(GivenSuite(second), tmp_path)
    assert any(re.search(expected, each) for each in found), found
    assert all("\n" not in each and "bars" in each for each in found)


def test_tokens_of_another_tokenizer_and_too_long_texts_are_found_by_the_longest(tmp_path) -> None:
    class Texts(GivenSuite):
        def build(self, name: str) -> Task:
            return replace(self.second, name=name)

    tuner, early = FineTuner(tiny_text_backbone()), Settings(router=RouterSettings(kind="early"))
    tuner.backbone.pretrained = True  # there is nothing to pretrain it on
    stages = tuple(stage for stage in STAGES if stage != "pretrain")
    ids = torch.randint(1, 50, (20, 6), generator=torch.Generator().manual_seed(0))
    assert look(Texts(task({"input_ids": ids}, labels())), tmp_path, early, stages, tuner=tuner) == []
    found = faults(Texts(task({"input_ids": ids + 30}, labels())), tmp_path, early, stages, tuner=tuner)
    assert re.search(r"there is a token \d\d and the model knows 50: use the model's own tokenizer", found[0])
    found = faults(Texts(task({"input_ids": ids.repeat(1, 10)}, labels())), tmp_path, early, stages, tuner=tuner)
    assert "a text has 60 tokens and the model takes 32: set max_length" in found[0]


def test_all_faults_are_found_together(tmp_path) -> None:
    settings = Settings(
        merge=MergeSettings(
            {"one": TaskArithmetic([0.5] * 3), "A b": WeightAverage(), "a_b": WeightAverage()}, free="one"
        ),
        router=RouterSettings(top_n=3),
        tune=TuneSettings(space={"scal": Range(0.0, 1.0)}),
    )
    found = faults(GivenSuite(task(images(size=16), labels() + 5)), tmp_path, settings)
    for expected in (
        "merge.methods: one: TaskArithmetic has 3 values in `scale` for 2 fine-tuned models",
        "merge.methods: 'A b' and 'a_b' would both be a_b.safetensors",
        "router.top_n: 3 experts cannot be mixed where there are 2 tasks",
        "TaskArithmetic has no parameter 'scal'; did you mean 'scale'?",
        "task 'bars', train: labels range from 5 to 6",
    ):
        assert any(expected in each for each in found), (expected, found)


@pytest.mark.parametrize(
    ("stages", "expected"),
    [
        (("finetune",), "pretrain, finetune"),
        (("pretrain", "merge"), "finetune, merge"),
        (("pretrain", "finetune", "experts"), "merge, experts"),
        (("pretrain", "finetune", "evaluate"), "merge, evaluate"),
        (("pretrain", "finetune", "merge", "experts", "evaluate"), "router, evaluate"),
    ],
)
def test_stages_that_need_others_say_which(stages: tuple[str, ...], expected: str, tmp_path) -> None:
    found = faults(TinySuite(), tmp_path, stages=stages)
    need, by = expected.split(", ")
    assert found[0] == (
        f"{tmp_path}: stage {need!r} has not been done with this configuration; add {need} to run.stages, "
        f"as {by} needs it"
    )


def test_a_router_and_mixup_need_inputs_that_suit_them(tmp_path) -> None:
    other_size = GivenSuite(task(images(size=12), labels()))
    tuner = FineTuner(tiny_backbone())
    tuner.backbone.forward = lambda inputs: inputs.flatten(1)[:, :16]  # takes images of any size
    found = faults(other_size, tmp_path, tuner=tuner)
    assert found == [
        "router: its training takes batches of all tasks, whose inputs differ (corners: float32 (1, 8, 8); bars: "
        "float32 (1, 12, 12)): make them alike, or leave router and experts out of run.stages"
    ]
    found = faults(TinySuite(), tmp_path, Settings(router=RouterSettings(kind="early", point="embeding")))
    assert "router: the backbone has no submodule 'embeding'; it has embeddings" in found[0]
    found = faults(TinySuite(), tmp_path, Settings(router=RouterSettings(kind="early", point="encoder.layer.9")))
    assert found[0].startswith("router.point: an early router cannot look at 'encoder.layer.9'")
    named = Samples({"pixel_values": images()}, labels())

    class Named(TinySuite):
        def build(self, name: str) -> Task:
            return Task(name, ("a", "b"), named, named, named)

    found = faults(Named(), tmp_path, Settings(experts=ExpertsSettings(mixup=0.3)))
    assert any("router.kind: conv is for images" in each and "choose router.kind: early" in each for each in found)
    assert any("experts.mixup is for images" in each and "set it to 0" in each for each in found)


def test_a_density_too_low_for_any_direction_names_the_least_density(tmp_path) -> None:
    settings = Settings(experts=ExpertsSettings(kind="low_rank", density=1e-4, vectors="none"))
    found = faults(TinySuite(), tmp_path, settings)
    least = float(found[0].rpartition("set it to ")[2].partition(" or more")[0])
    settings = Settings(experts=ExpertsSettings(kind="low_rank", density=least * 1.05, vectors="none"))
    assert look(TinySuite(), tmp_path, settings) == []


def test_unusual_data_are_doubts_that_do_not_stop_the_run(tmp_path) -> None:
    bytes_like = task((images() + 1) * 127, labels(), val=Samples(images(), torch.zeros(20).long()))
    said = look(GivenSuite(bytes_like), tmp_path)
    assert any("train images go from" in each and "they look like bytes" in each for each in said)
    assert any("all its val samples are of class 'a'" in each for each in said)
    dark = Samples(images(), torch.zeros(20).long())
    said = look(GivenSuite(task(images(), labels(), train=dark, val=dark)), tmp_path)
    assert said == ["task 'bars': its train data have no sample of b, which cannot be learnt"]
    tuner = FineTuner(tiny_backbone())
    tuner.backbone.pretrained = True
    stages = tuple(stage for stage in STAGES if stage != "pretrain")
    said = look(GivenSuite(task(images().abs(), labels())), tmp_path, stages=stages, tuner=tuner)
    assert any("pretrained models mostly expect them normalised" in each for each in said)


def test_a_backbone_with_nan_outputs_is_found(tmp_path) -> None:
    tuner = FineTuner(tiny_backbone())
    with torch.no_grad():
        next(tuner.backbone.parameters()).fill_(float("nan"))
    assert "output is NaN or infinite before any training" in faults(TinySuite(), tmp_path, tuner=tuner)[0]


class SoundThenNot(TinySuite):
    """The second task's labels are out of range, and the third's images of another size."""

    TASKS: ClassVar[tuple[str, ...]] = ("corners", "bars")

    def build(self, name: str) -> Task:
        sound = super().build(name)
        if name == "corners":
            return sound
        small = ArrayDataset(torch.zeros(9, 1, 8, 8, dtype=torch.uint8), torch.full((9,), 7), mean=0.5, std=0.5)
        return replace(sound, train=small, val=small)


def test_the_command_line_reports_faults_before_it_writes_anything(tmp_path, capsys) -> None:
    options = ["--data", "tests.pipeline.test_checks.SoundThenNot", "--router.top_n", "5"]
    assert main(["fit", "--config", TINY, *options, "--run.folder", str(tmp_path / "run")]) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert [line.partition(":")[0] for line in said] == ["error"] * len(said)
    assert len(said) == 3
    assert "router.top_n: 5" in said[0]
    assert "task 'bars', train: labels range from 7 to 7, expected 0 to 1" in said[1]
    made = {path.name for path in (tmp_path / "run").rglob("*")} if (tmp_path / "run").exists() else set()
    assert not made & {"pretrain", "finetune", "stage.json"}
