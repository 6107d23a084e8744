"""Tiny files of every kind that the configurations name: images, tables, datasets, tokenizers."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")
WORDS = (*SPECIAL, *"a photo of the red green blue good bad what is it yes no 0 1 2 3".split())  # noqa: SIM905
COLOURS = {"red": (220, 30, 30), "green": (30, 220, 30), "blue": (30, 30, 220)}


def pixels(colour: str, generator: np.random.Generator, side: int = 12) -> np.ndarray:
    """A noisy image (side, side, 3) of one colour."""
    noise = generator.integers(-25, 26, (side, side, 3))
    return (np.array(COLOURS[colour]) + noise).clip(0, 255).astype(np.uint8)


def write_tokenizer(folder: Path, words: Sequence[str] = WORDS) -> str:
    """A tokenizer of whole words that begins texts with [CLS] and ends them with [SEP]; `SPECIAL` come first."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    ends = [("[CLS]", words.index("[CLS]")), ("[SEP]", words.index("[SEP]"))]
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=ends
    )
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "eos_token": "[SEP]"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)
    return str(folder)


def write_image_folders(folder: Path, per_class: int = 12) -> str:
    """`<folder>/<colour>/<n>.png`."""
    generator = np.random.default_rng(0)
    for colour in COLOURS:
        (folder / colour).mkdir(parents=True)
        for number in range(per_class):
            Image.fromarray(pixels(colour, generator, 10 + number % 3)).save(folder / colour / f"{number}.png")
    return str(folder)


def write_npz(path: Path, grey: bool = False) -> None:
    """A task in an NPZ file: 24, 9 and 9 images of three colours."""
    generator, arrays = np.random.default_rng(0), {"class_names": np.array(list(COLOURS))}
    for split, size in (("train", 24), ("val", 9), ("test", 9)):
        labels = np.arange(size) % 3
        images = np.stack([pixels(list(COLOURS)[label], generator) for label in labels])
        arrays |= {f"{split}_images": images[..., 0] if grey else images, f"{split}_labels": labels}
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, **arrays)


def rows(size: int = 30) -> list[dict[str, str | float]]:
    """Rows with every column that a configuration may select."""
    values = []
    for number in range(size):
        good = number % 2
        values.append(
            {
                "split": ("train", "train", "train", "val", "test")[number % 5],
                "text": f"it is {'good' if good else 'bad'} {number % 4}",
                "second": f"what is {list(COLOURS)[number % 3]}",
                "label": "yes" if good else "no",
                "answer": f"{'good' if good else 'bad'} {number % 4}",
                "score": good + 0.25 * (number % 4),
            }
        )
    return values


def write_table(path: Path, columns: list[str], table: list[dict] | None = None) -> str:
    """Some columns of `rows` as CSV, TSV, JSON lines or Parquet, by the file's suffix."""
    chosen = [{column: row[column] for column in columns} for row in (table or rows())]
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in chosen))
    elif path.suffix == ".parquet":
        import pyarrow
        from pyarrow import parquet

        parquet.write_table(pyarrow.Table.from_pylist(chosen), path)
    else:
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, columns, delimiter="," if path.suffix == ".csv" else "\t")
            writer.writeheader()
            writer.writerows(chosen)
    return str(path)


def write_dataset(folder: Path, images: bool) -> str:
    """A Hugging Face dataset with train and test, as `save_to_disk` writes it."""
    import datasets

    if images:
        generator, names = np.random.default_rng(0), list(COLOURS)
        features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=names)})
        make = lambda size: {  # noqa: E731
            "image": [Image.fromarray(pixels(names[i % 3], generator)) for i in range(size)],
            "label": [i % 3 for i in range(size)],
        }
    else:
        names = ["no", "yes"]
        label = datasets.ClassLabel(names=names)
        texts = {key: datasets.Value("string") for key in ("sentence", "sentence1", "sentence2")}
        features = datasets.Features({**texts, "label": label})
        make = lambda size: {  # noqa: E731
            "sentence": [row["text"] for row in rows(size)],
            "sentence1": [row["text"] for row in rows(size)],
            "sentence2": [row["second"] for row in rows(size)],
            "label": [names.index(row["label"]) for row in rows(size)],
        }
    parts = {
        split: datasets.Dataset.from_dict(make(size), features=features)
        for split, size in (("train", 30), ("test", 12))
    }
    datasets.DatasetDict(parts).save_to_disk(folder)
    return str(folder)
