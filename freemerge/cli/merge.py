"""`python -m freemerge merge`: the merge of finished checkpoints from a YAML file or the command line.

Errors are one line on stderr and exit code 2, before any output is written.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_type_hints

import jsonargparse

import freemerge.merging
from freemerge.checkpoints import CheckpointError
from freemerge.cli.parsing import ENV_PREFIX, OneLineErrors, print_error
from freemerge.merging import MergeError, MergeMethod, merge

_EPILOG = """methods:
{methods}
  or the import path of a class of your own; --method.help CLASS explains one's parameters.

example:
  python -m freemerge merge --base base.safetensors --finetuned '[a.safetensors, b.safetensors]' \\
    --method FRMerging --method.scale 0.7 --output merged.safetensors

environment variables count below files and options: FREEMERGE_MERGE__DTYPE=bfloat16 sets --dtype."""


def build_parser() -> jsonargparse.ArgumentParser:
    """The parser of `merge`; methods are named by class (`FRMerging`) or import path, with their parameters as options.

    Returns:
        A parser whose `parse_args` result is what `run` takes.
    """
    parser = OneLineErrors(
        prog="python -m freemerge merge",
        usage="python -m freemerge merge [--config FILE] --base … --finetuned … --method … --output … [options]",
        description="Merge fine-tuned models of one base into one model.",
        epilog=_EPILOG.format(methods=_list_methods()),
        env_prefix=f"{ENV_PREFIX}_MERGE_",
    )
    parser.add_argument("--config", action="config", help="A YAML file with any of the options below; later ones win.")
    models = parser.add_argument_group("models")
    models.add_argument(
        "--base", type=str, required=True, help="The pretrained model: a file or a Hugging Face folder."
    )
    models.add_argument(
        "--finetuned",
        type=list[str] | dict[str, str],
        required=True,
        help="The fine-tuned models: a list of paths, or a mapping from names to paths.",
    )
    how = parser.add_argument_group("merging")
    how.add_argument("--method", type=MergeMethod, required=True, help="How to merge; see below.")
    how.add_argument(
        "--overrides",
        type=list[dict[str, Any]] | None,
        default=None,
        help="Other parameters for some tensors: [{match: '*.mlp.*', scale: 0.4}]; the first match counts.",
    )
    how.add_argument(
        "--include",
        type=list[str] | None,
        default=None,
        help="Names of the tensors to merge: globs, or regular expressions after 're:'. Default: all.",
    )
    how.add_argument(
        "--exclude",
        type=list[str] | None,
        default=None,
        help="Names of the tensors to leave as in the base, and of heads that only fine-tuned models have.",
    )
    result = parser.add_argument_group("output")
    result.add_argument("--output", type=str, required=True, help="The .safetensors file or the folder to write.")
    result.add_argument("--overwrite", type=bool, default=False, help="Replace an existing output.")
    result.add_argument(
        "--dtype", type=str | None, default=None, help="Of the merged tensors. Default: the base's own."
    )
    how.add_argument(
        "--embeddings",
        type=Literal["error", "base", "common"],
        default="error",
        help="Where a model has other rows of the vocabulary than the base: an error, or merge all rows of the base, "
        "or only those that all have.",
    )
    result.add_argument("--shard_size", type=str, default="5GB", help="Largest file of weights in a folder.")
    result.add_argument("--hash_inputs", type=bool, default=True, help="Record the hashes of all inputs in a folder.")
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
            overrides=_instantiated(method, config.overrides),
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
        print_error(error)
        return 2
    print(f"merged into {path}")
    return 0


def _instantiated(method: MergeMethod, overrides: Sequence[Mapping[str, Any]] | None) -> list[dict[str, Any]] | None:
    """Overrides with objects where a configuration describes classes, such as another filter."""
    if overrides is None:
        return None
    hints = get_type_hints(type(method)) if dataclasses.is_dataclass(method) else {}
    return [{key: _object(hints.get(key, Any), key, value) for key, value in each.items()} for each in overrides]


def _object(hint: Any, key: str, value: Any) -> Any:
    if not (isinstance(value, dict) and "class_path" in value):
        return value
    parser = OneLineErrors(env_prefix=f"{ENV_PREFIX}_MERGE_", default_env=False)
    parser.add_argument(f"--overrides.{key}", type=hint)
    config = parser.parse_object({"overrides": {key: value}})
    return parser.instantiate_classes(config).overrides[key]


def _list_methods() -> str:
    """Every method with the first line of its module, which says what it is and where it is from."""
    kinds = (getattr(freemerge.merging, name) for name in freemerge.merging.__all__)
    methods = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, MergeMethod)]
    lines = [
        f"  {kind.__name__:<16}{sys.modules[kind.__module__].__doc__.splitlines()[0]}"
        for kind in methods
        if kind is not MergeMethod
    ]
    return "\n".join(sorted(lines, key=str.lower))
