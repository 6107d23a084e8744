"""Datasets of torchvision and Hugging Face: wrong splits and columns, damaged pictures, labels of any kind."""

from __future__ import annotations

import datasets
import numpy as np
import pytest
from PIL import Image

from freemerge.data import HuggingFaceImageSource, HuggingFaceTextSource, TorchvisionSource
from freemerge.data.errors import DataError
from tests.configs import tiny_files


class Pictures:
    """A dataset as torchvision has them."""

    classes = ("a", "b")

    def __init__(self, labels: tuple = (0, 1), dtype: str = "uint8") -> None:
        self.labels = labels
        self.dtype = dtype

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int):
        return np.zeros((8, 8), self.dtype), self.labels[index % len(self.labels)]


def own(**arguments) -> TorchvisionSource:
    return TorchvisionSource(dataset=f"{__name__}.Pictures", root=None, train=arguments, image_size=8)


# ---- torchvision


def test_what_torchvision_cannot_open_is_one_line(tmp_path) -> None:
    for source, message in (
        (TorchvisionSource(dataset="MNIST", root=str(tmp_path)), r"MNIST, train: Dataset not found.*: download: true"),
        (TorchvisionSource(dataset="STL10", root=str(tmp_path), train={"split": "trian"}), "STL10, train: .*trian"),
        (TorchvisionSource(dataset="ImageFolder", root=str(tmp_path / "no")), "ImageFolder, train: .*No such file"),
        (TorchvisionSource(dataset="MNIST", root=str(tmp_path), train={"tain": True}), "MNIST, train: .*'tain'"),
        (TorchvisionSource(dataset="nowhere.Pictures"), "nowhere.Pictures: No module named 'nowhere'"),
        (TorchvisionSource(dataset="folder"), "there is no dataset 'folder'"),
    ):
        with pytest.raises(DataError, match=f"TorchvisionSource: .*{message}") as caught:
            source.build("a", 0)
        assert "\n" not in str(caught.value)


def test_a_damaged_picture_of_a_torchvision_dataset_is_named_by_its_file(tmp_path) -> None:
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        for number in range(6):
            Image.new("RGB", (8, 8)).save(tmp_path / name / f"{number}.png")
    task = TorchvisionSource(dataset="ImageFolder", root=str(tmp_path), image_size=8).build("a", 0)
    file = tmp_path / "dog" / "5.png"
    file.write_bytes(b"no")
    with pytest.raises(DataError, match=rf"{file}: cannot be read as a picture \(cannot identify image file"):
        [part[index] for part in (task.train, task.val, task.test) for index in range(len(part))]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"labels": (0, 2)},
            r"Pictures, train, sample \d+: the label is 2, expected .* below 2, the number of classes",
        ),
        ({"labels": (0, -1)}, r"the label is -1, .*; -1 often stands for labels that are kept secret"),
        ({"labels": (0, 0.5)}, r"the label is 0.5, expected the index of a class"),
        ({"labels": (0, None)}, r"the label is None, expected the index of a class"),
        ({"dtype": "float32"}, r"Pictures, train, sample \d+: expected a picture: .*got float32 \(8, 8\)"),
    ],
)
def test_samples_that_are_none(arguments: dict, message: str) -> None:
    task = own(**arguments).build("a", 0)
    with pytest.raises(DataError, match=message):
        [task.train[index] for index in range(len(task.train))]


# ---- Hugging Face


def write(folder, labels: list, **features):
    pictures = [Image.new("RGB", (8, 8), (20 * i, 0, 0)) for i in range(len(labels))]
    data = datasets.Dataset.from_dict(
        {"image": pictures, "label": labels}, features=datasets.Features({"image": datasets.Image(), **features})
    )
    data.save_to_disk(str(folder))
    return str(folder)


def test_a_single_saved_dataset_and_labels_that_are_names(tmp_path) -> None:
    path = write(tmp_path / "a", ["dog", "cat"] * 6, label=datasets.Value("string"))
    task = HuggingFaceImageSource(path=path, image_size=8).build("a", 0)
    assert task.class_names == ("cat", "dog")
    index = task.train.indices.tolist()
    assert [int(label) for _, label in (task.train[i] for i in range(len(index)))] == [1 - i % 2 for i in index]
    with pytest.raises(DataError, match="a, validation: there is no such split; there are train"):
        HuggingFaceImageSource(path=path, splits={"train": "validation"}).build("a", 0)


def test_labels_that_are_missing_or_secret(tmp_path) -> None:
    path = write(tmp_path / "a", [0, 1, None] * 4, label=datasets.Value("int64"))
    with pytest.raises(DataError, match=r"task 'a', train: 4 of 12 samples have no label in 'label'"):
        HuggingFaceImageSource(path=path, image_size=8).build("a", 0)
    path = write(tmp_path / "b", [0, -1] * 6, label=datasets.ClassLabel(names=["a", "b"]))
    task = HuggingFaceImageSource(path=path, image_size=8).build("a", 0)
    with pytest.raises(DataError, match=r"b, train, row \d+: the label is -1, .* kept secret: take another split"):
        [task.train[index] for index in range(len(task.train))]


def test_a_damaged_picture_is_named_by_its_row(tmp_path) -> None:
    damaged = [{"bytes": b"\x89PNG\r\n\x1a\n", "path": None}] * 12
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    datasets.Dataset.from_dict({"image": damaged, "label": [0, 1] * 6}, features).save_to_disk(str(tmp_path / "a"))
    task = HuggingFaceImageSource(path=str(tmp_path / "a"), image_size=8).build("a", 0)
    with pytest.raises(DataError, match=r"a, train, row 3: cannot be read as a picture") as caught:
        task.train[task.train.indices.tolist().index(3)]
    assert "\n" not in str(caught.value)


def test_columns_and_splits_that_are_not_there(tmp_path) -> None:
    tokenizer = tiny_files.write_tokenizer(tmp_path / "tokenizer")
    path = tiny_files.write_dataset(tmp_path / "a", pictures=False)
    common = {"path": path, "tokenizer": tokenizer, "text": ["sentence"]}
    for options, message in (
        (
            {"text": ["sentense"]},
            "there is no column 'sentense' in train; there are sentence, sentence1, sentence2, label",
        ),
        ({"label": "lable"}, "there is no column 'lable' in train"),
        (
            {"splits": {"train": "train", "test": "validation"}},
            "validation: there is no such split; there are train, te",
        ),
        ({"path": str(tmp_path / "nowhere")}, "HuggingFaceTextSource: .*nowhere, train: "),
    ):
        with pytest.raises(DataError, match=message) as caught:
            HuggingFaceTextSource(**{**common, **options}).build("a", 0)
        assert "\n" not in str(caught.value)


def test_a_dataset_of_the_hub_without_a_connection_says_so(monkeypatch) -> None:
    def unreachable(*_, **__):
        raise ConnectionError("Couldn't reach 'me/mine' on the Hub (OfflineModeIsEnabled)")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(
        DataError, match=r"me/mine, train: not in the cache, and the hub cannot be reached .*; give a lo"
    ):
        HuggingFaceTextSource(path="me/mine", tokenizer="x").build("a", 0)
