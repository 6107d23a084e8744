"""The options of `python -m freemerge export-experts`: a FREE model's experts as LoRA adapters."""

from __future__ import annotations

from freemerge.cli.commands import version
from freemerge.cli.help_cache import CommandHelp
from freemerge.cli.options import command_help
from freemerge.cli.parsing import OneLineErrors, add_config, command_parser

FIRST = "model"
"""The option of the first argument, if it is no option itself."""

_EPILOG = """example:
  python -m freemerge export-experts runs/mine/free_model --output adapters

The output has the merged backbone as a Hugging Face folder, an adapter for each low-rank expert (experts.kind:
low_rank), and a README that says how to load them in PEFT and to serve them with vLLM. What PEFT cannot express is an
error that names the tensor."""


def build_parser() -> OneLineErrors:
    """Build the parser of `export-experts`; pass the result of its `parse_args` to `run_export_experts.run`."""
    parser = command_parser("export-experts", "FREE_MODEL --output FOLDER [options]", _EPILOG)
    add_config(parser)
    parser.add_argument(
        "--model", type=str, required=True, help="The FREE model: a folder, or a model's name on the Hub. The option's "
        "name may be left out."
    )  # fmt: skip
    parser.add_argument("--output", type=str, required=True, help="The folder to write, which must not exist.")
    parser.add_argument(
        "--trust_remote_code",
        type=bool,
        default=False,
        help="Import classes from outside freemerge that the folder names, which runs their code.",
    )
    return parser


def described() -> CommandHelp:
    """The help and the options of `export-experts`, without importing torch."""
    return command_help(build_parser(), version())
