"""Predictions: the names of samples, and the answers of language models."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.utils.data import Subset

from freemerge.data import ImageFolderSource, NpzSource, TextTableSource
from freemerge.data.loaders import names_of
from freemerge.models import LanguageBackbone
from tests.configs import tiny_files
from tests.configs.test_configs import QWEN, T5


def test_samples_of_image_files_are_named_by_file(tmp_path: Path) -> None:
    folder = Path(tiny_files.write_image_folders(tmp_path / "birds"))
    task = ImageFolderSource(folder=str(folder), image_size=8).build("birds", seed=0)
    names = names_of(task.test)
    assert all((folder / name).is_file() or Path(name).is_file() for name in names)
    assert [Path(name).parent.name for name in names] == [task.class_names[int(label)] for _, label in task.test]
    assert list(names_of(Subset(task.test, [2, 0]))) == [names[2], names[0]]


def test_samples_of_arrays_are_named_by_index(tmp_path: Path) -> None:
    tiny_files.write_npz(tmp_path / "one.npz")
    source = NpzSource(path=str(tmp_path / "one.npz"), test_size=3)
    assert names_of(source.build("one", seed=0).test) == [
        f"test_images[{i}]" for i in _places(source, tmp_path / "one.npz")
    ]


def _places(source: NpzSource, path: Path) -> list[int]:
    """The indices of the test images in the file."""
    import numpy as np

    arrays = np.load(path)["test_images"]
    test = source.build("one", seed=0).test
    wanted = test.images.permute(0, 2, 3, 1).numpy()
    return [next(i for i, array in enumerate(arrays) if (array == image).all()) for image in wanted]


@pytest.mark.parametrize("suffix", ["csv", "tsv", "jsonl", "parquet"])
@pytest.mark.parametrize("per_split", [False, True])
def test_samples_of_tables_are_named_by_row(tmp_path: Path, suffix: str, per_split: bool) -> None:
    tokenizer, rows = tiny_files.write_tokenizer(tmp_path / "tokenizer"), tiny_files.rows()
    columns = ["text", "label"] if per_split else ["split", "text", "label"]
    parts = {split: [row for row in rows if row["split"] == split] for split in ("train", "test")}
    paths = {
        name: tiny_files.write_table(tmp_path / f"{name}.{suffix}", columns, table)
        for name, table in (parts if per_split else {"all": rows}).items()
    }
    path = paths if per_split else paths["all"]
    task = TextTableSource(path=path, tokenizer=tokenizer, text=["text"], test_size=4).build("a", seed=0)
    first = 2 if suffix in ("csv", "tsv") else 1  # the header is row 1
    names = names_of(task.test)
    assert len(set(names)) == 4
    for name, (inputs, label) in zip(names, task.test, strict=True):
        file, _, number = name.rpartition(", ")
        number = number.split()[-1]  # `row 17`, or `line 17`
        table = parts["test"] if per_split else rows
        row = table[int(number) - first]
        assert Path(file) == tmp_path / f"{'test' if per_split else 'all'}.{suffix}"
        assert row["split"] == "test"
        assert row["label"] == task.class_names[int(label)]
        words = [tiny_files.WORDS[token] for token in inputs["input_ids"].tolist()]
        assert [word for word in words if word not in tiny_files.SPECIAL] == row["text"].split()


@pytest.mark.parametrize("config", [QWEN, T5], ids=["causal_lm", "seq2seq"])
def test_answers_in_a_batch_equal_those_of_single_prompts(config: dict) -> None:
    torch.manual_seed(0)
    backbone = LanguageBackbone(config=config).eval()
    prompts = [torch.randint(4, 20, (length,)) for length in (3, 7, 5)]
    ids, mask = torch.zeros(3, 9, dtype=torch.long), torch.zeros(3, 9, dtype=torch.long)
    asked = torch.zeros(3, 9, dtype=torch.bool)
    for row, prompt in enumerate(prompts):
        answer = 2 if backbone.kind == "causal_lm" else 0  # the evaluation must not read these
        ids[row, : len(prompt)] = prompt
        ids[row, len(prompt) : len(prompt) + answer] = 4 + row
        mask[row, : len(prompt) + answer] = 1
        asked[row, len(prompt) : len(prompt) + answer] = True
    answers = backbone.answer({"input_ids": ids, "attention_mask": mask}, asked, max_new_tokens=6)
    for prompt, answer in zip(prompts, answers, strict=True):
        first = len(prompt) if backbone.kind == "causal_lm" else 1
        alone = backbone.model.generate(
            prompt[None], attention_mask=torch.ones(1, len(prompt)), max_new_tokens=6, do_sample=False
        )
        alone = alone[0, first:].tolist()
        assert answer == (alone[: alone.index(3)] if 3 in alone else alone)
    assert any(answers)
