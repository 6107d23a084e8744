"""Task sources: the tasks they build, their splits and subsets, and their errors."""

from __future__ import annotations

import gzip
import re

import numpy as np
import pytest
import torch

from freemerge.data import (
    HuggingFaceImageSource,
    HuggingFaceTextSource,
    ImageFolderSource,
    NpzSource,
    NpzSuite,
    PooledSource,
    SourceSuite,
    Task,
    TextTableSource,
    TextTableSuite,
    TorchvisionSource,
)
from freemerge.data.arrays import Preprocessing
from freemerge.data.augment import RandomFlip
from freemerge.data.sources.source import describe
from freemerge.data.sources.tables import read_table
from tests.configs import tiny_files


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> str:
    return tiny_files.write_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def ids(*words: str) -> list[int]:
    return [tiny_files.WORDS.index(word) for word in words]


# ---- images


def test_npz_pixels_are_normalised(tmp_path) -> None:
    tiny_files.write_npz(tmp_path / "a.npz")
    task = NpzSource(path=str(tmp_path / "a.npz"), mean=[0.1, 0.2, 0.3], std=0.5).build("a", 0)
    assert task.class_names == tuple(tiny_files.COLOURS)
    assert [len(part) for part in (task.train, task.val, task.test)] == [24, 9, 9]
    raw = np.load(tmp_path / "a.npz")["val_images"][4] / 255  # (H, W, C)
    image, label = task.val[4]
    expected = (torch.from_numpy(raw).permute(2, 0, 1) - torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1)) / 0.5
    torch.testing.assert_close(image, expected.float())
    assert label == 1


def test_images_have_the_configured_channels_and_size(tmp_path) -> None:
    tiny_files.write_npz(tmp_path / "grey.npz", grey=True)
    tiny_files.write_npz(tmp_path / "colour.npz")
    suite = NpzSuite(str(tmp_path), image_size=6, channels=3, train_size=5)
    assert suite.names == ("colour", "grey")
    assert {suite.task(name).train[0][0].shape for name in suite.names} == {(3, 6, 6)}
    assert len(suite.task("grey").train) == 5
    batch, labels = next(iter(suite.mixture(batch_size=8).train_dataloader()))
    assert batch.shape == (8, 3, 6, 6)
    assert set(labels.tolist()) == {0, 1}
    assert NpzSuite(str(tmp_path), channels=1).image_shape == (1, 12, 12)


def test_preprocessing_converts_to_grey_by_luma() -> None:
    image = torch.tensor([255, 0, 0], dtype=torch.uint8).view(1, 3, 1, 1)
    assert Preprocessing(channels=1)(image).item() == pytest.approx(0.299)
    with pytest.raises(ValueError, match="channels must be 1 or 3, got 2"):
        Preprocessing(channels=2)


def test_missing_splits_are_cut_from_train_by_the_seed_and_never_overlap(tmp_path) -> None:
    images = np.arange(50, dtype=np.uint8).reshape(50, 1, 1).repeat(2, 1).repeat(2, 2)
    np.savez(tmp_path / "a.npz", train_images=images, train_labels=np.arange(50) % 5)
    source = NpzSource(path=str(tmp_path / "a.npz"), val_fraction=0.2, test_fraction=0.3)

    def parts(seed: int) -> list[list[int]]:
        task = source.build("a", seed)
        return [part.images[:, 0, 0, 0].tolist() for part in (task.train, task.val, task.test)]

    train, val, test = parts(0)
    assert (len(train), len(val), len(test)) == (25, 10, 15)
    assert sorted(train + val + test) == list(range(50))
    assert parts(0) == [train, val, test]
    assert parts(1) != [train, val, test]
    assert type(source).deal is type(source).split_samples  # the old name, for sources outside of freemerge
    assert source.build("a", 0).class_names == ("0", "1", "2", "3", "4")


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"train_labels": np.zeros(3, int)}, "no array 'train_images'"),
        ({"train_images": np.zeros((3, 2, 2), np.uint8)}, "no array 'train_labels'"),
        ({"train_images": np.zeros((3, 2, 2)), "train_labels": np.zeros(3, int)}, "must be uint8 .*got float64"),
        ({"train_images": np.zeros((3, 2, 2), np.uint8), "train_labels": np.zeros(3)}, "must be integers"),
        (
            {"train_images": np.zeros((3, 2, 2), np.uint8), "train_labels": np.array([0, 1, 7]), "class_names": ["a"]},
            "labels range from 0 to 7, but there are 1 classes",
        ),
    ],
)
def test_errors_of_npz_files(tmp_path, arrays, message: str) -> None:
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(ValueError, match=f"a.npz: .*{message}"):
        NpzSource(path=str(tmp_path / "a.npz")).build("a", 0)


