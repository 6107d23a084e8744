"""Frozen heads of the fine-tuner: made by the base, before anything is trained, and never after."""

import copy

import lightning as L
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import AutoTokenizer

from freemerge.data import SourceSuite, Task, TextTableSource
from freemerge.data.mixture import TaskData
from freemerge.models import CosineHead, LanguageBackbone, ModuleBackbone, TransformersBackbone
from freemerge.training import FineTuner
from tests.configs import tiny_files
from tests.configs.test_configs import BERT, T5, VIT
from tests.tiny import TinySuite, tiny_backbone

QUIET = {
    "accelerator": "cpu", "devices": 1, "logger": False, "enable_progress_bar": False, "enable_model_summary": False,
    "enable_checkpointing": False,
}  # fmt: skip


@pytest.fixture
def suite(tmp_path) -> SourceSuite:
    """Two tasks of texts; one has prompts and names of its own."""
    tokenizer = tiny_files.write_tokenizer(tmp_path / "tokenizer")
    path = tiny_files.write_table(tmp_path / "t.csv", ["split", "text", "label"])
    told = {"class_names": {"yes": "good"}, "templates": ["it is {}", "what is {}"]}
    plain, named = (TextTableSource(path=path, tokenizer=tokenizer, **more) for more in ({}, told))
    return SourceSuite({"plain": plain, "named": named}, batch_size=4)


@pytest.fixture
def encoder() -> TransformersBackbone:
    torch.manual_seed(0)
    return TransformersBackbone(config=BERT, pooling="mean")


def fast(parameters) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.5)


def embedding(backbone: TransformersBackbone, tokenizer: str, text: str) -> torch.Tensor:
    with torch.no_grad():
        tokens = AutoTokenizer.from_pretrained(tokenizer)(text, return_tensors="pt")
        return F.normalize(backbone.model(**tokens).last_hidden_state[0].mean(dim=0), dim=0)


def test_a_zero_shot_head_is_the_bases_and_stays(suite: SourceSuite, encoder: TransformersBackbone, tmp_path) -> None:
    base = copy.deepcopy(encoder).eval()
    tuner = FineTuner(encoder, head="zero_shot", optimizer=fast, schedule="constant", warmup=0.0)
    tuner = tuner.for_task(suite.task("named"))
    trainer = L.Trainer(max_steps=3, **QUIET)
    trainer.fit(tuner, datamodule=suite["named"])
    place = suite.task("named").tokenizer
    assert isinstance(tuner.head, CosineHead)
    assert float(tuner.head.scale) == 20
    for row, name in zip(tuner.head.weight, ("no", "good"), strict=True):
        both = [embedding(base, place, f"{words} {name}") for words in ("it is", "what is")]
        torch.testing.assert_close(row, F.normalize(both[0] + both[1], dim=0))
    moved = embedding(tuner.backbone.eval(), place, "it is no")
    assert not torch.allclose(moved, embedding(base, place, "it is no"), atol=1e-3)  # while the base has moved on
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    again = FineTuner.load_from_checkpoint(tmp_path / "last.ckpt", backbone=copy.deepcopy(base))
    assert isinstance(again.head, CosineHead)
    assert torch.equal(again.head.weight, tuner.head.weight)
    assert float(again.head.scale) == 20
    inputs, _ = next(iter(suite["named"].test_dataloader()))
    torch.testing.assert_close(again.eval()(inputs), tuner.eval()(inputs))


def test_labels_own_names_and_the_tuners_prompts_are_taken_where_a_task_has_none(
    suite: SourceSuite, encoder: TransformersBackbone
) -> None:
    task = suite.task("plain")
    for arguments, before, scale in (({}, "", 20), ({"templates": ["it is {}"], "logit_scale": 7.5}, "it is ", 7.5)):
        head = FineTuner(encoder, head="zero_shot", **arguments).for_task(task).head
        expected = [embedding(copy.deepcopy(encoder).eval(), task.tokenizer, before + name) for name in ("no", "yes")]
        torch.testing.assert_close(head.weight, torch.stack(expected))
        assert float(head.scale) == scale


