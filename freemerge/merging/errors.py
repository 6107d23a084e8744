"""The exception and the warning of this package."""


class MergeError(ValueError):
    """Models cannot be merged; the message is one line: which model, which tensor, expected, found, what to do."""


class MergeWarning(UserWarning):
    """A merge does what it was asked for, and there is something to know; the message is one line."""