def test_a_file_that_is_not_npz_is_refused(tmp_path) -> None:
    (tmp_path / "a.npz").write_text("no")
    with pytest.raises(ValueError, match=r"a\.npz: not an NPZ file of plain arrays"):
        NpzSource(path=str(tmp_path / "a.npz")).build("a", 0)
    with pytest.raises(ValueError, match=r"b\.npz: there is no such file"):
        NpzSource(path=str(tmp_path / "b.npz")).identity()


def test_image_folders(tmp_path) -> None:
    tiny_files.write_image_folders(tmp_path / "a")
    source = ImageFolderSource(folder=str(tmp_path / "a"), image_size=8, mean=0.0, std=1.0)
    task = source.build("a", 0)
    assert task.class_names == ("blue", "green", "red")
    assert [len(part) for part in (task.train, task.val, task.test)] == [25, 4, 7]
    images, labels = next(iter(SourceSuite({"a": source}).for_task("a", batch_size=25).train_dataloader()))
    brightest = images.mean(dim=(2, 3)).argmax(dim=1)  # of red, green, blue
    assert torch.equal(brightest, 2 - labels)
    before = source.identity()
    (tmp_path / "a" / "red" / "0.png").unlink()
    assert source.identity() != before


def test_split_folders_must_have_the_same_classes(tmp_path) -> None:
    for split in ("train", "val", "test"):
        tiny_files.write_image_folders(tmp_path / split, per_class=2)
    source = ImageFolderSource(folder=str(tmp_path), image_size=8)
    assert [len(part) for part in (source.build("a", 0).train, source.build("a", 0).test)] == [6, 6]
    (tmp_path / "test" / "red").rename(tmp_path / "test" / "pink")
    with pytest.raises(ValueError, match="test: the classes differ from those of train: pink, red"):
        source.build("a", 0)
    with pytest.raises(ValueError, match="there is no such folder"):
        ImageFolderSource(folder=str(tmp_path / "nowhere")).build("a", 0)


def test_images_of_different_shapes_need_image_size(tmp_path) -> None:
    tiny_files.write_image_folders(tmp_path / "a")
    suite = SourceSuite({"a": ImageFolderSource(folder=str(tmp_path / "a"))})
    with pytest.raises(ValueError, match=r"different shapes are in one batch: .*set image_size and channels"):
        next(iter(suite.for_task("a").train_dataloader()))


def test_torchvision_datasets() -> None:
    arguments = {"size": 20, "image_size": (3, 8, 8), "num_classes": 4}
    source = TorchvisionSource(dataset="FakeData", root=None, train=arguments, test={**arguments, "random_offset": 99})
    task = source.build("a", 0)
    assert (task.num_classes, len(task.train), len(task.val), len(task.test)) == (4, 18, 2, 20)
    assert task.train[0][0].shape == (3, 8, 8)
    with pytest.raises(ValueError, match="no dataset 'FakeDat'; did you mean 'FakeData'"):
        TorchvisionSource(dataset="FakeDat").build("a", 0)
    with pytest.raises(ValueError, match="TorchvisionSource: MNIST, train: Dataset not found"):
        TorchvisionSource(dataset="MNIST", root="/nonexistent").build("a", 0)


