"""torchvision and Hugging Face datasets: wrong splits and columns, damaged images, labels of any kind."""

from __future__ import annotations

import datasets
import numpy as np
import pytest
from PIL import Image

from freemerge.data import HuggingFaceImageSource, HuggingFaceTextSource, TorchvisionSource
from freemerge.data.errors import DataError
from tests.configs import tiny_files


class Images:
    """A dataset like those of torchvision."""

    classes = ("a", "b")

    def __init__(self, labels: tuple = (0, 1), dtype: str = "uint8") -> None:
        self.labels = labels
        self.dtype = dtype

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int):
        return np.zeros((8, 8), self.dtype), self.labels[index % len(self.labels)]


def images_source(**arguments) -> TorchvisionSource:
    return TorchvisionSource(dataset=f"{__name__}.Images", root=None, train=arguments, image_size=8)


# ---- torchvision


def test_errors_of_torchvision_are_one_line(tmp_path) -> None:
    for source, message in (
        (TorchvisionSource(dataset="MNIST", root=str(tmp_path)), r"MNIST, train: Dataset not found.*: download: true"),
        (TorchvisionSource(dataset="STL10", root=str(tmp_path), train={"split": "trian"}), "STL10, train: .*trian"),
        (TorchvisionSource(dataset="ImageFolder", root=str(tmp_path / "no")), "ImageFolder, train: .*No such file"),
        (TorchvisionSource(dataset="MNIST", root=str(tmp_path), train={"tain": True}), "MNIST, train: .*'tain'"),
        (TorchvisionSource(dataset="nowhere.Images"), "nowhere.Images: No module named 'nowhere'"),
        (TorchvisionSource(dataset="folder"), "there is no dataset 'folder'"),
    ):
        with pytest.raises(DataError, match=f"TorchvisionSource: .*{message}") as caught:
            source.build("a", 0)
        assert "\n" not in str(caught.value)


def test_a_damaged_image_of_torchvision_is_named_by_its_file(tmp_path) -> None:
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        for number in range(6):
            Image.new("RGB", (8, 8)).save(tmp_path / name / f"{number}.png")
    task = TorchvisionSource(dataset="ImageFolder", root=str(tmp_path), image_size=8).build("a", 0)
    file = tmp_path / "dog" / "5.png"
    file.write_bytes(b"no")
    with pytest.raises(DataError, match=rf"{file}: cannot be read as an image \(cannot identify image file"):
        [part[index] for part in (task.train, task.val, task.test) for index in range(len(part))]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"labels": (0, 2)},
            r"Images, train, sample \d+: the label is 2, expected .* below 2, the number of classes",
        ),
        ({"labels": (0, -1)}, r"the label is -1, .*; -1 often marks labels that are not published"),
        ({"labels": (0, 0.5)}, r"the label is 0.5, expected a class index"),
        ({"labels": (0, None)}, r"the label is None, expected a class index"),
        ({"dtype": "float32"}, r"Images, train, sample \d+: expected an image: .*got float32 \(8, 8\)"),
    ],
)
def test_invalid_samples_are_named(arguments: dict, message: str) -> None:
    task = images_source(**arguments).build("a", 0)
    with pytest.raises(DataError, match=message):
        [task.train[index] for index in range(len(task.train))]


# ---- Hugging Face


def write(folder, labels: list, **features):
    images = [Image.new("RGB", (8, 8), (20 * i, 0, 0)) for i in range(len(labels))]
    data = datasets.Dataset.from_dict(
        {"image": images, "label": labels}, features=datasets.Features({"image": datasets.Image(), **features})
    )
    data.save_to_disk(str(folder))
    return str(folder)


def test_a_saved_dataset_without_splits_and_labels_that_are_names(tmp_path) -> None:
    path = write(tmp_path / "a", ["dog", "cat"] * 6, label=datasets.Value("string"))
    task = HuggingFaceImageSource(path=path, image_size=8).build("a", 0)
    assert task.class_names == ("cat", "dog")
    index = task.train.indices.tolist()
    assert [int(label) for _, label in (task.train[i] for i in range(len(index)))] == [1 - i % 2 for i in index]
    with pytest.raises(DataError, match="a, validation: there is no such split; known splits: train"):
        HuggingFaceImageSource(path=path, splits={"train": "validation"}).build("a", 0)


def test_missing_and_unpublished_labels(tmp_path) -> None:
    path = write(tmp_path / "a", [0, 1, None] * 4, label=datasets.Value("int64"))
    with pytest.raises(DataError, match=r"task 'a', train: 4 of 12 samples have no label in 'label'"):
        HuggingFaceImageSource(path=path, image_size=8).build("a", 0)
    path = write(tmp_path / "b", [0, -1] * 6, label=datasets.ClassLabel(names=["a", "b"]))
    task = HuggingFaceImageSource(path=path, image_size=8).build("a", 0)
    with pytest.raises(DataError, match=r"b, train, row \d+: the label is -1, .* not published: use another split"):
        [task.train[index] for index in range(len(task.train))]


def test_a_damaged_image_is_named_by_its_row(tmp_path) -> None:
    damaged = [{"bytes": b"\x89PNG\r\n\x1a\n", "path": None}] * 12
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    datasets.Dataset.from_dict({"image": damaged, "label": [0, 1] * 6}, features).save_to_disk(str(tmp_path / "a"))
    task = HuggingFaceImageSource(path=str(tmp_path / "a"), image_size=8).build("a", 0)
    with pytest.raises(DataError, match=r"a, train, row 3: cannot be read as an image") as caught:
        task.train[task.train.indices.tolist().index(3)]
    assert "\n" not in str(caught.value)


def test_missing_columns_and_splits(tmp_path) -> None:
    tokenizer = tiny_files.write_tokenizer(tmp_path / "tokenizer")
    path = tiny_files.write_dataset(tmp_path / "a", images=False)
    common = {"path": path, "tokenizer": tokenizer, "text": ["sentence"]}
    for options, message in (
        (
            {"text": ["sentense"]},
            "train has no column 'sentense'; its columns: sentence, sentence1, sentence2, label",
        ),
        ({"label": "lable"}, "train has no column 'lable'"),
        (
            {"splits": {"train": "train", "test": "validation"}},
            "validation: there is no such split; known splits: train, te",
        ),
        ({"path": str(tmp_path / "nowhere")}, "HuggingFaceTextSource: .*nowhere, train: "),
    ):
        with pytest.raises(DataError, match=message) as caught:
            HuggingFaceTextSource(**{**common, **options}).build("a", 0)
        assert "\n" not in str(caught.value)


def test_a_hub_dataset_without_a_connection(monkeypatch) -> None:
    def unreachable(*_, **__):
        raise ConnectionError("Couldn't reach 'me/mine' on the Hub (OfflineModeIsEnabled)")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(
        DataError, match=r"me/mine, train: not in the cache, and the hub cannot be reached .*; use a lo"
    ):
        HuggingFaceTextSource(path="me/mine", tokenizer="x").build("a", 0)
