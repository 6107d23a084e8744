"""`python -m freemerge merge`: the merge of finished checkpoints from a YAML file or the command line.

Errors are one line on stderr and exit code 2, before any output is written.
"""

from __future__ import annotations

import sys
from typing import Literal

import jsonargparse

from freemerge.checkpoints import CheckpointError
from freemerge.merging.engine import merge
from freemerge.merging.errors import MergeError
from freemerge.merging.method import MergeMethod

_EPILOG = """example:
  python -m freemerge merge --base base.safetensors --finetuned '[a.safetensors, b.safetensors]' \\
    --method FRMerging --method.scale 0.7 --output merged.safetensors"""


def build_parser() -> jsonargparse.ArgumentParser:
    """The parser of `merge`; methods are named by class (`FRMerging`) or import path, with their parameters as options.

    Returns:
        A parser whose `parse_args` result is what `run` takes.
    """
    parser = jsonargparse.ArgumentParser(
        prog="python -m freemerge merge",
        description="Merge fine-tuned models of one base into one model.",
        epilog=_EPILOG,
    )
    parser.add_argument("--config", action="config", help="A YAML file with any of the options below.")
    parser.add_argument(
        "--base", type=str, required=True, help="The pretrained model: a file or a Hugging Face folder."
    )
    parser.add_argument(
        "--finetuned",
        type=list[str] | dict[str, str],
        required=True,
        help="The fine-tuned models: a list of paths, or a mapping from names to paths.",
    )
    parser.add_argument(
        "--method",
        type=MergeMethod,
        required=True,
        help="How to merge, for example FRMerging. A class that is given here instead of the one in a configuration "
        "file keeps the parameters from there that it knows as well.",
    )
    parser.add_argument(
        "--include",
        type=list[str] | None,
        default=None,
        help="Names of the tensors to merge: globs, or regular expressions after 're:'. Default: all.",
    )
    parser.add_argument(
        "--exclude",
        type=list[str] | None,
        default=None,
        help="Names of the tensors to leave as in the base, and of heads that only fine-tuned models have.",
    )
    parser.add_argument(
        "--dtype", type=str | None, default=None, help="Of the merged tensors. Default: the base's own."
    )
    parser.add_argument(
        "--embeddings",
        type=Literal["error", "base", "common"],
        default="error",
        help="What to merge where vocabularies differ: the base's rows, or only those that all models have.",
    )
    parser.add_argument("--output", type=str, required=True, help="The .safetensors file or the folder to write.")
    parser.add_argument("--overwrite", type=bool, default=False, help="Replace an existing output.")
    parser.add_argument("--shard_size", type=str, default="5GB", help="Largest file of weights in a folder.")
    parser.add_argument("--hash_inputs", type=bool, default=True, help="Record the hashes of all inputs in a folder.")
    return parser


def run(config: jsonargparse.Namespace) -> int:
    """Merge as a parsed configuration says.

    Args:
        config: what `build_parser().parse_args()` returned; its method may still be a description of a class.

    Returns:
        The exit code: 0, or 2 after an error, which is then one line on stderr.
    """
    try:
        method = config.method
        if not isinstance(method, MergeMethod):
            method = build_parser().instantiate_classes(jsonargparse.Namespace(method=method)).method
        path = merge(
            config.base,
            dict(config.finetuned) if isinstance(config.finetuned, dict) else list(config.finetuned),
            method,
            include=config.include,
            exclude=config.exclude,
            dtype=config.dtype,
            embeddings=config.embeddings,
            output=config.output,
            overwrite=config.overwrite,
            shard_size=config.shard_size,
            hash_inputs=config.hash_inputs,
        )
    except (MergeError, CheckpointError, ValueError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    print(f"merged into {path}")
    return 0