def test_prototypes_are_means_of_the_bases_features(suite: SourceSuite, encoder: TransformersBackbone) -> None:
    base, data = copy.deepcopy(encoder).eval(), suite["plain"]
    tuner = FineTuner(encoder, head="prototypes", prototype_samples=3, logit_scale=10.0, optimizer=fast)
    tuner = tuner.for_task(data.task)
    L.Trainer(max_steps=2, **QUIET).fit(tuner, datamodule=data)
    chosen: dict[int, list[torch.Tensor]] = {0: [], 1: []}
    for inputs, labels in data.drawn_dataloader():
        for row, label in enumerate(labels.tolist()):
            if len(chosen[label]) < 3:
                one = {name: tensor[row : row + 1] for name, tensor in inputs.items()}
                chosen[label].append(base(one)[0].detach())
    expected = torch.stack([torch.stack(chosen[label]).mean(dim=0) for label in (0, 1)])
    torch.testing.assert_close(tuner.head.weight, expected)
    assert float(tuner.head.scale) == 10
    assert tuner.head_ready
    torch.testing.assert_close(tuner.heads.fitted(tuner.objective, data, torch.device("cpu")).scale, tuner.head.scale)


def test_samples_are_drawn_from_all_tasks_that_share_a_head_and_alike_each_time(tmp_path) -> None:
    tokenizer = tiny_files.write_tokenizer(tmp_path / "tokenizer")
    path = tiny_files.write_table(tmp_path / "t.csv", ["split", "text", "label"])
    source = TextTableSource(path=path, tokenizer=tokenizer)
    shared = SourceSuite({"a": source, "b": source}, shared_heads=[["a", "b"]], batch_size=4)
    own = SourceSuite({"a": source}, batch_size=4)

    def labels_of(data: TaskData) -> list[int]:
        return torch.cat([labels for _, labels in data.drawn_dataloader()]).tolist()

    assert len(labels_of(shared["a"])) == 2 * len(labels_of(own["a"]))
    assert labels_of(shared["a"]) == labels_of(shared["b"])
    assert labels_of(own["a"]) == labels_of(own["a"]) != sorted(labels_of(own["a"]))


def test_prototypes_of_a_loader_of_ones_own() -> None:
    data = TinySuite(batch_size=8)["corners"]
    tuner = FineTuner(tiny_backbone(), num_classes=data.task.num_classes, head="prototypes", prototype_samples=2)
    L.Trainer(max_steps=1, limit_val_batches=0, **QUIET).fit(tuner, train_dataloaders=data.train_dataloader())
    assert tuner.head.weight.norm(dim=1).min() > 0


def test_heads_that_cannot_be_made_are_refused(suite: SourceSuite, encoder: TransformersBackbone) -> None:
    numbers = Task("n", (), [], [], [], kind="regression")
    for kind in ("zero_shot", "prototypes"):
        with pytest.raises(ValueError, match=f"head '{kind}' needs a classification, and the task is a regression"):
            FineTuner(encoder, head=kind).for_task(numbers)
    with pytest.raises(ValueError, match="needs the class names of a classification task"):
        FineTuner(encoder, num_classes=2, head="zero_shot")
    with pytest.raises(ValueError, match="got TransformersBackbone of ViTModel; use 'prototypes' or 'probe'"):
        FineTuner(TransformersBackbone(config=VIT), head="zero_shot")
    with pytest.raises(ValueError, match="a LanguageBackbone has its own head"):
        FineTuner(LanguageBackbone(config=T5), head="prototypes")
    with pytest.raises(ValueError, match="logit_scale must be above 0, got 0"):
        FineTuner(encoder, head="zero_shot", logit_scale=0.0)
    with pytest.raises(ValueError, match="prototype_samples must be at least 1, got 0"):
        FineTuner(encoder, head="prototypes", prototype_samples=0)
    with pytest.raises(ValueError, match=r"FineTuner: a template needs exactly one \{\}, got 'a photo'"):
        FineTuner(encoder, head="zero_shot", templates=["a photo"])
    pictures = Task("p", ("red", "blue"), [], [], [])
    own = FineTuner(ModuleBackbone(nn.Identity(), feature_dim=4), head="zero_shot")
    with pytest.raises(ValueError, match="this ModuleBackbone needs the tokenizer of a task of texts"):
        own.for_task(pictures)
