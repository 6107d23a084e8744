"""Explain in one line why a parser refused the options, with a suggestion.

jsonargparse offers no structured errors, and the wording of its messages changes between versions. Therefore `Problems`
does not parse them, but checks the options again, against the parser's names and types (`faults`). If it finds nothing,
the message of the first cause is printed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from jsonargparse import ArgumentParser

from freemerge.cli.faults import faults_of_options
from freemerge.cli.names import unknown_option
from freemerge.cli.options import command_help, given_values, options, required


class Problems:
    """The faults of a command line, and of the files and environment variables that are parsed with it.

    Args:
        parser: the command's parser, before it parses.
        arguments: the command line without the command, as `spell_out` rewrites it.
    """

    def __init__(self, parser: ArgumentParser, arguments: Sequence[str]) -> None:
        self.parser = parser
        self.arguments = arguments
        self.required = required(parser)
        self.folder = Path.cwd()  # the parser changes the working directory while it reads a configuration file

    def explain(self, error: BaseException | str) -> str:
        """Explain in one line why parsing failed.

        Args:
            error: the exception of the parser, or its message.

        Returns:
            The first fault that is found in the options, with a suggestion if a known name is close; otherwise the
            innermost message of the error.
        """
        try:
            return next(self._faults(), None) or innermost(error)
        except Exception:  # checking imports modules that the user named, which may raise anything
            return innermost(error)

    def _faults(self) -> Iterator[str]:
        """Yield all faults, unknown options first."""
        if option := command_help(self.parser).unknown(self.arguments):
            yield unknown_option(option, options(self.parser))
        try:
            values = given_values(self.arguments, self.parser, self.folder)
        except ValueError as error:
            yield str(error)
            return
        yield from faults_of_options(self.parser, values)
        if missing := [key for key in self.required if key not in values]:
            yield f"missing: {', '.join(missing)}; give them as --{missing[0]} … or in a --config file"


def innermost(error: BaseException | str) -> str:
    """The message of an error's first cause, in one line of at most 300 characters.

    Args:
        error: the exception, or its message.
    """
    while isinstance(error, BaseException) and (cause := error.__cause__ or error.__context__) is not None:
        error = cause
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else f"{text[:299]}…"
