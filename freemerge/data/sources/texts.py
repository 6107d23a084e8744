"""What all sources of texts can be told, and how rows of texts become a task."""

# Without postponed annotations: a subclass in another module would have to import the names that they use.

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from freemerge.checkpoints.places import expand, expand_name
from freemerge.data.sources.source import TaskSource
from freemerge.data.sources.tables import Table
from freemerge.data.tasks import Kind, Task, check_kind
from freemerge.data.tokens import TokenDataset
from freemerge.inputs import IGNORED


@dataclass(kw_only=True)
class TextSource(TaskSource):
    """Base class of sources of texts.

    What a row asks depends on `kind`: `classification` has a class in the label's column and `regression` a number;
    `seq2seq` has the target text there, and so has `causal_lm`, whose loss is of the target alone, after the text; a
    `causal_lm` without a label's column learns the whole text.

    Args:
        tokenizer: hub id or folder of the model's tokenizer.
        text: the one or two columns of text; None takes all columns but those of label and split. An empty second
            column counts as none.
        label: the column of the label; null for plain texts of `causal_lm`.
        classes: names of the classes, or a file with one per line; None takes what the data says of itself. A label
            is a name or an index.
        kind: what is asked: classification, regression, seq2seq or causal_lm.
        metric: what the task is judged by; None is the kind's default.
        max_length: texts are cut to so many tokens; in `causal_lm` text and target together.
        max_target_length: targets of `seq2seq` are cut to so many tokens.
    """

    tokenizer: str
    text: list[str] | None = None
    label: str | None = "label"
    classes: list[str] | str | None = None
    kind: Kind = "classification"
    metric: str | None = None
    max_length: int = 128
    max_target_length: int = 128

    def __post_init__(self) -> None:
        super().__post_init__()
        where = type(self).__name__
        check_kind(where, self.kind, self.metric)
        if self.text is not None and len(self.text) not in (1, 2):
            raise ValueError(f"{where}: text must name one or two columns, got {len(self.text)}")
        if self.label is None and self.kind != "causal_lm":
            raise ValueError(f"{where}: a {self.kind} task needs a label's column")

    def make_task(self, name: str, tables: Mapping[str, Table], seed: int, names: Sequence[str] | None = None) -> Task:
        """Tokenize rows and make a task of them.

        Args:
            name: the task's name.
            tables: rows by split; the texts' and the label's columns are looked up, others ignored.
            seed: of the draws.
            names: names of the classes that the data bring along; `classes` goes before them.

        Raises:
            ValueError: if a column is missing, or a label cannot be understood.
        """
        columns = self._text_columns(name, tables)
        sizes = {split: len(next(iter(table.values()), [])) for split, table in tables.items()}
        dealt = self.deal(sizes, name, seed)
        rows = {
            split: {column: [tables[origin][column][i] for i in index.tolist()] for column in tables[origin]}
            for split, (origin, index) in dealt.items()
        }
        tokenizer = load_tokenizer(self.tokenizer)
        class_names: tuple[str, ...] = ()
        if self.kind == "classification":
            class_names = self._class_names(name, tables, names)
        datasets = {}
        for split, table in rows.items():
            texts = [[_as_text(value) for value in table[column]] for column in columns]
            labels = None if self.label is None else table[self.label]
            datasets[split] = self._encode(f"task {name!r}, {split}", tokenizer, texts, labels, class_names)
        return Task(name, class_names, **datasets, kind=self.kind, metric=self.metric)

    def _text_columns(self, name: str, tables: Mapping[str, Table]) -> list[str]:
        known = list(tables["train"]) if "train" in tables else []
        other = {self.label, getattr(self, "split", None)}
        columns = self.text or [column for column in known if column not in other]
        if self.text is None and len(columns) not in (1, 2):
            raise ValueError(
                f"task {name!r}: which columns are the text? Name one or two in `text`; there are {', '.join(columns)}"
            )
        for column in [*columns, *([self.label] if self.label else [])]:
            for split, table in tables.items():
                if column not in table:
                    raise ValueError(
                        f"task {name!r}: there is no column {column!r} in {split}; there are {', '.join(table)}"
                    )
        if len(columns) == 2 and not any(value for table in tables.values() for value in table[columns[1]]):
            return columns[:1]
        return columns

    def _class_names(self, name: str, tables: Mapping[str, Table], names: Sequence[str] | None) -> tuple[str, ...]:
        if isinstance(self.classes, str):
            return read_class_names(self.classes)
        if self.classes or names:
            return tuple(self.classes or names)
        values = {_as_text(value) for value in tables["train"][self.label]}
        if all(value.isdigit() for value in values):
            return tuple(map(str, range(max(map(int, values)) + 1)))
        return tuple(sorted(values))

    def _encode(
        self, where: str, tokenizer: Any, texts: list[list[str]], labels: list[Any] | None, names: tuple[str, ...]
    ) -> TokenDataset:
        if self.kind == "causal_lm":
            return self._encode_causal(tokenizer, texts, labels)
        encoded = dict(tokenizer(*texts, truncation=True, max_length=self.max_length))
        if self.kind == "seq2seq":
            targets = tokenizer(
                text_target=[_as_text(value) for value in labels], truncation=True, max_length=self.max_target_length
            )["input_ids"]
            return TokenDataset({**encoded, "labels": targets}, targets)
        return TokenDataset(encoded, parse_labels(where, self.kind, labels, names))

    def _encode_causal(self, tokenizer: Any, texts: list[list[str]], targets: list[Any] | None) -> TokenDataset:
        """Text, target and the end, in a row; the loss is of the target and the end."""
        prompts = ["\n".join(parts) for parts in zip(*texts, strict=True)]
        end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        begun = tokenizer(prompts, truncation=True, max_length=self.max_length)["input_ids"]
        begun = [ids[:-1] if end and ids[-1:] == end else ids for ids in begun]
        ids, labels = [], []
        if targets is None:
            follow: list[list[int]] = [[] for _ in begun]
        else:
            follow = tokenizer([_as_text(value) for value in targets], add_special_tokens=False)["input_ids"]
        for prompt, target in zip(begun, follow, strict=True):
            asked = [*target, *end][: self.max_length]
            kept = prompt[: max(1, self.max_length - len(asked))] if targets is not None else prompt
            whole = [*kept, *asked][: self.max_length]
            ids.append(whole)
            labels.append(whole if targets is None else [IGNORED] * len(kept) + whole[len(kept) :])
        return TokenDataset({"input_ids": ids, "attention_mask": [[1] * len(row) for row in ids]}, labels)


