"""The command line, `python -m freemerge`: `fit`, `validate`, `test`, `predict` and `tune` for a suite, and `merge`.

- `suite`: Lightning's CLI with a suite's pipeline behind it.
- `merge`: the merge of finished checkpoints, which starts without Lightning and transformers.
- `parsing`, `problems`: what both share: one-line errors that suggest the right name, environment variables, help.
"""

from __future__ import annotations

import os
import sys


def main(args: list[str] | None = None) -> int:
    """Run the command line.

    Args:
        args: the arguments; those of the process if None.

    Returns:
        The exit code: 0, or 2 after an error, which is then one line on stderr.
    """
    arguments = sys.argv[1:] if args is None else list(args)
    if os.getcwd() not in sys.path:  # `freemerge` finds classes in the working directory as `python -m freemerge` does
        sys.path.append(os.getcwd())
    if arguments[:1] == ["merge"]:
        from freemerge.cli import merge

        parser = merge.build_parser()
        config = parser.parse_args(arguments[1:])
        parser.check_environment()
        return merge.run(config)
    from freemerge.cli import suite

    return suite.run(arguments)