def test_pooled_tasks_keep_their_classes_apart_and_exclude_test_sets(tmp_path) -> None:
    tiny_files.write_npz(tmp_path / "a.npz")
    tiny_files.write_npz(tmp_path / "b.npz", grey=True)
    suite = NpzSuite(str(tmp_path), channels=3, train_size=10, pretraining="pooled")
    assert suite.has_pretraining
    pooled, parts = suite.pretraining(), [suite.task(name) for name in "ab"]
    assert pooled.class_names == tuple(f"{name}/{colour}" for name in "ab" for colour in tiny_files.COLOURS)
    for split in ("train", "val"):
        expected = [sample for part in parts for sample in getattr(part, split)]
        assert len(getattr(pooled, split)) == len(expected)
        for index, (image, label) in enumerate(expected):
            found = getattr(pooled, split)[index]
            assert torch.equal(found[0], image)
            assert found[1] == label + (index >= len(expected) // 2) * len(tiny_files.COLOURS)
    assert len(pooled.test) == len(pooled.val)  # not the tasks' test sets
    assert suite.pretraining_data().num_classes == 2 * len(tiny_files.COLOURS)
    plain = NpzSuite(str(tmp_path), channels=3, train_size=10)
    assert not plain.has_pretraining
    assert plain.pretraining() is None
    elsewhere = NpzSuite(str(tmp_path), channels=3, train_size=10, pretraining=str(tmp_path / "a.npz"))
    assert elsewhere.pretraining().class_names == tuple(tiny_files.COLOURS)
    assert len({each.fingerprint() for each in (suite, plain, elsewhere)}) == 3


def test_only_classification_tasks_are_pooled(tmp_path, tokenizer) -> None:
    path = tiny_files.write_table(tmp_path / "r.csv", ["split", "text", "score"])
    scores = TextTableSource(path=path, tokenizer=tokenizer, text=["text"], label="score", kind="regression")
    with pytest.raises(ValueError, match="all: only classification tasks can be pooled, but 'r' is regression"):
        PooledSource(sources={"r": scores}).build("all", 0)
    with pytest.raises(ValueError, match="PooledSource: give at least one source"):
        PooledSource()


# ---- texts


@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.jsonl", "a.parquet", "a.csv.gz"])
def test_all_table_formats_give_the_same_rows(tmp_path, name: str) -> None:
    rows = tiny_files.rows(6)
    path = tiny_files.write_table(tmp_path / name.removesuffix(".gz"), ["text", "label"])
    if name.endswith(".gz"):
        with open(path, "rb") as plain, gzip.open(tmp_path / name, "wb") as packed:
            packed.write(plain.read())
    table = read_table(tmp_path / name)
    assert table["text"][:6] == [row["text"] for row in rows]
    assert table["label"][:6] == [row["label"] for row in rows]


def test_quotes_are_ordinary_characters_in_tsv_only(tmp_path) -> None:
    (tmp_path / "a.tsv").write_text('text\tlabel\nsay "no"\t1\n')
    (tmp_path / "a.csv").write_text('text,label\n"say ""no"", twice\nor more",1\n')
    assert read_table(tmp_path / "a.tsv")["text"] == ['say "no"']
    assert read_table(tmp_path / "a.csv")["text"] == ['say "no", twice\nor more']


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.csv", "text,label\nx\n", "row 2 has 1 fields, the header has 2: text, label"),
        ("a.tsv", "", "no header line"),
        ("a.jsonl", '{"a": 1}\n{"b": 1}\n', "line 2 must be an object with a"),
        ("a.jsonl", "{\n", "line 1 is not JSON"),
        ("a.txt", "x", r"expected \.csv, \.tsv, \.jsonl"),
        ("a.csv.gz", "x", "cannot be read as csv"),
        ("a.parquet", "x", "cannot be read as parquet"),
    ],
)
def test_errors_of_tables(tmp_path, name: str, text: str, message: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        read_table(tmp_path / name)


def test_pairs_of_texts_are_tokenized_together(tmp_path, tokenizer: str) -> None:
    path = tiny_files.write_table(tmp_path / "a.csv", ["split", "text", "second", "label"])
    task = TextTableSource(path=path, tokenizer=tokenizer).build("a", 0)
    assert task.class_names == ("no", "yes")
    assert (len(task.train), len(task.val), len(task.test)) == (18, 6, 6)
    inputs, label = task.train[0]
    words = ids("[CLS]", "it", "is", "bad", "0", "[SEP]", "what", "is", "red", "[SEP]")
    assert inputs["input_ids"].tolist() == words
    assert label == 0


def test_labels_can_be_indices_names_or_numbers(tmp_path, tokenizer: str) -> None:
    rows = [{"text": "it", "split": split, "label": str(i % 2)} for split in ("train", "val", "test") for i in range(4)]
    path = tiny_files.write_table(tmp_path / "a.csv", ["split", "text", "label"], rows)
    (tmp_path / "a.classes.txt").write_text("bad\ngood\n")
    task = TextTableSource(path=path, tokenizer=tokenizer).build("a", 0)
    assert task.class_names == ("bad", "good")
    assert task.val.labels.tolist() == [0, 1, 0, 1]
    regression = TextTableSource(path=path, tokenizer=tokenizer, kind="regression", metric="spearman").build("a", 0)
    assert (regression.num_classes, regression.num_outputs, regression.metric) == (0, 1, "spearman")
    assert regression.val.labels.tolist() == [0.0, 1.0, 0.0, 1.0]
    with pytest.raises(ValueError, match="task 'a', train: sample 1 has the label '1', expected one of x or an index"):
        TextTableSource(path=path, tokenizer=tokenizer, classes=["x"]).build("a", 0)


def test_targets_of_language_models(tmp_path, tokenizer: str) -> None:
    path = tiny_files.write_table(tmp_path / "a.csv", ["split", "text", "answer"])
    common = {"path": path, "tokenizer": tokenizer, "text": ["text"]}
    causal = TextTableSource(**common, label="answer", kind="causal_lm").build("a", 0)
    inputs, labels = causal.train[1]  # "it is good 1" → "good 1"
    prompt, target = ids("[CLS]", "it", "is", "good", "1"), ids("good", "1", "[SEP]")
    assert inputs["input_ids"].tolist() == prompt + target
    assert labels.tolist() == [-100] * len(prompt) + target
    whole = TextTableSource(**common, label=None, kind="causal_lm").build("a", 0)
    assert whole.train[1][1].tolist() == whole.train[1][0]["input_ids"].tolist() == [*prompt, *ids("[SEP]")]
    seq2seq = TextTableSource(**common, label="answer", kind="seq2seq").build("a", 0)
    inputs, labels = seq2seq.train[1]
    assert labels.tolist() == inputs["labels"].tolist() == ids("[CLS]", "good", "1", "[SEP]")
    assert (causal.metric, seq2seq.metric) == ("perplexity", "exact_match")


def test_a_long_prompt_is_truncated_before_its_target(tmp_path, tokenizer: str) -> None:
    path = tiny_files.write_table(tmp_path / "a.csv", ["split", "text", "answer"])
    task = TextTableSource(
        path=path, tokenizer=tokenizer, text=["text"], label="answer", kind="causal_lm", max_length=5
    ).build("a", 0)
    inputs, labels = task.train[1]
    assert inputs["input_ids"].tolist() == ids("[CLS]", "it", "good", "1", "[SEP]")
    assert labels.tolist() == [-100, -100, *ids("good", "1", "[SEP]")]


def test_a_folder_of_tables_is_a_suite(tmp_path, tokenizer: str) -> None:
    tiny_files.write_table(tmp_path / "one.csv", ["split", "text", "label"])
    tiny_files.write_table(tmp_path / "two.jsonl", ["split", "text", "second", "label"])
    suite = TextTableSuite(str(tmp_path), tokenizer, metrics={"two": "matthews"}, train_size=7)
    assert suite.names == ("one", "two")
    assert suite.task("two").metric == "matthews"
    batch, which = next(iter(suite.mixture(batch_size=6).train_dataloader()))
    assert batch["input_ids"].shape == batch["attention_mask"].shape
    assert set(which.tolist()) == {0, 1}
    before = suite.fingerprint()
    tiny_files.write_table(tmp_path / "one.csv", ["split", "text", "label"], tiny_files.rows(25))
    assert suite.fingerprint() != before
    with pytest.raises(ValueError, match="metrics names 'three'; tasks: one, two"):
        TextTableSuite(str(tmp_path), tokenizer, metrics={"three": "accuracy"})
    with pytest.raises(ValueError, match="no such folder"):
        NpzSuite(str(tmp_path / "nowhere"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"text": ["a", "b", "c"]}, "text must name one or two columns, got 3"),
        ({"text": ["nothing"]}, "train has no column 'nothing'; its columns: "),
        ({"label": "nothing"}, "train has no column 'nothing'"),
        ({"label": None}, "a classification task needs a label column"),
        ({"kind": "regresion"}, "kind must be one of classification, regression, seq2seq, causal_lm, got 'regresion'"),
        ({"metric": "acuracy"}, "metric 'acuracy' does not suit classification.*did you mean 'accuracy'"),
        ({"tokenizer": "/nonexistent"}, "/nonexistent: the tokenizer cannot be loaded"),
        ({"train_size": 0}, "train_size must be at least 1, got 0"),
        ({"val_fraction": 0.9}, "val_fraction and test_fraction"),
        ({"split": "text"}, "row 2 has the split 'it is bad 0', expected train, val, test"),
    ],
)
def test_errors_of_text_sources(tmp_path, tokenizer: str, arguments, message: str) -> None:
    path = tiny_files.write_table(tmp_path / "a.csv", ["split", "text", "label"])
    with pytest.raises(ValueError, match=message):
        TextTableSource(**{"path": path, "tokenizer": tokenizer, "text": ["text"], **arguments}).build("a", 0)


