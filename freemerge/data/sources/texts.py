"""What all sources of texts can be told, and how rows of texts become a task."""

# Without postponed annotations: a subclass in another module would have to import the names that they use.

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from freemerge.checkpoints import expand, expand_name
from freemerge.data.errors import DataError, DataWarning, reason_of
from freemerge.data.sources.columns import as_text, check_given, names_of_labels, parse_labels, texts_of, warn_of_empty
from freemerge.data.sources.source import SPLITS, TaskSource
from freemerge.data.sources.tables import Table
from freemerge.data.tasks import Kind, Task, check_kind
from freemerge.data.tokens import TokenDataset
from freemerge.inputs import IGNORED

_CUT = 0.1
"""If more than this share of the training texts is cut, that is worth a warning."""


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
            DataError: if a column is missing, a label cannot be understood, or a text or label is none.
        """
        tables = {split: table if isinstance(table, Table) else Table(table) for split, table in tables.items()}
        columns = self._text_columns(name, tables)
        dealt = self.deal({split: table.size for split, table in tables.items()}, name, seed)
        rows = {split: tables[origin].take(index.tolist()) for split, (origin, index) in dealt.items()}
        if self.kind in ("classification", "regression"):
            for split, table in tables.items():
                check_given(f"task {name!r}, {split}", table, str(self.label))
        class_names: tuple[str, ...] = ()
        if self.kind == "classification":
            class_names = self._class_names(name, tables, names)
        tokenizer = load_tokenizer(self.tokenizer)
        datasets = {}
        for split, table in rows.items():
            where = f"task {name!r}, {split}"
            texts = [texts_of(where, table, column) for column in columns]
            warn_of_empty(where, table, texts, columns)
            datasets[split] = self._encode(where, tokenizer, texts, table, class_names)
            self._check_lengths(where, tokenizer, datasets[split], table)
        origin, index = dealt["test"]
        datasets["test"].sample_names = [tables[origin].place(row) for row in index.tolist()]
        train, val, test = (datasets[split] for split in SPLITS)
        return Task(name, class_names, train, val, test, kind=self.kind, metric=self.metric, tokenizer=self.tokenizer)

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
        if len(columns) == 2 and not any(as_text(value) for table in tables.values() for value in table[columns[1]]):
            return columns[:1]
        return columns

    def _class_names(self, name: str, tables: Mapping[str, Table], names: Sequence[str] | None) -> tuple[str, ...]:
        if isinstance(self.classes, str):
            return read_class_names(self.classes)
        if known := self.classes or names:
            return tuple(known)
        return names_of_labels(f"task {name!r}", [as_text(value) for value in tables["train"][str(self.label)]])

    def _encode(
        self, where: str, tokenizer: Any, texts: list[list[str]], table: Table, names: tuple[str, ...]
    ) -> TokenDataset:
        if self.kind == "causal_lm":
            ends = None if self.label is None else texts_of(where, table, self.label)
            return self._encode_causal(tokenizer, texts, ends)
        encoded = dict(tokenizer(*texts, truncation=True, max_length=self.max_length))
        if self.kind == "seq2seq":
            wanted = texts_of(where, table, str(self.label))
            targets = tokenizer(text_target=wanted, truncation=True, max_length=self.max_target_length)["input_ids"]
            return TokenDataset({**encoded, "labels": targets}, targets)
        return TokenDataset(encoded, parse_labels(where, self.kind, table[str(self.label)], names, table.place))

    def _check_lengths(self, where: str, tokenizer: Any, dataset: TokenDataset, table: Table) -> None:
        """Refuse a text without a token; say so if many are cut, or are longer than the tokenizer's model takes."""
        lengths = dataset.inputs["input_ids"].lengths
        if (lengths == 0).any():
            row = int((lengths == 0).nonzero()[0])
            raise DataError(f"{where}: the text of {table.place(row)} has no token: leave it out")
        longest = int(lengths.max())
        limit = getattr(tokenizer, "model_max_length", None) or longest
        if longest > limit:
            rank_zero_warn(
                f"{where}: the text of {table.place(int(lengths.argmax()))} has {longest} tokens, and the tokenizer "
                f"says that its model takes {limit}: set max_length: {limit}, unless the model takes more",
                category=DataWarning,
            )
        cut = int((lengths >= self.max_length).sum())
        if cut > _CUT * len(lengths) and where.endswith("train"):
            rank_zero_warn(
                f"{where}: {cut} of {len(lengths)} texts fill max_length: {self.max_length}, where they are cut",
                category=DataWarning,
            )

    def _encode_causal(self, tokenizer: Any, texts: list[list[str]], targets: list[str] | None) -> TokenDataset:
        """Text, target and the end, in a row; the loss is of the target and the end."""
        prompts = ["\n".join(parts) for parts in zip(*texts, strict=True)]
        end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        begun = tokenizer(prompts, truncation=True, max_length=self.max_length)["input_ids"]
        begun = [ids[:-1] if end and ids[-1:] == end else ids for ids in begun]
        ids, labels = [], []
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
        return TokenDataset({"input_ids": ids, "attention_mask": [[1] * len(row) for row in ids]}, labels)


def read_class_names(path: str | Path) -> tuple[str, ...]:
    """Names of classes from a text file, one per line.

    Raises:
        ValueError: if the file is not there or empty.
    """
    path = expand(path)
    if not path.is_file():
        raise DataError(f"{path}: there is no such file of class names")
    try:
        names = tuple(line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip())
    except (UnicodeDecodeError, OSError) as error:
        raise DataError(f"{path}: class names cannot be read, expected UTF-8 ({reason_of(error)})") from error
    if not names:
        raise DataError(f"{path}: there are no class names in it")
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise DataError(f"{path}: the class name {twice[0]!r} is there twice")
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
