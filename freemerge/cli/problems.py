"""Explain in one line why a parser refused the options, with a suggestion.

jsonargparse offers no structured errors, and the wording of its messages changes between versions. Therefore nothing is
read out of them: `Problems` checks the options again, against the parser's own names and types (`faults`). A fault that
this does not find is reported in the innermost words of the library.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from jsonargparse import ArgumentParser

from freemerge.cli.faults import faults_of_options
from freemerge.cli.names import unknown_option
from freemerge.cli.options import command_help, given_values, options, required


class Problems:
    """The faults of a command line, of the files and of the environment variables that it is read with.

    Args:
        parser: the command's parser, which does not parse yet.
        arguments: the command line without the command, as `spell_out` rewrites it.
    """

    def __init__(self, parser: ArgumentParser, arguments: Sequence[str]) -> None:
        self.parser = parser
        self.arguments = arguments
        self.required = required(parser)
        self.folder = Path.cwd()  # the parser changes it while it reads a configuration file

    def explain(self, error: BaseException | str) -> str:
        """Explain in one line why parsing failed.

        Args:
            error: what the parser raised or said.

        Returns:
            The first fault that is found in the options, with a suggestion if a known name is close; otherwise the
            innermost message of the error.
        """
        try:
            return next(self._faults(), None) or innermost(error)
        except Exception:  # the search imports modules that the user named, and these may raise anything
            return innermost(error)

    def _faults(self) -> Iterator[str]:
        """All faults, unknown options first."""
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
    """The message of an error's first cause, in one line of at most 300 characters."""
    while isinstance(error, BaseException) and (cause := error.__cause__ or error.__context__) is not None:
        error = cause
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else f"{text[:299]}…"
