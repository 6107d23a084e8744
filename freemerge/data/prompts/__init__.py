"""Class names and prompts of well-known data sets, which zero-shot heads are made of.

Each YAML file of this folder is one data set: its `class_names` in their usual order, and its `templates`. They are
those of CLIP's zero-shot evaluation (arXiv 2103.00020) as the merging papers use them.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from freemerge.checkpoints import expand
from freemerge.data.errors import DataError, reason_of
from freemerge.data.tasks import check_templates

_FOLDER = Path(__file__).parent


@dataclass(frozen=True)
class Prompts:
    """What the classes of a data set are called, and in which prompts.

    Args:
        name: the data set, or the file that was read.
        class_names: C names.
        templates: prompts with one `{}` each.
    """

    name: str
    class_names: tuple[str, ...]
    templates: tuple[str, ...]

    def for_classes(self, where: str, classes: Sequence[str]) -> tuple[str, ...]:
        """The names in the order of a task's classes.

        Classes that the data call by the same names, apart from case and punctuation, are found by name, in whatever
        order they are. Otherwise the data have numbers or names of their own, and the orders must be the same.

        Args:
            where: the beginning of error messages.
            classes: what the data call the classes.

        Returns:
            A name for each class.

        Raises:
            DataError: if there are more or fewer classes than names, or the data have some of them in another place.
        """
        names = self.class_names
        if len(classes) != len(names):
            raise DataError(f"{where}: prompts {self.name} name {len(names)} classes, and the data have {len(classes)}")
        place = {_key(name): index for index, name in enumerate(names)}
        found = [place.get(_key(each)) for each in classes]
        if sorted(index for index in found if index is not None) == list(range(len(names))):
            return tuple(names[index] for index in found if index is not None)
        for index, other in enumerate(found):
            if other not in (None, index):
                raise DataError(
                    f"{where}: class {index} of the data is {classes[index]!r}, which is class {other} of prompts "
                    f"{self.name}; give class_names in the order of the data"
                )
        return names


def known_prompts() -> tuple[str, ...]:
    """The data sets whose class names and prompts ship with freemerge."""
    return tuple(sorted(path.stem for path in _FOLDER.glob("*.yaml")))


def load_prompts(name: str) -> Prompts:
    """Read the class names and prompts of a data set.

    Args:
        name: one of `known_prompts()`, or the path of a YAML file with `class_names` and `templates`.

    Returns:
        The prompts.

    Raises:
        DataError: if there is no such data set or file, or the file is not as described.
    """
    known = known_prompts()
    path = _FOLDER / f"{name}.yaml" if name in known else expand(name)
    if not path.is_file():
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(known)}, or a path"
        raise DataError(f"prompts: there is no data set or file {name!r}; {hint}")
    try:
        read = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise DataError(f"prompts: {path}: cannot be read ({reason_of(error)})") from error
    if not isinstance(read, dict) or set(read) != {"class_names", "templates"}:
        raise DataError(f"prompts: {path}: expected the keys class_names and templates")
    for key, values in read.items():
        if not isinstance(values, list) or not values or not all(isinstance(value, str) for value in values):
            raise DataError(f"prompts: {path}: {key} must be a list of texts; quote numbers, yes and no")
    check_templates(f"prompts: {path}", read["templates"])
    return Prompts(name, tuple(read["class_names"]), tuple(read["templates"]))


def _key(name: str) -> str:
    """A name without case and punctuation."""
    return "".join(sign for sign in name.casefold() if sign.isalnum())
