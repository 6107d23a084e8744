"""What sources of classifications can be told of their classes: how they are called, and in which prompts."""

# Without postponed annotations: a subclass in another module would have to import the names that they use.

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches

from freemerge.data.errors import DataError
from freemerge.data.sources.source import TaskSource
from freemerge.data.tasks import check_templates


@dataclass(kw_only=True)
class ClassSource(TaskSource):
    """Base class of sources whose classes can be called otherwise than in the data.

    Args:
        class_names: readable names of the classes, for a zero-shot head, reports and predictions: in the order of the
            classes, or as class → name, where the others keep theirs; None keeps all as the data have them.
        templates: prompts with one `{}` for a zero-shot head, such as `a photo of a {}.`; several are averaged.
    """

    class_names: list[str] | dict[str, str] | None = None
    templates: list[str] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_templates(type(self).__name__, self.templates or ())

    def named(self, name: str, classes: Sequence[str]) -> tuple[str, ...]:
        """What the classes of a task are called.

        Args:
            name: the task's name.
            classes: what the data call them.

        Raises:
            DataError: if the names do not fit the classes, or two are equal.
        """
        given, where = self.class_names, f"task {name!r}: class_names"
        if given is None or not classes:
            return tuple(classes)
        if isinstance(given, dict):
            for key in given:
                if key not in classes:
                    near = get_close_matches(key, classes, n=1)
                    hint = f"did you mean {near[0]!r}?" if near else f"there are {_listed(classes)}"
                    raise DataError(f"{where} names {key!r}, which is no class; {hint}")
            names = tuple(given.get(each, each) for each in classes)
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