# ---- Hugging Face datasets


def test_hugging_face_texts_whole_and_streamed(tmp_path, tokenizer: str) -> None:
    path = tiny_files.write_dataset(tmp_path / "a", images=False)
    splits = {"train": "train", "test": "test"}
    source = HuggingFaceTextSource(path=path, splits=splits, text=["sentence"], tokenizer=tokenizer)
    task = source.build("a", 0)
    assert task.class_names == ("no", "yes")
    assert (len(task.train), len(task.val), len(task.test)) == (27, 3, 12)
    assert task.test[1][0]["input_ids"].tolist() == ids("[CLS]", "it", "is", "good", "1", "[SEP]")
    files = {"train": tiny_files.write_table(tmp_path / "t.csv", ["text", "label"])}
    streamed = {"path": "csv", "data_files": files, "streaming": True, "tokenizer": tokenizer, "text": ["text"]}
    task = HuggingFaceTextSource(**streamed, train_size=10).build("a", 0)
    assert (len(task.train), len(task.val), len(task.test)) == (7, 1, 2)
    assert task.class_names == ("no", "yes")
    with pytest.raises(ValueError, match="streaming needs train_size"):
        HuggingFaceTextSource(**streamed)
    with pytest.raises(ValueError, match=r"HuggingFaceTextSource: .*nowhere, train: "):
        HuggingFaceTextSource(path=str(tmp_path / "nowhere"), tokenizer=tokenizer).build("a", 0)


