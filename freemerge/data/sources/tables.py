"""Tables of texts, from CSV, TSV and JSON Lines files (plain or gzipped) and Parquet files.

The readers are our own, because every error must name the line, quotes are ordinary characters in TSV, and values must
stay strings.
"""

from __future__ import annotations

import csv
import gzip
import json
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from freemerge.checkpoints import expand
from freemerge.data.errors import DataError, DataWarning, listed, reason_of


class Table(dict[str, list[Any]]):
    """Column name → values; all columns have the same length. Values of CSV and TSV files are strings.

    Args:
        columns: the values by column.
        source: the name of the file or dataset, for messages.
        numbers: each row's number in its file, from 1, for messages; None names rows `sample` and their index.
        word: the word before that number: `row` or `line`.
    """

    def __init__(
        self,
        columns: Mapping[str, list[Any]],
        source: str = "",
        numbers: Sequence[int] | None = None,
        word: str = "row",
    ) -> None:
        super().__init__(columns)
        self.source = source
        self.numbers = numbers
        self.word = word

    @property
    def size(self) -> int:
        """The number of rows."""
        return len(next(iter(self.values()), []))

    def row_name(self, row: int) -> str:
        """The name of a row in messages.

        Args:
            row: the row's index.

        Returns:
            For instance `birds.csv, row 3`.
        """
        if self.numbers is None:
            return f"{self.source}, sample {row}" if self.source else f"sample {row}"
        return f"{self.source}, {self.word} {self.numbers[row]}"

    def take(self, rows: Sequence[int]) -> Table:
        """A table of selected rows.

        Args:
            rows: the rows' indices, in order.

        Returns:
            The new table, with the same columns.
        """
        columns = {column: [values[row] for row in rows] for column, values in self.items()}
        if self.numbers is None:
            return Table(columns, self.source)
        return Table(columns, self.source, [self.numbers[row] for row in rows], self.word)


