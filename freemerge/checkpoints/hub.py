"""Models of the Hugging Face Hub: an id such as `org/name` stands wherever a path does."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import NamedTuple

from freemerge.checkpoints.places import expand, packaged, snapshot
from freemerge.errors import CheckpointError

_ID = re.compile(r"(?P<repository>[\w][\w.-]*/[\w][\w.-]*)(?:@(?P<revision>[\w.+-]+))?(?:/(?P<subfolder>[^@]+))?")
_LEFT_OUT = (  # weights in formats that are not read here, archives, and what a Trainer needs to resume
    *("*.h5", "*.msgpack", "*.ot", "*.onnx", "*.onnx_data", "*.tflite", "*.gguf", "*.pb", "*.mlmodel", "*.mlpackage/*"),
    *("*.npz", "*.ckpt", "*.tar.gz", "*.zip", "*.parquet", "consolidated*", "original/*"),
    *("optimizer*", "scheduler*", "rng_state*", "training_args.bin"),
)
_PICKLES = ("*.bin", "*.pt", "*.pth")
_ENDINGS = (".safetensors", ".json", ".bin", ".pt", ".pth", ".ckpt", ".gguf")


def locate(source: str | os.PathLike[str]) -> Path:
    """The local path of a model; one of the Hub is downloaded into the Hub's cache, unless it is there.

    Args:
        source: a path; a folder `models--org--name` of the Hub's cache; `package:folder` for a folder inside an
            installed package; or an id of the Hub: `org/name`, `org/name@revision`, either with `/subfolder`. What
            exists as a path is a path, and so is what begins with a folder that exists.

    Returns:
        The path. It does not exist if `source` looks like a path and does not exist.

    Raises:
        CheckpointError: the Hub has no such model, revision or subfolder, or it cannot be reached and the cache does
            not hold the model.
    """
    if (named := find_id(source)) is not None:
        return _download(*named)
    if isinstance(source, str) and (inside := packaged(source)) is not None:
        return inside
    return snapshot(expand(source))


class HubId(NamedTuple):
    """The name of a model on the Hub."""

    text: str  # as the user wrote it
    repository: str
    revision: str | None
    subfolder: str | None


def find_id(source: str | os.PathLike[str]) -> HubId | None:
    """The name on the Hub that a source is; None for paths, and for what looks like one."""
    if not isinstance(source, str) or packaged(source) is not None or expand(source).exists():
        return None
    named = _ID.fullmatch(source)
    if named is None or Path(source.partition("/")[0]).exists() or source.endswith(_ENDINGS):
        return None
    return HubId(source, named["repository"], named["revision"], named["subfolder"])


def _download(source: str, repository: str, revision: str | None, subfolder: str | None) -> Path:
    folder, _ = download(HubId(source, repository, revision, subfolder))
    return folder if subfolder is None else folder / subfolder


def download(named: HubId, wanted_too: Callable[[str], bool] = lambda _: True) -> tuple[Path, list[str]]:
    """Download a model into the Hub's cache, unless it is there.

    Args:
        named: its name.
        wanted_too: whether to download a file that is needed; by default all are.

    Returns:
        The folder of the whole repository, and the names of all files that are needed; none if the Hub was not reached.

    Raises:
        CheckpointError: see `locate`.
    """
    from huggingface_hub import HfApi, constants, snapshot_download
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    source, repository, revision, subfolder = named
    folder = _cached(Path(constants.HF_HUB_CACHE), repository, revision)
    wanted: list[str] = []
    try:
        if constants.HF_HUB_OFFLINE:
            raise ConnectionError("HF_HUB_OFFLINE is set")
        # Not `list_repo_files`, which tries again for 23 s where there is no connection
        info = HfApi().model_info(repository, revision=revision, timeout=constants.HF_HUB_ETAG_TIMEOUT)
        files = [file.rfilename for file in info.siblings or ()]
        wanted = _needed(files, subfolder)
        if not wanted:
            where = f"folder {subfolder!r} with weights" if subfolder else "weights in a format that is read here"
            raise CheckpointError(f"{source}: the model on the Hub has no {where}; it has {_few(files)}")
        chosen = [name for name in wanted if wanted_too(name)]
        folder = Path(snapshot_download(repository, revision=revision, allow_patterns=chosen))
    except GatedRepoError as error:
        raise CheckpointError(
            f"{source}: access to this model on the Hub must be granted; ask for it on the model's page, then log in "
            "with `hf auth login`"
        ) from error
    except RevisionNotFoundError as error:
        raise CheckpointError(f"{source}: the model {repository} has no revision {revision!r} on the Hub") from error
    except RepositoryNotFoundError as error:
        raise CheckpointError(
            f"{source}: there is neither such a path nor a model of this name on the Hub; check it, or log in with "
            "`hf auth login` if the model is private"
        ) from error
    except CheckpointError:
        raise
    except Exception as error:  # a failed connection is of another class in each version of huggingface_hub
        if folder is None:
            reason = str(error).partition("\n")[0]
            raise CheckpointError(
                f"{source}: there is no such path, the Hub's cache does not hold a model of this name, and the Hub "
                f"cannot be reached ({reason})"
            ) from error
    if subfolder is not None and not (folder / subfolder).exists():
        raise CheckpointError(f"{source}: the cached model has no folder {subfolder!r}")
    return folder, wanted


def _cached(cache: Path, repository: str, revision: str | None) -> Path | None:
    """The cached files of a revision, which may be partial; None if there are none.

    `snapshot_download(local_files_only=True)` would refuse a snapshot that lacks any file of the Hub's, such as weights
    in another format.
    """
    place = cache / f"models--{repository.replace('/', '--')}"
    commit = place / "refs" / (revision or "main")
    name = commit.read_text(encoding="utf-8").strip() if commit.is_file() else revision
    return place / "snapshots" / name if name and (place / "snapshots" / name).is_dir() else None


def _needed(files: Sequence[str], subfolder: str | None) -> list[str]:
    """The files to download: weights, in safetensors if there are any, and all others that are not weights."""
    inside = [name for name in files if subfolder is None or name.startswith(f"{subfolder}/")]
    inside = [name for name in inside if not any(fnmatch(name, pattern) for pattern in _LEFT_OUT)]
    pickled = [name for name in inside if any(fnmatch(name, pattern) for pattern in _PICKLES)]
    if any(name.endswith(".safetensors") for name in inside):
        return [name for name in inside if name not in pickled]
    return inside if pickled else []


def _few(files: Sequence[str]) -> str:
    return ", ".join(files[:5]) + (" …" if len(files) > 5 else "") if files else "no files"
