"""The output options of a merge, checked before anything is opened."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from freemerge.checkpoints.opening import WEIGHT_FILES, Source
from freemerge.checkpoints.places import expand, landing
from freemerge.checkpoints.stacking import parse_stack
from freemerge.checkpoints.writing.folder import check_folder, parse_size
from freemerge.errors import MergeError

OutputFormat = Literal["model", "lora"]


@dataclass(frozen=True)
class Output:
    """The output of a merge, see `merge_to`.

    Args:
        path: path of the file or folder.
        format: "model" or "lora".
        rank: rank of an adapter's factors.
        overwrite: replace an existing output.
        resume: continue an interrupted merge, and keep the finished part of one that fails.
        shard_bytes: maximum size of a weight file in a folder.
        hash_inputs: record hashes of all inputs.
        companions_from: whose files a folder takes.
        chat_template_from: whose chat template.
        trust_remote_code: take custom code along.
    """

    path: Path
    format: OutputFormat
    rank: int | None
    overwrite: bool
    resume: bool
    shard_bytes: int
    hash_inputs: bool
    companions_from: str | None
    chat_template_from: str | None
    trust_remote_code: bool

    @property
    def is_file(self) -> bool:
        """Whether it is a single file of weights."""
        return self.path.suffix == ".safetensors"

    @property
    def is_adapter(self) -> bool:
        """Whether it is the folder of a LoRA adapter."""
        return self.format == "lora"

    @property
    def is_folder(self) -> bool:
        """Whether it is the folder of a model."""
        return not self.is_file and not self.is_adapter


def make_output(
    output: str | os.PathLike[str] | None,
    sources: Sequence[Source],
    *,
    output_format: OutputFormat = "model",
    rank: int | None = None,
    overwrite: bool = False,
    resume: bool = False,
    shard_size: int | str = "5GB",
    hash_inputs: bool = True,
    companions_from: str | None = None,
    chat_template_from: str | None = None,
    trust_remote_code: bool = False,
    distributed: bool = False,
) -> Output | None:
    """Check the output options of `merge_to`; None if nothing is written.

    Args:
        output: the path; if None, no other output option may be given.
        sources: the inputs, which must not be lost.

    Raises:
        MergeError: the options conflict, or the output would destroy an input or something else.
        CheckpointError: the output exists already.
    """
    path = None if output is None else _check_output(expand(output), overwrite, sources)
    _check_format(output_format, rank, path)
    if path is None and (distributed or resume):
        raise MergeError(f"a {'distributed' if distributed else 'resumed'} merge has to write its result")
    if resume and output_format == "lora":
        raise MergeError("the merge into an adapter cannot be resumed: nothing of it is on the disk before its end")
    shard_bytes = parse_size(shard_size)
    made = None
    if path is not None:
        files = (companions_from, chat_template_from, trust_remote_code)
        made = Output(path, output_format, rank, overwrite, resume, shard_bytes, hash_inputs, *files)
    for name, given in (("companions_from", companions_from), ("chat_template_from", chat_template_from)):
        if given is not None and (made is None or not made.is_folder):
            raise MergeError(f"{name} is of a model's folder; give output= a path without the ending .safetensors")
    return made


def _check_format(output_format: OutputFormat, rank: int | None, output: Path | None) -> None:
    if output_format not in ("model", "lora"):
        raise MergeError(f"output_format must be 'model' or 'lora', got {output_format!r}")
    if (output_format == "lora") != (rank is not None):
        raise MergeError(
            "output_format='lora' needs the rank of the adapter, such as rank=16"
            if rank is None
            else "rank is of an adapter; give output_format='lora' as well"
        )
    if rank is not None and (not isinstance(rank, int) or rank < 1):
        raise MergeError(f"rank must be a positive number, got {rank!r}")
    if output_format == "lora" and (output is None or output.suffix == ".safetensors"):
        raise MergeError("an adapter is a folder; give output= a path without the ending .safetensors")


def _check_output(output: Path, overwrite: bool, sources: Sequence[Source]) -> Path:
    place = landing(output).resolve()
    named = [source for source in sources if isinstance(source, (str, os.PathLike))]
    stacks = {str(source): [piece.model for piece in parse_stack(str(source)) or ()] for source in named}
    paths = [expand(path).resolve() for source, inner in stacks.items() for path in inner or [source]]
    if any(path in place.parents and path.is_dir() for path in paths):
        raise MergeError(f"{output}: lies in the folder of an input, which it would change; choose another output")
    for path in paths:  # its weights may be replaced
        if place in path.parents and (path.parent != place or path.name not in WEIGHT_FILES):
            raise MergeError(f"{output}: holds the input {path}, which would be lost; choose another output")
    if output.suffix in (".pt", ".pth", ".bin", ".ckpt", ".gguf"):
        raise MergeError(f"{output}: the output must be a .safetensors file or a folder")
    if output.suffix != ".safetensors":
        check_folder(output, overwrite)
    elif output.exists() and not overwrite:
        raise MergeError(f"{output}: exists already; choose another output, or overwrite it with overwrite=True")
    return output
