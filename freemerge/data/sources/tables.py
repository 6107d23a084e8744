"""Tables of text, from CSV, TSV, JSON lines and Parquet files, plain or gzipped."""

from __future__ import annotations

import csv
import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from freemerge.checkpoints.places import expand

Table = dict[str, list[Any]]
"""Column name → values, all columns equally long. Values of CSV and TSV files are strings."""


def read_table(path: str | Path, quoted: bool | None = None) -> Table:
    """Read a table; the file's name says which kind: .csv, .tsv, .jsonl or .parquet, the first three also with .gz.

    Args:
        path: the file.
        quoted: whether `"` quotes fields of CSV and TSV; None: in CSV it does, in TSV it is a character like others.

    Raises:
        ValueError: if the file is not there, is of another kind, or a line does not fit; it says which.
    """
    path = expand(path)
    if not path.is_file():
        raise ValueError(f"{path}: there is no such file")
    suffixes = [suffix for suffix in path.suffixes[-2:] if suffix != ".gz"]
    kind = suffixes[-1] if suffixes else ""
    if kind == ".parquet":
        return _read_parquet(path)
    if kind not in (".csv", ".tsv", ".jsonl"):
        raise ValueError(f"{path}: expected .csv, .tsv, .jsonl (plain or .gz) or .parquet")
    opened = gzip.open if path.suffix == ".gz" else open
    try:
        quoted = kind == ".csv" if quoted is None else quoted
        # csv wants lines untouched; otherwise only a line feed ends a line, a carriage return may be part of a text.
        with opened(path, "rt", encoding="utf-8-sig", newline="" if quoted else "\n") as file:
            if kind == ".jsonl":
                return _read_json_lines(path, file)
            delimiter = "," if kind == ".csv" else "\t"
            plain = (line.rstrip("\r\n").split(delimiter) for line in file)
            return _read_rows(path, csv.reader(file, delimiter=delimiter) if quoted else plain)
    except (UnicodeDecodeError, EOFError, gzip.BadGzipFile, csv.Error) as error:
        raise ValueError(f"{path}: cannot be read as {kind[1:]} ({error})") from error


def _read_rows(path: Path, rows: Iterator[list[str]]) -> Table:
    header = next(rows, None)
    if not header:
        raise ValueError(f"{path}: there is no header line")
    columns: list[list[str]] = [[] for _ in header]
    for number, row in enumerate(rows, start=2):
        if not row or row == [""]:
            continue
        if len(row) != len(header):
            raise ValueError(
                f"{path}: row {number} has {len(row)} fields, the header has {len(header)}: {', '.join(header)}"
            )
        for column, value in zip(columns, row, strict=True):
            column.append(value)
    return dict(zip(header, columns, strict=True))


def _read_json_lines(path: Path, file: TextIO) -> Table:
    table: Table = {}
    for number, line in enumerate(file, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}: line {number} is not JSON ({error})") from error
        if not isinstance(row, dict) or (table and row.keys() != table.keys()):
            expected = f"an object with {', '.join(table)}" if table else "an object"
            raise ValueError(f"{path}: line {number} must be {expected}")
        for key, value in row.items():
            table.setdefault(key, []).append(value)
    return table


def _read_parquet(path: Path) -> Table:
    try:
        from pyarrow import ArrowInvalid, parquet
    except ImportError as error:
        raise ValueError(f"{path}: Parquet files need pyarrow: pip install 'freemerge[datasets]'") from error
    try:
        return parquet.read_table(path).to_pydict()
    except ArrowInvalid as error:
        raise ValueError(f"{path}: cannot be read as parquet ({error})") from error
