"""The one exception of this package."""


class MergeError(ValueError):
    """Models cannot be merged; the message is one line: which model, which tensor, expected, found, what to do."""
