"""The options of `python -m freemerge merge`: the merge of finished checkpoints."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import yaml

from freemerge.cli import mergekit
from freemerge.cli.commands import methods, version
from freemerge.cli.help_cache import CommandHelp
from freemerge.cli.options import command_help
from freemerge.cli.parsing import OneLineErrors, add_config, command_parser
from freemerge.cli.printing import print_error

_EPILOG = """methods:
{methods}
  or the import path of a class of your own; --method.help CLASS explains one's parameters.

example:
  python -m freemerge merge --base base.safetensors --finetuned a.safetensors b.safetensors \\
    --method FRMerging --method.scale 0.7 --output merged.safetensors

on several GPUs or machines, which share the tensors and write the same files:
  torchrun --nproc-per-node 4 -m freemerge merge --device cuda …

files and options override environment variables: FREEMERGE_MERGE__DTYPE=bfloat16 sets --dtype."""


class MergeParser(OneLineErrors):
    """The parser of `merge`, which also understands mergekit's configuration files."""

    def read_options(self, path: Path) -> str:
        """The text of a configuration file, one of mergekit translated."""
        text = super().read_options(path)
        table = yaml.safe_load(text)
        if not mergekit.is_of_mergekit(table):
            return text
        try:
            options, notes = mergekit.translate(table)
        except ExceptionGroup as problems:
            for problem in problems.exceptions:
                print_error(f"{path}: {problem}")
            sys.exit(2)
        for note in notes:
            if note not in self._told:
                print(f"note: {path}: {note}", file=sys.stderr)
        self._told = notes
        return json.dumps(options)

    _told: Sequence[str] = ()


def build_parser() -> OneLineErrors:
    """Build the parser of `merge`. Methods are given by class name or import path; their parameters are options.

    Returns:
        A parser; pass the result of its `parse_args` to `run_merge.run`.
    """
    from freemerge.merging import MergeMethod  # imported here so that --help does not import torch

    return _make_parser(MergeMethod)


def described() -> CommandHelp:
    """The help and the options of `merge`, without importing torch."""
    parser = _make_parser(str)
    parser.add_argument("--method.help", metavar="CLASS", help="Explain the parameters of a method and exit.")
    return command_help(parser, version())


def _make_parser(method: type) -> OneLineErrors:
    lines = [f"  {name:<16}{about}" for name, about in methods().items()]
    epilog = _EPILOG.format(methods="\n".join(lines))
    usage = "[--config FILE] --base … --finetuned … --method … --output … [options]"
    parser = command_parser("merge", usage, epilog, MergeParser)
    parser.description = "Merge fine-tuned models of one base into one model."
    add_config(parser, ", or one of mergekit's")
    add_models(parser)
    how = parser.add_argument_group("merging")
    how.add_argument("--method", type=method, required=True, help="How to merge; see below.")
    how.add_argument(
        "--overrides",
        type=list[dict[str, Any]] | None,
        default=None,
        help="Other parameters for some tensors: [{match: '*.mlp.*', scale: 0.4}]; the first match applies.",
    )
    add_selection(how)
    how.add_argument(
        "--embeddings",
        type=Literal["error", "base", "common"],
        default="error",
        help="If a model has other vocabulary rows than the base: an error, or merge all rows of the base, or only the "
        "rows that all models have.",
    )
    result = parser.add_argument_group("output")
    result.add_argument("--output", type=str, required=True, help="The .safetensors file or the folder to write.")
    result.add_argument(
        "--output_format",
        type=Literal["model", "lora"],
        default="model",
        help="A whole model, or a LoRA adapter for the base, of the given rank.",
    )
    result.add_argument("--rank", type=int | None, default=None, help="Rank of the adapter's factors.")
    result.add_argument("--overwrite", type=bool, default=False, help="Replace an existing output.")
    result.add_argument("--resume", type=bool, default=False, help="Continue the same merge after an interruption.")
    result.add_argument(
        "--dtype", type=str | None, default=None, help="Dtype of the merged tensors. Default: the base's own."
    )
    result.add_argument("--shard_size", type=str, default="5GB", help="Largest size of a weights file in a folder.")
    result.add_argument("--hash_inputs", type=bool, default=True, help="Record the hashes of all inputs in a folder.")
    result.add_argument(
        "--companions_from",
        type=str | None,
        default=None,
        help="The fine-tuned model, by its name or path, whose configuration, tokenizer and chat template the folder "
        "gets. Default: the base's.",
    )
    result.add_argument(
        "--chat_template_from",
        type=str | None,
        default=None,
        help="The model whose chat template the folder gets, or a .jinja file.",
    )
    result.add_argument(
        "--trust_remote_code", type=bool, default=False, help="Take the Python code of the model's folder along."
    )
    result.add_argument(
        "--push_to_hub", type=str | None, default=None, help="Upload the written folder as this model, org/name."
    )
    result.add_argument("--private", type=bool, default=False, help="A new model on the Hub is private.")
    result.add_argument(
        "--dry_run", type=bool, default=False, help="Check everything and print the plan, without merging."
    )
    add_device(result)
    return parser


def add_models(parser: OneLineErrors) -> None:
    """Add the options that name the base and the fine-tuned models."""
    models = parser.add_argument_group("models")
    models.add_argument(
        "--base",
        type=str,
        required=True,
        help="The pretrained model: a file or a Hugging Face folder; a[0:16]+b[8:24] stacks layers of models.",
    )
    models.add_argument(
        "--finetuned",
        type=list[str] | dict[str, str],
        required=True,
        help="The fine-tuned models: a list of paths, or a mapping from names to paths.",
    )


def add_selection(group: Any, done: str = "merge", left: str = "that keep the base's values") -> None:
    """Add the options that select tensors.

    Args:
        group: the group of options.
        done: what is done with the selected tensors.
        left: the same for the excluded tensors.
    """
    group.add_argument(
        "--include",
        type=list[str] | None,
        default=None,
        help=f"Names of the tensors to {done}: globs, or regular expressions after 're:'. Default: all.",
    )
    group.add_argument(
        "--exclude",
        type=list[str] | None,
        default=None,
        help=f"Names of the tensors {left}, and of heads that only fine-tuned models have.",
    )


def add_device(group: Any) -> None:
    """Add the option that chooses the device."""
    group.add_argument(
        "--device", type=str | None, default=None, help="Device to compute on, for example cuda. Default: cpu."
    )
