"""Conversion of table columns to texts, classes and numbers; errors name the row."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor

from freemerge.data.errors import DataError, DataWarning, listed
from freemerge.data.sources.tables import Table

_NO_LABEL = ("", "nan", "none", "null", "n/a", "na")  # all but "" mean a missing label only if other labels are numbers


def as_text(value: Any) -> str:
    """Write a table's value as text.

    Args:
        value: a string, a number or a boolean; None and NaN are missing values.

    Returns:
        Its text: whole floats and booleans are written as integers, missing values as the empty string.
    """
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, bool) or (isinstance(value, float) and value.is_integer()):
        return str(int(value))
    return str(value)


def read_texts(where: str, table: Table, column: str) -> list[str]:
    """Read a column of texts.

    Args:
        where: the beginning of error messages.
        table: the table.
        column: the column's name.

    Returns:
        One text per row.

    Raises:
        DataError: if a value is a list, an object or bytes; names the row.
    """
    for row, value in enumerate(table[column]):
        if isinstance(value, (list, tuple, dict, bytes)):
            raise DataError(
                f"{where}: {column!r} of {table.row_name(row)} is a {type(value).__name__}, expected a text"
            )
    return [as_text(value) for value in table[column]]


def warn_about_empty_texts(where: str, table: Table, texts: Sequence[Sequence[str]], columns: Sequence[str]) -> None:
    """Warn of rows that have no text in any column.

    Args:
        where: the beginning of the message.
        table: the table; it names the rows.
        texts: one list of texts per column.
        columns: the columns' names.
    """
    empty = [row for row, parts in enumerate(zip(*texts, strict=True)) if not any(part.strip() for part in parts)]
    if empty:
        rank_zero_warn(
            f"{where}: {len(empty)} of {table.size} samples have no text in {' and '.join(columns)}: "
            f"{listed([table.row_name(row) for row in empty], 3)}",
            category=DataWarning,
        )


def check_labels_present(where: str, table: Table, column: str) -> None:
    """Check that every row has a label.

    Args:
        where: the beginning of error messages.
        table: the table.
        column: the label column.

    Raises:
        DataError: if labels are missing; names the first rows without one.
    """
    texts = [as_text(value).strip() for value in table[column]]
    numbers = all(_is_number(text) for text in texts if text.lower() not in _NO_LABEL)
    missing = [row for row, text in enumerate(texts) if text == "" or (numbers and text.lower() in _NO_LABEL)]
    if missing:
        raise DataError(
            f"{where}: {len(missing)} of {len(texts)} samples have no label in {column!r}: "
            f"{listed([table.row_name(row) for row in missing], 3)}; remove them"
        )


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def class_names_from_labels(where: str, labels: Sequence[str]) -> tuple[str, ...]:
    """Derive the class names from the training labels.

    Args:
        where: the beginning of error messages.
        labels: one label per training sample.

    Returns:
        The labels in sorted order; if all are whole numbers, the numbers from 0 to the highest.

    Raises:
        DataError: if the labels look like regression targets, or like indices with large gaps.
    """
    values = set(labels)
    if len(values) > 50 and len(values) > len(labels) / 2:
        raise DataError(
            f"{where}: {len(labels)} samples have {len(values)} different labels ({listed(sorted(values), 3)}); set "
            f"kind: regression if they are numbers to predict, or else classes"
        )
    if not all(value.isdecimal() for value in values):
        return tuple(sorted(values))
    numbers = sorted(map(int, values))
    if numbers[-1] >= 1000 and numbers[-1] > 10 * len(numbers):
        raise DataError(
            f"{where}: labels are class indices up to {numbers[-1]}, but there are only {len(numbers)} different ones; "
            f"name the classes in classes: [{listed([repr(str(number)) for number in numbers])}]"
        )
    if numbers[0] > 0:
        rank_zero_warn(
            f"{where}: labels range from {numbers[0]} to {numbers[-1]}, but class indices start at 0: class 0 has no "
            f"training sample; subtract {numbers[0]}, or name the classes in classes",
            category=DataWarning,
        )
    return tuple(map(str, range(numbers[-1] + 1)))


def parse_labels(
    where: str,
    kind: str,
    values: Sequence[Any],
    names: tuple[str, ...],
    row_name: Callable[[int], str] | None = None,
) -> Tensor:
    """Convert a column of labels to a tensor.

    Args:
        where: the beginning of error messages.
        kind: classification or regression.
        values: N class names or class indices, or N numbers for regression; strings are accepted for both.
        names: the class names.
        row_name: returns a row's name, given its index; error messages then contain it.

    Returns:
        int64 (N,) class indices, or float32 (N,) numbers.

    Raises:
        DataError: for a label that is neither a class nor, for regression, a finite number; names the row.
    """

    def at(row: int) -> str:
        return "" if row_name is None else f" ({row_name(row)})"

    if kind == "regression":
        numbers = []
        for row, value in enumerate(values):
            try:
                numbers.append(float(value))
            except (TypeError, ValueError):
                numbers.append(math.nan)
            if not math.isfinite(numbers[-1]):
                raise DataError(f"{where}: sample {row} has the label {value!r}, expected a number{at(row)}")
        return torch.tensor(numbers, dtype=torch.float32)
    index = {str(position): position for position in range(len(names))}
    index.update({label: position for position, label in enumerate(names)})  # a name takes precedence over an index
    for row, value in enumerate(values):
        if as_text(value) not in index:
            hidden = "; -1 often marks labels that are not published" if as_text(value) == "-1" else ""
            raise DataError(
                f"{where}: sample {row} has the label {value!r}, expected one of {', '.join(names[:20])}"
                f"{', …' if len(names) > 20 else ''} or an index below {len(names)}{hidden}{at(row)}"
            )
    return torch.tensor([index[as_text(value)] for value in values])
