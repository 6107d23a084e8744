"""The one exception of this package."""


class CheckpointError(ValueError):
    """A checkpoint cannot be read or written; the message is one line: which file, what is wrong, what to do."""