def test_hugging_face_images(tmp_path) -> None:
    path = tiny_files.write_dataset(tmp_path / "a", images=True)
    source = HuggingFaceImageSource(path=path, splits={"train": "train", "test": "test"}, image_size=8, std=1.0)
    task = source.build("a", 0)
    assert task.class_names == tuple(tiny_files.COLOURS)
    image, label = task.test[2]
    assert image.shape == (3, 8, 8)
    assert (image.mean(dim=(1, 2)).argmax(), label) == (2, 2)
    with pytest.raises(ValueError, match="train has no column 'photo'; its columns: image, label"):
        HuggingFaceImageSource(path=path, image="photo").build("a", 0)


# ---- suites of sources


def mixed(tmp_path, tokenizer: str, **arguments) -> SourceSuite:
    table = tiny_files.write_table(tmp_path / "a.csv", ["split", "text", "label"])
    sources = {name: TextTableSource(path=table, tokenizer=tokenizer) for name in ("a", "b", "c")}
    tiny_files.write_npz(tmp_path / "d.npz")
    return SourceSuite({**sources, "d": NpzSource(path=str(tmp_path / "d.npz"))}, **arguments)


def test_held_out_tasks_are_not_trained_on(tmp_path, tokenizer: str) -> None:
    suite = mixed(tmp_path, tokenizer, held_out=["c"])
    assert suite.names == ("a", "b", "d")
    assert suite.held_out == ("c",)
    assert list(suite.train_dataloader()) == ["a", "b", "d"]
    assert suite.fingerprint() != mixed(tmp_path, tokenizer, tasks=["a", "b", "d"]).fingerprint()
    with pytest.raises(ValueError, match="chosen twice: c"):
        mixed(tmp_path, tokenizer, tasks=["a", "c"], held_out=["c"])


def test_a_shared_head_gets_the_training_data_of_its_tasks(tmp_path, tokenizer: str) -> None:
    suite = mixed(tmp_path, tokenizer, held_out=["c"], shared_heads=[["a", "b", "c"]])
    assert suite.head_group("a") == suite.head_group("c") == ("a", "b")
    assert suite.head_group("d") == ("d",)
    assert suite.for_task("d").head_dataloader() is None
    labels = torch.cat([labels for _, labels in suite.for_task("b").head_dataloader()])
    assert torch.equal(labels, torch.cat([suite.task(name).train.labels for name in ("a", "b")]))
    with pytest.raises(ValueError, match="'d' and 'a' cannot share a head: classification of red, green, blue and"):
        mixed(tmp_path, tokenizer, shared_heads=[["a", "d"]]).setup()


