"""What tasks may be called, as files and keys of reports are named after them; and what classes are called in files."""

from __future__ import annotations

from typing import Any

_LONGEST = 200  # bytes; file systems allow 255, and endings come on top


def check_task_name(who: str, name: str) -> None:
    """Raise a ValueError if a task cannot be called so, to be asked before anything is trained.

    Letters of any script, spaces and dots are fine; so are words that mean something to Python or torch.

    Args:
        who: what the message begins with.
        name: the task's name.
    """
    if not isinstance(name, str) or not name.strip():
        raise ValueError(f"{who}: a task has no name ({name!r}); give it one")
    if name in (".", "..") or any(sign in name for sign in "/\\"):
        raise ValueError(f"{who}: the task {name!r} cannot be called so: files are named after it; leave out slashes")
    if not name.isprintable():
        raise ValueError(f"{who}: the task {name!r} cannot be called so: it has characters that cannot be printed")
    if len(name.encode()) > _LONGEST:
        raise ValueError(f"{who}: the name of task {name[:20]!r}… is longer than {_LONGEST} bytes; shorten it")


def class_name(kind: Any) -> str:
    """What files and keys call a class: its name, if it is freemerge's own, or `package.module.Class`.

    So freemerge's modules can move, and files and keys stay as they are.
    """
    own = kind.__module__.partition(".")[0] == "freemerge"
    return kind.__qualname__ if own else f"{kind.__module__}.{kind.__qualname__}"
