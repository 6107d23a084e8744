"""Valid task names (files and report keys are named after tasks), and the names of classes in files."""

from __future__ import annotations

from typing import Any

_LONGEST = 200  # bytes; file systems allow 255, and file extensions are added


def check_task_name(who: str, name: str) -> None:
    """Raise a ValueError if a task name is invalid; called before anything is trained.

    Letters of any script, spaces and dots are allowed; so are words with a meaning in Python or torch.

    Args:
        who: prefix of the message.
        name: the task's name.
    """
    if not isinstance(name, str) or not name.strip():
        raise ValueError(f"{who}: a task has no name ({name!r}); name it")
    if name in (".", "..") or any(sign in name for sign in "/\\"):
        raise ValueError(f"{who}: the task {name!r} cannot be called so: files are named after it; leave out slashes")
    if not name.isprintable():
        raise ValueError(f"{who}: the task {name!r} cannot be called so: it has characters that cannot be printed")
    if len(name.encode()) > _LONGEST:
        raise ValueError(f"{who}: the name of task {name[:20]!r}… is longer than {_LONGEST} bytes; shorten it")


def class_name(kind: Any) -> str:
    """The name of a class in files and keys: the bare name for freemerge's own, otherwise `package.module.Class`.

    So freemerge's modules can move without changing files and keys.
    """
    own = kind.__module__.partition(".")[0] == "freemerge"
    return kind.__qualname__ if own else f"{kind.__module__}.{kind.__qualname__}"
