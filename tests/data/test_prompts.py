"""Class names and prompts of well-known data sets: how many there are, and in which order the classes get them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from freemerge.data import DataError, HuggingFaceImageSource, NpzSource, Prompts, known_prompts, load_prompts
from tests.configs import tiny_files

# Classes of each data set as their authors count them, and prompts as CLIP's public list of prompts has them.
CLASSES = {
    "cifar10": 10, "cifar100": 100, "dtd": 47, "emnist_letters": 26, "eurosat": 10, "fashion_mnist": 10, "fer2013": 7,
    "food101": 101, "gtsrb": 43, "kmnist": 10, "mnist": 10, "oxford_flowers102": 102, "oxford_iiit_pet": 37, "pcam": 2,
    "rendered_sst2": 2, "resisc45": 45, "stanford_cars": 196, "stl10": 10, "sun397": 397, "svhn": 10,
}  # fmt: skip
TEMPLATES = {
    "cifar10": 18,
    "cifar100": 18,
    "dtd": 8,
    "eurosat": 3,
    "fer2013": 6,
    "gtsrb": 3,
    "resisc45": 18,
    "sun397": 2,
}

# What the cards and loading scripts of data sets on the Hub say of some classes: place → name.
PLACES = {
    "cifar10": {0: "airplane", 1: "automobile", 9: "truck"},
    "cifar100": {0: "apple", 26: "crab", 49: "mountain", 99: "worm"},
    "dtd": {30: "polka-dotted", 46: "zigzagged"},
    "emnist_letters": {0: "A", 13: "N", 24: "Y", 25: "Z"},
    "eurosat": {0: "annual crop land", 2: "brushland or shrubland", 9: "lake or sea"},
    "fashion_mnist": {0: "T - shirt / top", 9: "Ankle boot"},
    "fer2013": {0: "angry", 4: "neutral", 6: "surprised"},
    "gtsrb": {0: "red and white circle 20 kph speed limit", 14: "stop"},
    "kmnist": {0: "お", 5: "は", 9: "を"},
    "oxford_flowers102": {0: "pink primrose", 15: "globe-flower", 38: "siam tulip"},
    "oxford_iiit_pet": {0: "abyssinian", 14: "german shorthaired", 36: "yorkshire terrier"},
    "pcam": {0: "lymph node", 1: "lymph node containing metastatic tumor tissue"},
    "rendered_sst2": {0: "negative", 1: "positive"},
    "resisc45": {0: "airplane", 29: "railway", 44: "wetland"},
    "stanford_cars": {0: "AM General Hummer SUV 2000", 5: "Acura Integra Type R 2001", 22: "Audi S4 Sedan 2012"},
    "stl10": {0: "airplane", 2: "car", 7: "monkey"},
    "sun397": {0: "abbey", 8: "apartment building outdoor", 396: "youth hostel"},
}


def test_every_class_has_a_name() -> None:
    assert {name: len(load_prompts(name).class_names) for name in known_prompts()} == CLASSES
    assert {name: len(load_prompts(name).templates) for name in TEMPLATES} == TEMPLATES
    for name in known_prompts():
        prompts = load_prompts(name)
        assert len(set(prompts.class_names)) == CLASSES[name]
        assert all(text == text.strip() != "" for text in prompts.class_names)
        assert all(template.count("{}") == 1 for template in prompts.templates)
    for name in ("mnist", "svhn"):
        assert load_prompts(name).class_names == tuple("0123456789")
    for name, places in PLACES.items():
        assert {place: load_prompts(name).class_names[place] for place in places} == places


def test_classes_that_the_data_name_get_their_names_in_any_order() -> None:
    prompts = Prompts("food", ("cheese plate", "cheesecake", "hot dog"), ("{}",))
    assert prompts.for_classes("t", ["Cheesecake", "cheese_plate", "hot-dog"]) == (
        "cheesecake",
        "cheese plate",
        "hot dog",
    )
    assert prompts.for_classes("t", ["0", "1", "2"]) == prompts.class_names
    assert prompts.for_classes("t", ["plate", "cheesecake", "sausage"]) == prompts.class_names
    with pytest.raises(DataError, match="t: class 0 of the data is 'hot_dog', which is class 2 of prompts food; give"):
        prompts.for_classes("t", ["hot_dog", "cake", "plate"])
    with pytest.raises(DataError, match="t: prompts food name 3 classes, and the data have 2"):
        prompts.for_classes("t", ["cheesecake", "hot dog"])


def write(path: Path, names: str = "[the sky, grass, blood]", templates: str = "['{} as a colour']") -> str:
    path.write_text(f"class_names: {names}\ntemplates: {templates}\n", encoding="utf-8")
    return str(path)


def test_a_source_takes_prompts(tmp_path: Path) -> None:
    tiny_files.write_npz(tmp_path / "n.npz")  # red, green and blue
    source = NpzSource(path=str(tmp_path / "n.npz"), prompts=write(tmp_path / "p.yaml"))
    assert source.build("n", 0).class_names == ("the sky", "grass", "blood")
    assert source.build("n", 0).templates == ("{} as a colour",)
    own = {"class_names": {"red": "tomato"}, "templates": ["a {} thing"]}
    task = NpzSource(path=str(tmp_path / "n.npz"), prompts=write(tmp_path / "p.yaml"), **own).build("n", 0)
    assert (task.class_names, task.templates) == (("tomato", "grass", "blood"), ("a {} thing",))
    by_name = write(tmp_path / "q.yaml", names="[Blue, Red, Green]")
    assert NpzSource(path=str(tmp_path / "n.npz"), prompts=by_name).build("n", 0).class_names == (
        "Red",
        "Green",
        "Blue",
    )
    path = tiny_files.write_dataset(tmp_path / "pictures", images=True)
    hub = HuggingFaceImageSource(path=path, prompts=by_name, splits={"train": "train", "test": "test"}, image_size=8)
    task = hub.build("n", 0)
    assert task.class_names == ("Red", "Green", "Blue")
    assert [int(task.test[index][1]) for index in range(4)] == [0, 1, 2, 0]  # labels are what they were


def test_the_names_are_part_of_the_datas_identity_and_their_file_is_not(tmp_path: Path) -> None:
    tiny_files.write_npz(tmp_path / "n.npz")
    sources = {
        name: NpzSource(path=str(tmp_path / "n.npz"), prompts=write(tmp_path / f"{name}.yaml", names))
        for name, names in {"a": "[x, y, z]", "b": "[x, y, z]", "c": "[x, y, w]"}.items()
    }
    identities = {name: source.identity() for name, source in sources.items()}
    assert identities["a"] == identities["b"] != identities["c"]
    assert "prompts" not in NpzSource(path=str(tmp_path / "n.npz")).identity()  # as before there were prompts


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "there is no data set or file 'cifar'; did you mean 'cifar10'"),
        ("class_names: [a, b", r"p.yaml: cannot be read \(while parsing"),
        ("class_names: [a, b]", "p.yaml: expected the keys class_names and templates"),
        ("class_names: [a, no]\ntemplates: ['{}']", "p.yaml: class_names must be a list of texts; quote numbers, yes"),
        ("class_names: [a, b]\ntemplates: [a photo]", r"p.yaml: a template needs exactly one \{\}, got 'a photo'"),
    ],
)
def test_prompts_that_are_not_there_or_not_right_are_one_line(tmp_path: Path, text: str | None, message: str) -> None:
    name = "cifar"
    if text is not None:
        (tmp_path / "p.yaml").write_text(text)
        name = str(tmp_path / "p.yaml")
    np.savez(tmp_path / "n.npz", train_images=np.zeros((4, 2, 2), np.uint8), train_labels=np.arange(4) % 2)
    with pytest.raises(ValueError, match=message):
        NpzSource(path=str(tmp_path / "n.npz"), prompts=name)