def parse_labels(where: str, kind: str, values: Sequence[Any], names: tuple[str, ...]) -> Tensor:
    """A column of labels as a tensor (N,): int64 classes, or float32 numbers.

    Args:
        where: what messages begin with.
        kind: classification or regression.
        values: names or indices of classes, or numbers; as strings or as they are.
        names: the classes.

    Raises:
        ValueError: for a label that is none of these; it says which, and in which row.
    """
    if kind == "regression":
        numbers = []
        for row, value in enumerate(values):
            try:
                numbers.append(float(value))
            except (TypeError, ValueError):
                numbers.append(math.nan)
            if not math.isfinite(numbers[-1]):
                raise ValueError(f"{where}: sample {row} has the label {value!r}, expected a number")
        return torch.tensor(numbers, dtype=torch.float32)
    index = {str(position): position for position in range(len(names))}
    index.update({label: position for position, label in enumerate(names)})  # where both could be meant, it is a name
    for row, value in enumerate(values):
        if _as_text(value) not in index:
            raise ValueError(
                f"{where}: sample {row} has the label {value!r}, expected one of {', '.join(names[:20])}"
                f"{', …' if len(names) > 20 else ''} or an index below {len(names)}"
            )
    return torch.tensor([index[_as_text(value)] for value in values])


def _as_text(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool) or (isinstance(value, float) and value.is_integer()):
        return str(int(value))
    return str(value)


def read_class_names(path: str | Path) -> tuple[str, ...]:
    """Names of classes from a text file, one per line.

    Raises:
        ValueError: if the file is not there or empty.
    """
    path = expand(path)
    if not path.is_file():
        raise ValueError(f"{path}: there is no such file of class names")
    names = tuple(line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip())
    if not names:
        raise ValueError(f"{path}: there are no class names in it")
    return names


def load_tokenizer(name: str) -> Any:
    """A tokenizer by hub id or folder.

    Raises:
        ValueError: if there is none.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(expand_name(name))
    except (OSError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{name}: no tokenizer could be loaded from there ({reason})") from error
