"""The options of `python -m freemerge advise`: advice on a merge from the finished checkpoints."""

from __future__ import annotations

from freemerge.cli.commands import version
from freemerge.cli.help_cache import CommandHelp
from freemerge.cli.merge import add_device, add_models, add_selection
from freemerge.cli.options import command_help
from freemerge.cli.parsing import OneLineErrors, add_config, command_parser

_EPILOG = """example:
  python -m freemerge advise --base base.safetensors --finetuned a.safetensors b.safetensors

Nothing is written. Norms, cosines and signs are of all values; leading directions and frequencies of a sample of the
matrices. The method it names is the one that gained most in the tables of docs/benchmarks."""


def build_parser() -> OneLineErrors:
    """Build the parser of `advise`; pass the result of its `parse_args` to `run_advise.run`."""
    parser = command_parser("advise", "[--config FILE] --base … --finetuned … [options]", _EPILOG)
    add_config(parser)
    add_models(parser)
    how = parser.add_argument_group("comparison")
    add_selection(how, "compare", "to leave out")
    how.add_argument("--json", type=bool, default=False, help="Print all measurements as JSON instead of tables.")
    add_device(how)
    return parser


def described() -> CommandHelp:
    """The help and the options of `advise`, without importing torch."""
    return command_help(build_parser(), version())
