"""Columns of tables as texts, classes and numbers; what is missing in them is named by its row."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor

from freemerge.data.errors import DataError, DataWarning, listed
from freemerge.data.sources.tables import Table

_NO_LABEL = ("", "nan", "none", "null", "n/a", "na")  # the later ones only where all other labels are numbers


def as_text(value: Any) -> str:
    """A value of a table as text; missing ones (None, NaN) are empty."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, bool) or (isinstance(value, float) and value.is_integer()):
        return str(int(value))
    return str(value)


def texts_of(where: str, table: Table, column: str) -> list[str]:
    """A column of texts.

    Raises:
        DataError: if a value is a list, an object or bytes; it names the row.
    """
    for row, value in enumerate(table[column]):
        if isinstance(value, (list, tuple, dict, bytes)):
            raise DataError(f"{where}: {column!r} of {table.place(row)} is a {type(value).__name__}, expected a text")
    return [as_text(value) for value in table[column]]


def warn_of_empty(where: str, table: Table, texts: Sequence[Sequence[str]], columns: Sequence[str]) -> None:
    """Say which rows have no text in any column."""
    empty = [row for row, parts in enumerate(zip(*texts, strict=True)) if not any(part.strip() for part in parts)]
    if empty:
        rank_zero_warn(
            f"{where}: {len(empty)} of {table.size} samples have no text in {' and '.join(columns)}: "
            f"{listed([table.place(row) for row in empty], 3)}",
            category=DataWarning,
        )


def check_given(where: str, table: Table, column: str) -> None:
    """Raise a DataError if a row has no label; it names the first ones."""
    texts = [as_text(value).strip() for value in table[column]]
    numbers = all(_is_number(text) for text in texts if text.lower() not in _NO_LABEL)
    missing = [row for row, text in enumerate(texts) if text == "" or (numbers and text.lower() in _NO_LABEL)]
    if missing:
        raise DataError(
            f"{where}: {len(missing)} of {len(texts)} samples have no label in {column!r}: "
            f"{listed([table.place(row) for row in missing], 3)}; leave them out"
        )


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def names_of_labels(where: str, labels: Sequence[str]) -> tuple[str, ...]:
    """The names of classes as the training labels tell them: numbers count from 0, others are sorted.

    Raises:
        DataError: if the labels look like something else: numbers, or names of samples.
    """
    values = set(labels)
    if len(values) > 50 and len(values) > len(labels) / 2:
        raise DataError(
            f"{where}: {len(labels)} samples have {len(values)} different labels ({listed(sorted(values), 3)}): is it "
            f"a regression (kind: regression)? If not, give classes"
        )
    if not all(value.isdecimal() for value in values):
        return tuple(sorted(values))
    numbers = sorted(map(int, values))
    if numbers[-1] >= 1000 and numbers[-1] > 10 * len(numbers):
        raise DataError(
            f"{where}: labels are indices of classes and go up to {numbers[-1]}, but only {len(numbers)} differ; "
            f"give their names in classes: [{listed([repr(str(number)) for number in numbers])}]"
        )
    if numbers[0] > 0:
        rank_zero_warn(
            f"{where}: labels go from {numbers[0]} to {numbers[-1]}, and indices of classes count from 0: no training "
            f"sample is of class 0; subtract {numbers[0]}, or name the classes in classes",
            category=DataWarning,
        )
    return tuple(map(str, range(numbers[-1] + 1)))


def parse_labels(
    where: str,
    kind: str,
    values: Sequence[Any],
    names: tuple[str, ...],
    place: Callable[[int], str] | None = None,
) -> Tensor:
    """A column of labels as a tensor (N,): int64 classes, or float32 numbers.

    Args:
        where: what messages begin with.
        kind: classification or regression.
        values: names or indices of classes, or numbers; as strings or as they are.
        names: the classes.
        place: row → what messages call it besides its number.

    Raises:
        DataError: for a label that is none of these; it says which, and in which row.
    """

    def at(row: int) -> str:
        return "" if place is None else f" ({place(row)})"

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
    index.update({label: position for position, label in enumerate(names)})  # where both could be meant, it is a name
    for row, value in enumerate(values):
        if as_text(value) not in index:
            hidden = "; -1 often stands for labels that are kept secret" if as_text(value) == "-1" else ""
            raise DataError(
                f"{where}: sample {row} has the label {value!r}, expected one of {', '.join(names[:20])}"
                f"{', …' if len(names) > 20 else ''} or an index below {len(names)}{hidden}{at(row)}"
            )
    return torch.tensor([index[as_text(value)] for value in values])
