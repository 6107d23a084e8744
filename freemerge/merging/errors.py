"""The exception and the warning of this package."""

from freemerge.checkpoints.errors import one_line


class MergeError(ValueError):
    """Models cannot be merged; the message is one line: which model, which tensor, expected, found, what to do."""

    def __init__(self, message: str = "") -> None:
        super().__init__(one_line(message))


class MergeWarning(UserWarning):
    """A merge does what it was asked for, and there is something to know; the message is one line."""
