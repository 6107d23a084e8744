"""The errors and the warning of freemerge; every message is one line."""

_LONGEST = 4000  # characters; names of tensors and files may have any length


class CheckpointError(ValueError):
    """A checkpoint cannot be read or written. The message is one line: which file, what is wrong, what to do."""

    def __init__(self, message: str = "") -> None:
        super().__init__(one_line(message))


def one_line(message: str) -> str:
    """Make a message one line of bounded length, however long the names in it are."""
    if len(message) > _LONGEST:
        message = f"{message[: _LONGEST // 2]} … {message[-_LONGEST // 2 :]}"
    if message.isprintable():
        return message
    return "".join(each if each.isprintable() else repr(each)[1:-1] for each in message)


class MergeError(ValueError):
    """Models cannot be merged. The message is one line: which model, which tensor, expected, found, what to do."""

    def __init__(self, message: str = "") -> None:
        super().__init__(one_line(message))


class MergeWarning(UserWarning):
    """A merge does what was asked, but the user should know something about it; the message is one line."""


class NotFiniteError(ValueError):
    """A loss, an output or a weight is NaN or infinite. The message is one line: which model, where, what to try."""

    def __init__(self, message: str = "") -> None:
        super().__init__(one_line(message))