def read_table(path: str | Path, quoted: bool | None = None) -> Table:
    """Read a table. The suffix determines the format: .csv, .tsv, .jsonl (each also with .gz) or .parquet.

    Args:
        path: the file, in UTF-8 (with or without a byte order mark).
        quoted: whether `"` quotes fields; None: it does in CSV, and is an ordinary character in TSV.

    Returns:
        The table.

    Raises:
        DataError: if the file does not exist, has another format, or a line is invalid; names the line.
    """
    path = expand(path)
    if not path.is_file():
        raise DataError(f"{path}: there is no such file")
    suffixes = [suffix.lower() for suffix in path.suffixes[-2:] if suffix.lower() != ".gz"]
    kind = suffixes[-1] if suffixes else ""
    if kind == ".parquet":
        return _read_parquet(path)
    if kind not in (".csv", ".tsv", ".jsonl"):
        raise DataError(f"{path}: expected .csv, .tsv, .jsonl (plain or .gz) or .parquet")
    opened = gzip.open if path.suffix.lower() == ".gz" else open
    try:
        quoted = kind == ".csv" if quoted is None else quoted
        # The csv module needs unchanged line ends. In other formats only a line feed ends a line, because a text may
        # contain a carriage return.
        with opened(path, "rt", encoding="utf-8-sig", newline="" if quoted else "\n") as file:
            if kind == ".jsonl":
                return _read_json_lines(path, file)
            delimiter = "," if kind == ".csv" else "\t"
            plain = (line.rstrip("\r\n").split(delimiter) for line in file)
            # strict, because an unclosed quote would otherwise silently include the rest of the file in one field
            return _read_rows(path, csv.reader(file, delimiter=delimiter, strict=True) if quoted else plain, delimiter)
    except UnicodeDecodeError as error:
        raise DataError(_not_utf8(path, opened)) from error
    except (EOFError, OSError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read as {kind[1:]} ({reason_of(error)})") from error


def _not_utf8(path: Path, opened: Any) -> str:
    """The message for a file that is not UTF-8: the line, and how to convert the file."""
    with opened(path, "rb") as file:
        if (start := file.read(2)) in (b"\xff\xfe", b"\xfe\xff"):
            name = "UTF-16LE" if start == b"\xff\xfe" else "UTF-16BE"
            return f"{path}: the file is UTF-16, expected UTF-8; convert it with iconv -f {name} -t UTF-8"
        file.seek(0)
        for number, line in enumerate(file, start=1):
            try:
                line.decode()
            except UnicodeDecodeError as error:
                near = line[max(0, error.start - 12) : error.end + 8].decode("latin-1").strip()
                return (
                    f"{path}: line {number} is not UTF-8 (near {near!r}, if it is Latin-1); "
                    f"convert such a file with iconv -f WINDOWS-1252 -t UTF-8"
                )
    return f"{path}: the file is not UTF-8"


def _read_rows(path: Path, rows: Iterator[list[str]], delimiter: str) -> Table:
    header = next(rows, None)
    if not header or header == [""]:
        raise DataError(f"{path}: there is no header line")
    header = [name.strip() for name in header]
    _check_header(path, header, delimiter)
    columns: list[list[str]] = [[] for _ in header]
    numbers, number = [], 1
    try:
        for number, row in enumerate(rows, start=2):
            if not row or row == [""]:
                continue
            if len(row) != len(header):
                raise DataError(
                    f"{path}: row {number} has {len(row)} fields, the header has {len(header)}: {', '.join(header)}"
                )
            if len(header) > 1 and row == header:
                raise DataError(f"{path}: row {number} repeats the header: delete it")
            numbers.append(number)
            for column, value in zip(columns, row, strict=True):
                column.append(value)
    except csv.Error as error:
        hint = " (a quote that is not closed?)" if "limit" in str(error) or "unexpected end" in str(error) else ""
        raise DataError(
            f"{path}: row {number + 1} cannot be read: {reason_of(error)}{hint}; `quoted: false` makes quotes ordinary "
            f"characters"
        ) from error
    return Table(_drop_unnamed(path, dict(zip(header, columns, strict=True))), str(path), numbers)


def _check_header(path: Path, header: list[str], delimiter: str) -> None:
    if twice := [name for name, count in Counter(header).items() if count > 1]:
        raise DataError(f"{path}: the header has {twice[0]!r} twice; rename one")
    if any("\r" in name for name in header):
        raise DataError(f"{path}: lines end with a carriage return only: convert the file with tr '\\r' '\\n'")
    other = next((mark for mark in ";\t,|" if mark != delimiter and mark in header[0]), None)
    if len(header) == 1 and other is not None:
        raise DataError(
            f"{path}: the header has one field, {header[0]!r}, with fields separated by {other!r}; expected "
            f"{delimiter!r} in a {path.suffixes[0]} file"
        )


def _drop_unnamed(path: Path, columns: dict[str, list[Any]]) -> dict[str, list[Any]]:
    """Remove columns without a name, with a warning."""
    unnamed = [name for name in columns if not name or name.startswith(("Unnamed: ", "__index_level_"))]
    if unnamed and len(unnamed) < len(columns):
        rank_zero_warn(
            f"{path}: a column without a name is ignored (the index of a DataFrame? to_csv(index=False) omits it)",
            category=DataWarning,
        )
        return {name: values for name, values in columns.items() if name not in unnamed}
    return columns


def _read_json_lines(path: Path, file: TextIO) -> Table:
    table: dict[str, list[Any]] = {}
    numbers: list[int] = []
    for number, line in enumerate(file, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            whole = "; write a JSON array as one object per line" if line.lstrip()[:1] == "[" else ""
            raise DataError(f"{path}: line {number} is not JSON ({reason_of(error)}){whole}") from error
        if not isinstance(row, dict):
            raise DataError(f"{path}: line {number} must be an object, got {type(row).__name__}")
        if numbers and row.keys() != table.keys():
            lacks, more = sorted(table.keys() - row.keys()), sorted(row.keys() - table.keys())
            found = [f"lacks {listed(lacks)}"] * bool(lacks) + [f"also has {listed(more)}"] * bool(more)
            raise DataError(
                f"{path}: line {number} must be an object with {', '.join(table)}; it {' and '.join(found)}"
            )
        numbers.append(number)
        for key, value in row.items():
            table.setdefault(key, []).append(value)
    if not numbers:
        raise DataError(f"{path}: the file is empty")
    return Table(table, str(path), numbers, "line")


def _read_parquet(path: Path) -> Table:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise DataError(f"{path}: Parquet files need pyarrow: pip install 'freemerge[datasets]'") from error
    try:
        table = parquet.read_table(path)
        if twice := [name for name, count in Counter(table.column_names).items() if count > 1]:
            raise DataError(f"{path}: there are two columns {twice[0]!r}; rename one")
        return Table(_drop_unnamed(path, table.to_pydict()), str(path), range(1, table.num_rows + 1))
    except (ArrowException, OSError) as error:
        raise DataError(f"{path}: cannot be read as parquet ({reason_of(error)})") from error
