"""Texts in tables: CSV, TSV, JSON lines, Parquet."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from freemerge.checkpoints import expand
from freemerge.data.errors import DataError
from freemerge.data.sources.source import SPLITS
from freemerge.data.sources.tables import Table, read_table
from freemerge.data.sources.texts import TextSource, read_class_names
from freemerge.data.tasks import Task

_ALIASES = {"validation": "val", "valid": "val", "dev": "val", "training": "train", "testing": "test"}


@dataclass(kw_only=True)
class TextTableSource(TextSource):
    """A task in one table, or in one table per split.

    Class names are `classes`, or the lines of `<table>.classes.txt` beside the table, or what the labels say.

    Args:
        path: the table, or train, val and test tables by name of split.
        split: the column that says train, val or test (validation and dev are val); without such a column, and for
            splits that do not occur, val and test are cut from the rest by the suite's seed.
        quoted: whether `"` quotes fields of CSV and TSV; None: in CSV it does, in TSV it is a character like others.
    """

    path: str | dict[str, str]
    split: str | None = "split"
    quoted: bool | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.path, dict) and (unknown := set(self.path) - set(SPLITS)):
            raise ValueError(f"TextTableSource: path has {sorted(unknown)[0]!r}, expected {', '.join(SPLITS)}")

    def files(self) -> list[Path]:
        tables = [expand(path) for path in (self.path.values() if isinstance(self.path, dict) else [self.path])]
        names = expand(self.classes) if isinstance(self.classes, str) else self._class_file()
        return tables + ([names] if names is not None else [])

    def build(self, name: str, seed: int) -> Task:
        if isinstance(self.path, dict):
            tables = {split: read_table(path, self.quoted) for split, path in self.path.items()}
        else:
            tables = self._split(read_table(self.path, self.quoted))
        beside = self._class_file()
        return self.make_task(name, tables, seed, read_class_names(beside) if beside else None)

    def _class_file(self) -> Path | None:
        """`<table>.classes.txt`, where there is one and it is asked for."""
        if self.classes is not None or self.kind != "classification" or isinstance(self.path, dict):
            return None
        path = expand(self.path)
        beside = path.with_name(f"{path.name.split('.')[0]}.classes.txt")
        return beside if beside.is_file() else None

    def _split(self, table: Table) -> dict[str, Table]:
        if self.split is None or self.split not in table:
            return {"train": table}
        rows: dict[str, list[int]] = {}
        for row, value in enumerate(table[self.split]):
            word = str(value).strip().lower()
            split = _ALIASES.get(word, word)
            if split not in SPLITS:
                raise DataError(f"{table.place(row)} has the split {value!r}, expected {', '.join(SPLITS)}")
            rows.setdefault(split, []).append(row)
        if rows and "train" not in rows:
            raise DataError(f"{self.path}: the column {self.split!r} says {', '.join(sorted(rows))}, and never train")
        del table[self.split]
        return {split: table.take(chosen) for split, chosen in rows.items()}
