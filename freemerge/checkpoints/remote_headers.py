"""Models of the Hub without their weights: names, shapes and dtypes are known after a few kilobytes.

A stand-in for a model's folder holds its small files, and of each file of weights the header, which is requested alone;
the rest of such a file is a hole, so that it has its full size and takes no space.
"""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from types import TracebackType

from freemerge.checkpoints.hub import HubId, download, find_id, locate
from freemerge.errors import CheckpointError

_FIRST = 1 << 16  # bytes of the first request, enough for most headers
_LARGEST = 100 << 20  # bytes of a header, as the format allows
_WEIGHTS = (".safetensors",)


class RemoteHeaders:
    """Stand-ins for models of the Hub, which exist inside the `with` block."""

    def __init__(self) -> None:
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def __enter__(self) -> RemoteHeaders:
        self._folder = tempfile.TemporaryDirectory(prefix="freemerge-")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        assert self._folder is not None
        self._folder.cleanup()

    def locate(self, source: str | os.PathLike[str]) -> Path:
        """The path of a model, or of the stand-in for one of the Hub that is not in the cache; see `hub.locate`.

        Raises:
            CheckpointError: see `hub.locate`.
        """
        named = find_id(source)
        if named is None:
            return locate(source)
        folder, wanted = download(named, lambda name: not name.endswith(_WEIGHTS))
        missing = [name for name in wanted if not (folder / name).exists()]
        if missing:
            folder = self._stand_in(named, folder, wanted)
        return folder if named.subfolder is None else folder / named.subfolder

    def _stand_in(self, named: HubId, snapshot: Path, wanted: list[str]) -> Path:
        assert self._folder is not None
        place = Path(tempfile.mkdtemp(dir=self._folder.name))
        for name in wanted:
            (place / name).parent.mkdir(parents=True, exist_ok=True)
            if (snapshot / name).exists():
                (place / name).symlink_to((snapshot / name).resolve())
            else:
                _write_header(named, snapshot.name, name, place / name)
        return place


def _write_header(named: HubId, revision: str, name: str, path: Path) -> None:
    """Write a file of weights that is all there is before its values."""
    start = _request(named, revision, name, _FIRST)
    length = int.from_bytes(start[:8], "little")
    if not 2 <= length <= _LARGEST:
        raise CheckpointError(f"{named.text}: {name} on the Hub is no safetensors file")
    if len(start) < 8 + length:
        start = _request(named, revision, name, 8 + length)
    try:
        entries = [value for key, value in json.loads(start[8 : 8 + length]).items() if key != "__metadata__"]
        values = max((int(entry["data_offsets"][1]) for entry in entries), default=0)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{named.text}: the header of {name} on the Hub is damaged ({error})") from None
    with path.open("wb") as file:
        file.write(start[: 8 + length])
        file.truncate(8 + length + values)


def _request(named: HubId, revision: str, name: str, count: int) -> bytes:
    """The first bytes of a file on the Hub."""
    from huggingface_hub import hf_hub_url
    from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

    url = hf_hub_url(named.repository, name, revision=revision)
    try:
        response = get_session().get(url, headers={**build_hf_headers(), "Range": f"bytes=0-{count - 1}"})
        hf_raise_for_status(response)
    except Exception as error:  # a failed connection is of another class in each version of huggingface_hub
        reason = str(error).partition("\n")[0]
        raise CheckpointError(f"{named.text}: {name} cannot be read on the Hub ({reason})") from error
    return bytes(response.content)