def test_equal_configurations_have_equal_descriptions(tmp_path) -> None:
    sources = [NpzSource(path="x", augment=[RandomFlip()]) for _ in range(2)]
    assert describe(sources[0]) == describe(sources[1])
    assert describe(sources[0]) != describe(NpzSource(path="x", augment=[RandomFlip(vertical=True)]))


def test_a_task_checks_its_parts() -> None:
    parts = ([], [], [])
    with pytest.raises(ValueError, match="a classification task with no class names"):
        Task("a", (), *parts)
    with pytest.raises(ValueError, match="a regression task with 2 class names"):
        Task("a", ("x", "y"), *parts, kind="regression")
    with pytest.raises(ValueError, match=r"exactly one \{\}"):
        Task("a", ("x", "y"), *parts, templates=("a photo",))
    assert Task("a", ("x", "y"), *parts, metric="recall@5").metric == "recall@5"


# ---- names and prompts of classes


def test_classes_are_called_what_the_configuration_says(tmp_path, tokenizer: str) -> None:
    path = tiny_files.write_table(tmp_path / "t.csv", ["split", "text", "label"])
    whole = TextTableSource(path=path, tokenizer=tokenizer).build("t", 0)
    told = {"class_names": {"no": "a bad one"}, "templates": ["{} it is", "it is {}"]}
    some = TextTableSource(path=path, tokenizer=tokenizer, **told).build("t", 0)
    assert some.class_names == ("a bad one", "yes")
    assert some.templates == ("{} it is", "it is {}")
    assert torch.equal(some.train.labels, whole.train.labels)  # labels are what they were
    in_order = TextTableSource(path=path, tokenizer=tokenizer, class_names=["bad", "good"]).build("t", 0)
    assert in_order.class_names == ("bad", "good")
    tiny_files.write_npz(tmp_path / "n.npz")
    pictures = NpzSource(path=str(tmp_path / "n.npz"), class_names={"red": "a red tile"}).build("n", 0)
    assert pictures.class_names == ("a red tile", "green", "blue")


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ({"yess": "good"}, "class_names names 'yess', which is no class; did you mean 'yes'?"),
        ({"perhaps": "good"}, "class_names names 'perhaps', which is no class; there are no, yes"),
        (["good"], "class_names has 1 names for 2 classes, in this order: no, yes"),
        ({"no": "yes"}, "class_names: two classes are called 'yes'"),
    ],
)
def test_names_that_do_not_fit_the_classes_are_refused(tmp_path, tokenizer: str, names, message: str) -> None:
    path = tiny_files.write_table(tmp_path / "t.csv", ["split", "text", "label"])
    with pytest.raises(ValueError, match=re.escape(message)):
        TextTableSource(path=path, tokenizer=tokenizer, class_names=names).build("t", 0)
    with pytest.raises(ValueError, match=re.escape("TextTableSource: a template needs exactly one {}, got 'it is'")):
        TextTableSource(path=path, tokenizer=tokenizer, templates=["it is"])


def test_suites_of_folders_take_names_and_prompts_by_task(tmp_path, tokenizer: str) -> None:
    for name in ("a", "b"):
        tiny_files.write_table(tmp_path / "texts" / f"{name}.csv", ["split", "text", "label"])
        (tmp_path / "pictures").mkdir(exist_ok=True)
        tiny_files.write_npz(tmp_path / "pictures" / f"{name}.npz")
    for suite, old, new in (
        (lambda **told: TextTableSuite(str(tmp_path / "texts"), tokenizer, **told), ("no", "yes"), ["bad", "good"]),
        (lambda **told: NpzSuite(str(tmp_path / "pictures"), **told), tuple(tiny_files.COLOURS), ["r", "g", "b"]),
    ):
        told = suite(class_names={"b": new}, templates={"a": ["it is {}"]})
        assert [told.task(name).class_names for name in "ab"] == [old, tuple(new)]
        assert [told.task(name).templates for name in "ab"] == [("it is {}",), ()]
        with pytest.raises(ValueError, match="templates names 'c'; tasks: a, b"):
            suite(templates={"c": ["{}"]})
        with pytest.raises(ValueError, match="class_names names 'c'; tasks: a, b"):
            suite(class_names={"c": new})
