"""The options that all text sources share, and the conversion of rows of texts to a task."""

# No `from __future__ import annotations`: a subclass in another module would have to import the names of these types.

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from freemerge.checkpoints import expand, expand_name
from freemerge.data.errors import DataError, DataWarning, reason_of
from freemerge.data.sources.classes import ClassSource
from freemerge.data.sources.columns import (
    as_text,
    check_labels_present,
    class_names_from_labels,
    parse_labels,
    read_texts,
    warn_about_empty_texts,
)
from freemerge.data.sources.source import SPLITS
from freemerge.data.sources.tables import Table
from freemerge.data.tasks import Kind, Task, check_kind
from freemerge.data.tokens import TokenDataset
from freemerge.inputs import IGNORED

_CUT_WARNING_FRACTION = 0.1
"""A warning is shown if more than this fraction of the training texts is truncated."""


@dataclass(kw_only=True)
class TextSource(ClassSource):
    """Base class of text sources.

    The label column contains a class for `classification`, a number for `regression`, and a target text for `seq2seq`
    and `causal_lm`. A `causal_lm` sample is the text followed by the target, and only the target has a loss; without a
    label column, the whole text has.

    Args:
        tokenizer: hub id or folder of the model's tokenizer.
        text: one or two text columns; None takes all columns except `label` and `split`. A second column without any
            text is ignored.
        label: the label column; null for a `causal_lm` without targets.
        classes: the classes as the labels name them, or a file with one per line; None takes them from the data. A
            label is one of these names or a class index.
        kind: kind of task: classification, regression, seq2seq or causal_lm.
        metric: the task's metric; None takes the kind's default.
        max_length: texts are truncated to this many tokens; for `causal_lm`, text and target together.
        max_target_length: targets of `seq2seq` are truncated to this many tokens.

    Raises:
        ValueError: if `kind`, `metric`, `text` and `label` do not fit together.
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
            raise ValueError(f"{where}: a {self.kind} task needs a label column")

    def make_task(self, name: str, tables: Mapping[str, Table], seed: int, names: Sequence[str] | None = None) -> Task:
        """Tokenize rows and make a task of them.

        Args:
            name: the task's name.
            tables: split → rows; columns other than `text` and `label` are ignored.
            seed: seed of the splits and subsets.
            names: class names from the data; `classes` takes precedence.

        Returns:
            The task.

        Raises:
            DataError: if a text or label is missing or invalid.
            ValueError: if a column is missing.
        """
        tables = {split: table if isinstance(table, Table) else Table(table) for split, table in tables.items()}
        columns = self._text_columns(name, tables)
        selected = self.split_samples({split: table.size for split, table in tables.items()}, name, seed)
        rows = {split: tables[origin].take(index.tolist()) for split, (origin, index) in selected.items()}
        if self.kind in ("classification", "regression"):
            for split, table in tables.items():
                check_labels_present(f"task {name!r}, {split}", table, str(self.label))
        class_names: tuple[str, ...] = ()
        if self.kind == "classification":
            class_names = self._class_names(name, tables, names)
        tokenizer = load_tokenizer(self.tokenizer)
        datasets = {}
        for split, table in rows.items():
            where = f"task {name!r}, {split}"
            texts = [read_texts(where, table, column) for column in columns]
            warn_about_empty_texts(where, table, texts, columns)
            datasets[split] = self._encode(where, tokenizer, texts, table, class_names)
            self._check_lengths(where, tokenizer, datasets[split], table)
        origin, index = selected["test"]
        datasets["test"].sample_names = [tables[origin].row_name(row) for row in index.tolist()]
        train, val, test = (datasets[split] for split in SPLITS)
        return Task(
            name,
            self.named(name, class_names),
            train,
            val,
            test,
            kind=self.kind,
            metric=self.metric,
            templates=tuple(self.templates or ()),
            tokenizer=self.tokenizer,
        )

    def _text_columns(self, name: str, tables: Mapping[str, Table]) -> list[str]:
        known = list(tables["train"]) if "train" in tables else []
        other = {self.label, getattr(self, "split", None)}
        columns = self.text or [column for column in known if column not in other]
        if self.text is None and len(columns) not in (1, 2):
            raise ValueError(
                f"task {name!r}: name one or two text columns in `text`; columns that could be: {', '.join(columns)}"
            )
        for column in [*columns, *([self.label] if self.label else [])]:
            for split, table in tables.items():
                if column not in table:
                    raise ValueError(
                        f"task {name!r}: {split} has no column {column!r}; its columns: {', '.join(table)}"
                    )
        if len(columns) == 2 and not any(as_text(value) for table in tables.values() for value in table[columns[1]]):
            return columns[:1]
        return columns

    def _class_names(self, name: str, tables: Mapping[str, Table], names: Sequence[str] | None) -> tuple[str, ...]:
        if isinstance(self.classes, str):
            return read_class_names(self.classes)
        if known := self.classes or names:
            return tuple(known)
        return class_names_from_labels(f"task {name!r}", [as_text(value) for value in tables["train"][str(self.label)]])

    def _encode(
        self, where: str, tokenizer: Any, texts: list[list[str]], table: Table, names: tuple[str, ...]
    ) -> TokenDataset:
        if self.kind == "causal_lm":
            ends = None if self.label is None else read_texts(where, table, self.label)
            return self._encode_causal(tokenizer, texts, ends)
        encoded = dict(tokenizer(*texts, truncation=True, max_length=self.max_length))
        if self.kind == "seq2seq":
            wanted = read_texts(where, table, str(self.label))
            targets = tokenizer(text_target=wanted, truncation=True, max_length=self.max_target_length)["input_ids"]
            return TokenDataset({**encoded, "labels": targets}, targets)
        return TokenDataset(encoded, parse_labels(where, self.kind, table[str(self.label)], names, table.row_name))

    def _check_lengths(self, where: str, tokenizer: Any, dataset: TokenDataset, table: Table) -> None:
        """Refuse a text without tokens; warn if many are truncated, or longer than the tokenizer's model takes."""
        lengths = dataset.inputs["input_ids"].lengths
        if (lengths == 0).any():
            row = int((lengths == 0).nonzero()[0])
            raise DataError(f"{where}: the text of {table.row_name(row)} has no tokens: remove it")
        longest = int(lengths.max())
        limit = getattr(tokenizer, "model_max_length", None) or longest
        if longest > limit:
            rank_zero_warn(
                f"{where}: the text of {table.row_name(int(lengths.argmax()))} has {longest} tokens, but the "
                f"tokenizer's model_max_length is {limit}: set max_length: {limit}, unless the model takes more",
                category=DataWarning,
            )
        cut = int((lengths >= self.max_length).sum())
        if cut > _CUT_WARNING_FRACTION * len(lengths) and where.endswith("train"):
            rank_zero_warn(
                f"{where}: {cut} of {len(lengths)} texts reach max_length: {self.max_length}, where they are truncated",
                category=DataWarning,
            )

    def _encode_causal(self, tokenizer: Any, texts: list[list[str]], targets: list[str] | None) -> TokenDataset:
        """Concatenate text, target and end-of-sequence token; only the target and this token have a loss.

        `prompt_mask` is 1 at the text's tokens, which a router may read; without targets, at all.
        """
        prompts = ["\n".join(parts) for parts in zip(*texts, strict=True)]
        end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        begun = tokenizer(prompts, truncation=True, max_length=self.max_length)["input_ids"]
        begun = [ids[:-1] if end and ids[-1:] == end else ids for ids in begun]
        ids, labels, shown = [], [], []
        if targets is None:
            follow: list[list[int]] = [[] for _ in begun]
        else:
            follow = tokenizer(targets, add_special_tokens=False)["input_ids"]
        for prompt, target in zip(begun, follow, strict=True):
            asked = [*target, *end][: self.max_length]
            kept = prompt[: max(1, self.max_length - len(asked))] if targets is not None else prompt
            whole = [*kept, *asked][: self.max_length]
            ids.append(whole)
            labels.append(whole if targets is None else [IGNORED] * len(kept) + whole[len(kept) :])
            shown.append([1] * len(whole) if targets is None else [1] * len(kept) + [0] * (len(whole) - len(kept)))
        masks = {"attention_mask": [[1] * len(row) for row in ids], "prompt_mask": shown}
        return TokenDataset({"input_ids": ids, **masks}, labels)


def read_class_names(path: str | Path) -> tuple[str, ...]:
    """Read class names from a text file, one per line.

    Args:
        path: the file, in UTF-8; empty lines are ignored.

    Returns:
        The names, in order.

    Raises:
        DataError: if the file does not exist, is not UTF-8, is empty, or repeats a name.
    """
    path = expand(path)
    if not path.is_file():
        raise DataError(f"{path}: there is no such file of class names")
    try:
        names = tuple(line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip())
    except (UnicodeDecodeError, OSError) as error:
        raise DataError(f"{path}: class names cannot be read, expected UTF-8 ({reason_of(error)})") from error
    if not names:
        raise DataError(f"{path}: the file has no class names")
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise DataError(f"{path}: the class name {twice[0]!r} occurs twice")
    return names


def load_tokenizer(name: str) -> Any:
    """Load a tokenizer.

    Args:
        name: hub id or folder.

    Returns:
        The tokenizer, from `AutoTokenizer`.

    Raises:
        ValueError: if there is no such tokenizer.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(expand_name(name))
    except (OSError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{name}: the tokenizer cannot be loaded ({reason})") from error
