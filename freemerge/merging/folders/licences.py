"""The licences of models, from their model cards."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

_FRONT = re.compile(r"---[ \t]*\r?\n(.*?)\r?\n---", re.DOTALL)
_ENTRY = re.compile(
    r"^(license|license_name|license_link):[ \t]*['\"]?([^'\"#\r\n]+?)['\"]?[ \t]*(?:#.*)?$", re.MULTILINE
)
_LARGEST = 1 << 16  # bytes of a card that are read


class Licence(NamedTuple):
    """A licence as a model card names it."""

    identifier: str  # such as apache-2.0, or other
    name: str | None  # of another licence
    link: str | None

    def __str__(self) -> str:
        return self.name or self.identifier


def read_licence(folder: Path | None) -> Licence | None:
    """The licence that the model card `README.md` of a folder names; None if it names none."""
    try:
        if folder is None:
            return None
        with (folder / "README.md").open("rb") as file:
            text = file.read(_LARGEST).decode("utf-8", errors="replace")
    except OSError:
        return None
    front = _FRONT.match(text)
    found = dict(_ENTRY.findall(front[1])) if front else {}
    if "license" not in found:
        return None
    return Licence(found["license"].lower(), found.get("license_name"), found.get("license_link"))


def describe_licences(base: Licence | None, models: Mapping[str, Licence | None]) -> str | None:
    """One line if models have other licences than the base; None otherwise.

    Args:
        base: the base's licence.
        models: label → the fine-tuned model's licence, None if unknown.
    """
    others = {label: own for label, own in models.items() if own is not None and base is not None and own != base}
    if not others:
        return None
    told = ", ".join(f"{label}: {own}" for label, own in others.items())
    return f"licences differ (the base: {base}; {told}); the model card names the base's, check what the others demand"
