"""Tasks of texts in tables: CSV, TSV, JSON Lines, Parquet."""

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

    The class names are `classes`, or the lines of `<table>.classes.txt` in the table's folder, or derived from the
    labels.

    Args:
        path: the table, or split → table for train, val and test.
        split: the column with the values train, val (also validation, valid or dev) and test. If there is no such
            column or a split does not occur, val and test are cut from train, using the suite's seed.
        quoted: whether `"` quotes fields of CSV and TSV; None: it does in CSV, and is an ordinary character in TSV.
    """

    path: str | dict[str, str]
    split: str | None = "split"
    quoted: bool | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.path, dict) and (unknown := set(self.path) - set(SPLITS)):
            raise ValueError(f"TextTableSource: path has {sorted(unknown)[0]!r}, expected {', '.join(SPLITS)}")

    def files(self) -> list[Path]:
        """The tables, and the file of class names if there is one."""
        tables = [expand(path) for path in (self.path.values() if isinstance(self.path, dict) else [self.path])]
        names = expand(self.classes) if isinstance(self.classes, str) else self._class_file()
        return tables + ([names] if names is not None else [])

    def build(self, name: str, seed: int) -> Task:
        """Build the task; see `TaskSource.build`.

        Args:
            name: the task's name.
            seed: seed of the splits and subsets.

        Returns:
            The task.

        Raises:
            DataError: if a table cannot be read, or a column, text or label is missing or invalid.
        """
        if isinstance(self.path, dict):
            tables = {split: read_table(path, self.quoted) for split, path in self.path.items()}
        else:
            tables = self._split(read_table(self.path, self.quoted))
        class_file = self._class_file()
        return self.make_task(name, tables, seed, read_class_names(class_file) if class_file else None)

    def _class_file(self) -> Path | None:
        """`<table>.classes.txt`, if it exists and the task needs class names."""
        if self.classes is not None or self.kind != "classification" or isinstance(self.path, dict):
            return None
        path = expand(self.path)
        class_file = path.with_name(f"{path.name.split('.')[0]}.classes.txt")
        return class_file if class_file.is_file() else None

    def _split(self, table: Table) -> dict[str, Table]:
        if self.split is None or self.split not in table:
            return {"train": table}
        rows: dict[str, list[int]] = {}
        for row, value in enumerate(table[self.split]):
            word = str(value).strip().lower()
            split = _ALIASES.get(word, word)
            if split not in SPLITS:
                raise DataError(f"{table.row_name(row)} has the split {value!r}, expected {', '.join(SPLITS)}")
            rows.setdefault(split, []).append(row)
        if rows and "train" not in rows:
            raise DataError(f"{self.path}: the column {self.split!r} has {', '.join(sorted(rows))}, but never train")
        del table[self.split]
        return {split: table.take(chosen) for split, chosen in rows.items()}
