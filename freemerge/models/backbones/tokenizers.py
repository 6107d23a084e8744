"""The tokenizers of language models: found beside a model, and loaded once."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

from freemerge.checkpoints import expand_name


def load_tokenizer(name: str) -> Any:
    """A tokenizer, which is kept for later calls as long as its folder does not change.

    Args:
        name: hub id or folder.

    Raises:
        ValueError: if it cannot be loaded.
    """
    return _tokenizer(name, _changed(name))


def find_tokenizer(pretrained: str | None) -> str | None:
    """The hub id or folder of a pretrained model, unless it is a folder without a tokenizer's files."""
    if pretrained is None:
        return None
    name = expand_name(pretrained)
    files = ("tokenizer*", "vocab*", "*.model", "*.tiktoken")
    return None if Path(name).is_dir() and not any(any(Path(name).glob(file)) for file in files) else name


@lru_cache(maxsize=4)
def _tokenizer(name: str, changed: int) -> Any:
    """The tokenizer of a hub id or folder, which was changed at a given time."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{name}: the tokenizer cannot be loaded ({reason})") from error


def _changed(name: str) -> int:
    """When a folder's files were changed, in nanoseconds; 0 for a hub id."""
    files = Path(name).iterdir() if Path(name).is_dir() else ()
    return max((file.stat().st_mtime_ns for file in files), default=0)
