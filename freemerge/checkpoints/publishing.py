"""Upload a model's folder to the Hugging Face Hub."""

from __future__ import annotations

import re
from pathlib import Path

from freemerge.errors import CheckpointError

_REPOSITORY = re.compile(r"[\w][\w.-]*/[\w][\w.-]*")


def check_repository(repository: str) -> None:
    """Check what can be checked before a model is there to upload.

    Args:
        repository: the model's name on the Hub, `org/name`.

    Raises:
        CheckpointError: it is no such name, or there is no connection or token to upload with.
    """
    if not _REPOSITORY.fullmatch(repository):
        raise CheckpointError(f"push_to_hub: {repository!r} is no name of a model on the Hub, such as org/name")
    from huggingface_hub import constants, get_token

    if constants.HF_HUB_OFFLINE:
        raise CheckpointError(f"push_to_hub: {repository} cannot be uploaded while HF_HUB_OFFLINE is set")
    if not get_token():
        raise CheckpointError(f"push_to_hub: uploading {repository} needs a token; log in with `hf auth login`")


def push_folder(folder: Path, repository: str, *, private: bool = False, message: str | None = None) -> str:
    """Upload a folder as a model, in one commit; the model is created if it is missing.

    Args:
        folder: a merged model, an adapter, or a FREE model.
        repository: the model's name on the Hub, `org/name`.
        private: whether a new model is private.
        message: the commit's message.

    Returns:
        The commit's address.

    Raises:
        CheckpointError: see `check_repository`, or the Hub refuses the upload; nothing is changed there then.
    """
    check_repository(repository)
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        api.create_repo(repository, private=private, exist_ok=True)
        done = api.upload_folder(
            repo_id=repository, folder_path=folder, commit_message=message or "Upload by freemerge"
        )
    except Exception as error:  # a failed connection is of another class in each version of huggingface_hub
        reason = " ".join(str(error).split())
        raise CheckpointError(f"push_to_hub: {repository}: the upload failed: {reason}") from error
    return str(done.commit_url)
