"""What sources of classifications can be told of their classes: how they are called, and in which prompts."""

# Without postponed annotations: a subclass in another module would have to import the names that they use.

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from freemerge.data.errors import DataError
from freemerge.data.prompts import load_prompts
from freemerge.data.sources.source import TaskSource
from freemerge.data.tasks import check_templates


@dataclass(kw_only=True)
class ClassSource(TaskSource):
    """Base class of sources whose classes can be called otherwise than in the data.

    Args:
        class_names: readable names of the classes, for a zero-shot head, reports and predictions: in the order of the
            classes, or as class → name, where the others keep theirs; None keeps all as the data have them.
        templates: prompts with one `{}` for a zero-shot head, such as `a photo of a {}.`; several are averaged.
        prompts: class names and templates of a well-known data set, such as `cifar100` (see
            `freemerge.data.known_prompts`), or the path of a YAML file with these two keys; `class_names` and
            `templates` take precedence.

    Raises:
        ValueError: if a template has not exactly one `{}`, or there are no such prompts.
    """

    class_names: list[str] | dict[str, str] | None = None
    templates: list[str] | None = None
    prompts: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.prompts is not None and self.templates is None:
            self.templates = list(load_prompts(self.prompts).templates)
        check_templates(type(self).__name__, self.templates or ())

    def identity(self) -> dict[str, Any]:
        """What determines the data; of prompts their class names, wherever these are stored."""
        said = super().identity()
        said.pop("prompts")  # the identity of a source without them is that of before there were any
        return said if self.prompts is None else {**said, "prompts": list(load_prompts(self.prompts).class_names)}

    def named(self, name: str, classes: Sequence[str]) -> tuple[str, ...]:
        """What the classes of a task are called.

        Args:
            name: the task's name.
            classes: what the data call them.

        Raises:
            DataError: if the names do not fit the classes, or two are equal.
        """
        given, where = self.class_names, f"task {name!r}: class_names"
        if not classes:
            return ()
        known = tuple(classes)
        if self.prompts is not None and not isinstance(given, list):
            known = load_prompts(self.prompts).for_classes(f"task {name!r}", classes)
        if given is None:
            return known
        if isinstance(given, dict):
            for key in given:
                if key not in classes:
                    near = get_close_matches(key, classes, n=1)
                    hint = f"did you mean {near[0]!r}?" if near else f"there are {_listed(classes)}"
                    raise DataError(f"{where} names {key!r}, which is no class; {hint}")
            names = tuple(given.get(each, name) for each, name in zip(classes, known, strict=True))
        else:
            if len(given) != len(classes):
                raise DataError(
                    f"{where} has {len(given)} names for {len(classes)} classes, in this order: {_listed(classes)}"
                )
            names = tuple(given)
        if twice := [each for each, count in Counter(names).items() if count > 1]:
            raise DataError(f"{where}: two classes are called {twice[0]!r}; they need different names")
        return names


def _listed(classes: Sequence[str]) -> str:
    return ", ".join(classes[:20]) + (", …" if len(classes) > 20 else "")
