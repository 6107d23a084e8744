"""`check_source` accepts all of our sources and names the faults of others."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import TensorDataset

from freemerge.data import (
    HuggingFaceImageSource,
    HuggingFaceTextSource,
    ImageFolderSource,
    NpzSource,
    PooledSource,
    Task,
    TaskSource,
    TextTableSource,
    TorchvisionSource,
)
from freemerge.data.augment import RandomFlip
from freemerge.testing import check_source
from tests.configs import tiny_files


def npz(folder: Path) -> TaskSource:
    tiny_files.write_npz(folder / "a.npz")
    return NpzSource(path=str(folder / "a.npz"), augment=[RandomFlip()])


def folders(folder: Path) -> TaskSource:
    return ImageFolderSource(folder=tiny_files.write_image_folders(folder / "a"), image_size=8, channels=1)


def torchvision(folder: Path) -> TaskSource:
    return TorchvisionSource(dataset="FakeData", root=None, train={"size": 30, "image_size": (3, 9, 9)}, image_size=8)


def pooled(folder: Path) -> TaskSource:
    return PooledSource(sources={"a": npz(folder), "b": npz(folder)})


def pictures(folder: Path) -> TaskSource:
    return HuggingFaceImageSource(path=tiny_files.write_dataset(folder / "a", images=True), image_size=8)


def hub_texts(folder: Path) -> TaskSource:
    tokenizer = tiny_files.write_tokenizer(folder / "tokenizer")
    path = tiny_files.write_dataset(folder / "a", images=False)
    return HuggingFaceTextSource(path=path, text=["sentence1", "sentence2"], tokenizer=tokenizer)


def texts(label: str, kind: str) -> Callable[[Path], TaskSource]:
    def make(folder: Path) -> TaskSource:
        path = tiny_files.write_table(folder / "a.csv", ["split", "text", "second", label])
        tokenizer = tiny_files.write_tokenizer(folder / "tokenizer")
        return TextTableSource(path=path, tokenizer=tokenizer, text=["text", "second"], label=label, kind=kind)

    return make


@pytest.mark.parametrize(
    "make",
    [npz, folders, torchvision, pooled, pictures, hub_texts, texts("label", "classification"),
     texts("score", "regression"), texts("answer", "seq2seq"), texts("answer", "causal_lm")],
)  # fmt: skip
def test_our_own_sources_pass(make, tmp_path: Path) -> None:
    before = torch.random.get_rng_state()
    assert check_source(make(tmp_path), workers=1).name == "checked"
    assert torch.equal(torch.random.get_rng_state(), before)


@dataclass(kw_only=True)
class Own(TaskSource):
    """A source with a selectable fault."""

    fault: str = ""
    kept: Any = field(default=None)

    def build(self, name: str, seed: int) -> Task:
        images = torch.rand(60, 3, 4, 4, generator=torch.Generator().manual_seed(seed))
        labels = torch.arange(60) % 3
        classes = ("a", "b") if self.fault == "label" else ("a", "b", "c")
        if self.fault == "nan":
            images[7] = torch.nan
        if self.fault == "drawn":
            images[:, 0, 0, 0] = random.random()
        dtype = {"float": torch.float32, "int": torch.int32}.get(self.fault, torch.int64)
        parts = [TensorDataset(images[i : i + 20], labels[i : i + 20].to(dtype)) for i in (0, 20, 40)]
        if self.fault == "empty":
            parts[1] = TensorDataset(images[:0], labels[:0])
        if self.fault == "leak":
            parts[2] = parts[0]
        if self.fault == "triple":
            parts[0] = TensorDataset(images, labels, labels)
        if self.fault == "batch":
            parts[0] = Shifted(images[:20], labels[:20])
        if self.fault == "local":
            parts[0].transform = lambda image: image
        return Task("other" if self.fault == "name" else name, classes, *parts)

    def identity(self) -> dict[str, Any]:
        return {"kept": repr(self.kept)} if self.fault == "repr" else super().identity()


class Shifted(TensorDataset):
    """Returns other samples in a batch than one by one."""

    def __getitems__(self, indices: list[int]) -> list:
        return [self[(index + 1) % len(self)] for index in indices]


def test_a_correct_user_made_source_passes() -> None:
    assert check_source(Own(), workers=0).class_names == ("a", "b", "c")


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("name", r"Own.build\('checked', …\) returns a task called 'other'"),
        ("label", r"Own, train\[2\]: the label is 2, of 2 classes"),
        ("float", r"Own, train\[0\]: the label is torch.float32 \(\), expected an int64 scalar"),
        ("int", r"the label is torch.int32"),
        ("nan", r"Own, train\[7\]: inputs has values that are not finite"),
        ("drawn", r"Own, train\[0\]: two builds with one seed differ"),
        ("empty", "Own, val: there are no samples"),
        ("leak", "every checked test sample is also a training sample"),
        ("triple", r"Own, train is a tuple, expected the pair \(inputs, label\)"),
        ("batch", "Own, train: a batch fetched by __getitems__ differs from its single samples"),
        ("local", "the dataset of Own, train cannot be pickled, .* lambdas and local functions"),
        ("repr", r"identity\(\) contains a memory address|identity\(\) differs for a copy"),
    ],
)
def test_a_fault_is_named(fault: str, message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        check_source(Own(fault=fault, kept=RandomFlip()), samples=20, workers=0)


def test_a_source_that_cannot_be_pickled_is_named() -> None:
    with pytest.raises(AssertionError, match="Own cannot be pickled"):
        check_source(Own(kept=lambda: 0))
    with pytest.raises(AssertionError, match="str is not a TaskSource"):
        check_source("a.npz")
