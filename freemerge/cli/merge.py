"""`python -m freemerge merge`: the merge of finished checkpoints from a YAML file or the command line.

Errors are one line on stderr and exit code 2, before any output is written.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, get_type_hints

import jsonargparse
import torch

import freemerge.merging
from freemerge.checkpoints import CheckpointError
from freemerge.cli.parsing import ENV_PREFIX, OneLineErrors, print_error
from freemerge.merging import MergeError, MergeMethod, MergeWarning, merge

_EPILOG = """methods:
{methods}
  or the import path of a class of your own; --method.help CLASS explains one's parameters.

example:
  python -m freemerge merge --base base.safetensors --finetuned '[a.safetensors, b.safetensors]' \\
    --method FRMerging --method.scale 0.7 --output merged.safetensors

on several GPUs or machines, which share the tensors and write the same files:
  torchrun --nproc-per-node 4 -m freemerge merge --device cuda …

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
    how.add_argument(
        "--embeddings",
        type=Literal["error", "base", "common"],
        default="error",
        help="Where a model has other rows of the vocabulary than the base: an error, or merge all rows of the base, "
        "or only those that all have.",
    )
    result = parser.add_argument_group("output")
    result.add_argument("--output", type=str, required=True, help="The .safetensors file or the folder to write.")
    result.add_argument(
        "--output_format",
        type=Literal["model", "lora"],
        default="model",
        help="A whole model, or a LoRA adapter of the base of the given rank.",
    )
    result.add_argument("--rank", type=int | None, default=None, help="Of the adapter's factors.")
    result.add_argument("--overwrite", type=bool, default=False, help="Replace an existing output.")
    result.add_argument(
        "--resume", type=bool, default=False, help="Go on with what the same merge, interrupted, had finished."
    )
    result.add_argument(
        "--dtype", type=str | None, default=None, help="Of the merged tensors. Default: the base's own."
    )
    result.add_argument("--shard_size", type=str, default="5GB", help="Largest file of weights in a folder.")
    result.add_argument("--hash_inputs", type=bool, default=True, help="Record the hashes of all inputs in a folder.")
    result.add_argument(
        "--companions_from",
        type=str | None,
        default=None,
        help="Whose configuration, tokenizer and chat template a folder takes: a fine-tuned model's, by its name or "
        "path. Default: the base's.",
    )
    result.add_argument("--dry_run", type=bool, default=False, help="Check everything, and print what would be done.")
    result.add_argument(
        "--device", type=str | None, default=None, help="Where to compute, for example cuda. Default: the processor."
    )
    return parser


def run(config: jsonargparse.Namespace) -> int:
    """Merge as a parsed configuration says.

    Args:
        config: what `build_parser().parse_args()` returned; its method may still be a description of a class.

    Returns:
        The exit code: 0, or 2 after an error, which is then one line on stderr.
    """
    rank, shared = _join()
    try:
        method = config.method
        if not isinstance(method, MergeMethod):
            method = build_parser().instantiate_classes(jsonargparse.Namespace(method=method)).method
        with _notes(), _bar(sys.stderr.isatty() and rank == 0) as progress:
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
                output_format=config.output_format,
                rank=config.rank,
                overwrite=config.overwrite,
                resume=config.resume,
                shard_size=config.shard_size,
                hash_inputs=config.hash_inputs,
                companions_from=config.companions_from,
                device=_own_device(config.device),
                distributed=shared,
                dry_run=config.dry_run,
                progress=progress,
            )
    except (MergeError, CheckpointError, ValueError) as error:
        if rank == 0:
            print_error(error)
        return 2
    finally:
        if shared:
            torch.distributed.destroy_process_group()
    if rank == 0:
        print(path if config.dry_run else f"merged into {path}" + _truncation(path, config.output_format))
    return 0


def _truncation(path: Path, output_format: str) -> str:
    """What is to be said of the rank of an adapter that was written."""
    if output_format != "lora":
        return ""
    record = json.loads((path / "freemerge.json").read_text())
    error = record["truncation"]["overall"]
    return f", a LoRA adapter of rank {record['rank']} that loses {error:.2e} of the merged task vector"


def _join() -> tuple[int, bool]:
    """The rank of this process among those that torchrun started, and whether there are others."""
    if int(os.environ.get("WORLD_SIZE", "1")) < 2 or "RANK" not in os.environ:
        return 0, False
    torch.distributed.init_process_group("gloo")
    return torch.distributed.get_rank(), True


def _own_device(device: str | None) -> str | None:
    """Of several processes on one machine each computes on a GPU of its own."""
    return f"cuda:{os.environ['LOCAL_RANK']}" if device == "cuda" and "LOCAL_RANK" in os.environ else device


@contextmanager
def _notes() -> Iterator[None]:
    """What there is to know of a merge, in lines as its errors are; other warnings as ever."""
    with warnings.catch_warnings():
        warnings.simplefilter("always", MergeWarning)
        show = warnings.showwarning

        def show_note(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
            if issubclass(category, MergeWarning):
                print("note:", " ".join(str(message).split()), file=sys.stderr)
            else:
                show(message, category, *where, **more)

        warnings.showwarning = show_note
        yield


@contextmanager
def _bar(visible: bool) -> Iterator[Callable[[int, int], None] | None]:
    """A bar of the bytes read, with the time that is left, where somebody looks."""
    if not visible:
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("merge", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


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
