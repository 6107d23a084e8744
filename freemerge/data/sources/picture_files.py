"""Folders of pictures, one per class: what is in them, and whether it can be read."""

from __future__ import annotations

import os
import struct
import unicodedata
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from freemerge.data.errors import DataError, listed, reason_of
from freemerge.data.pictures import UNREADABLE

SUFFIXES = frozenset(
    (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp", ".gif")
)
"""Files that count as pictures, in small letters."""

CHECKED = 20_000
"""So many files are looked at before training; evenly spaced where there are more."""

_OF_SYSTEMS = frozenset(("Thumbs.db", "desktop.ini", "__MACOSX", "@eaDir", "$RECYCLE.BIN", "lost+found"))
_END = 64  # bytes at the end of a file that tell whether it is whole


@dataclass(frozen=True)
class PictureFolder:
    """The pictures of a folder of classes.

    Args:
        root: the folder.
        classes: names of its subfolders that hold pictures, sorted; composed Unicode (NFC).
        files: the pictures, by class and name.
        labels: index of each one's class in `classes`.
        skipped: what was left out and why, as parts of a sentence.
    """

    root: Path
    classes: tuple[str, ...]
    files: tuple[Path, ...]
    labels: tuple[int, ...]
    skipped: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.files)

    def name(self, index: int) -> str:
        """What messages call a picture."""
        return str(self.files[index])

    def fetch(self, index: int) -> tuple[Image.Image, int]:
        """A picture, read whole, and its label."""
        with Image.open(self.files[index]) as picture:
            picture.load()
            return picture, self.labels[index]


def scan(root: Path) -> PictureFolder:
    """Look through `<root>/<class>/…/*.jpg`, links to folders included.

    Hidden files and folders (`.ipynb_checkpoints`, `.DS_Store`, `._photo.jpg`) and those that systems leave behind
    (`Thumbs.db`, `@eaDir`) do not count, nor do class folders without a picture.

    Raises:
        DataError: if a name is not UTF-8, or the folder cannot be read.
    """
    found: dict[str, list[Path]] = {}
    others: Counter[str] = Counter()
    loose, hidden = 0, []
    try:
        entries = sorted(os.scandir(root), key=lambda entry: entry.name)
    except OSError as error:
        raise DataError(f"{root}: cannot be read ({error.strerror})") from error
    for entry in entries:
        if _is_hidden(entry.name):
            hidden += [entry.name] if entry.is_dir() else []
        elif entry.is_dir():
            found.setdefault(_class_name(root, entry.name), []).extend(_pictures(Path(entry.path), others))
        else:
            loose += Path(entry.name).suffix.lower() in SUFFIXES
    classes = sorted(name for name, files in found.items() if files)
    skipped = []
    if hidden:
        skipped.append(f"hidden folders ({listed(hidden)})")
    if empty := sorted(set(found) - set(classes)):
        skipped.append(f"class folders without a picture ({listed(empty)})")
    if loose:
        skipped.append(f"{loose} pictures that are in no class folder")
    if others:
        kinds = [f"{count} {suffix or 'without suffix'}" for suffix, count in others.most_common()]
        skipped.append(f"files of other kinds ({listed(kinds)})")
    files = tuple(file for name in classes for file in found[name])
    labels = tuple(label for label, name in enumerate(classes) for _ in found[name])
    return PictureFolder(root, tuple(classes), files, labels, tuple(skipped))


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name in _OF_SYSTEMS


def _class_name(root: Path, name: str) -> str:
    try:
        name.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{root}: the name of the folder {os.fsencode(name)!r} is not UTF-8: rename it") from error
    return unicodedata.normalize("NFC", name)  # macOS writes é as e and an accent, other systems as one character


def _pictures(folder: Path, others: Counter[str]) -> list[Path]:
    places, seen = [], {os.path.realpath(folder.parent)}
    for place, folders, names in os.walk(folder, followlinks=True):
        seen.add(os.path.realpath(place))
        # a link to a folder above would lead through all of it again
        inner = [name for name in folders if not _is_hidden(name)]
        folders[:] = [name for name in inner if os.path.realpath(os.path.join(place, name)) not in seen]
        places.append((place, sorted(name for name in names if not _is_hidden(name))))
    files = []
    for place, names in sorted(places):
        for name in names:
            suffix = Path(name).suffix.lower()
            if suffix in SUFFIXES:
                files.append(Path(place, name))
            else:
                others[suffix] += 1
    return files


def check_files(where: str, files: Sequence[Path]) -> None:
    """Look for files that are empty, cut off or no pictures, by their first and last bytes.

    A file whose bytes look wrong is decoded to be sure; what is damaged in its middle shows when it is read.

    Raises:
        DataError: if there are any; it names the first few.
    """
    chosen = files if len(files) <= CHECKED else [files[i * len(files) // CHECKED] for i in range(CHECKED)]
    with ThreadPoolExecutor(8) as threads:  # a network's file system answers slowly, but many at once
        broken = [f"{file} ({fault})" for file, fault in zip(chosen, threads.map(_fault, chosen), strict=True) if fault]
    if broken:
        are = "1 picture is" if len(broken) == 1 else f"{len(broken)} pictures are"
        raise DataError(
            f"{where}: {are} damaged, of {len(chosen)} looked at: {listed(broken, 3)}; replace or delete "
            f"{'it' if len(broken) == 1 else 'them'}"
        )


def _fault(path: Path) -> str | None:
    """What is wrong with a picture; None if nothing is, as far as its ends tell."""
    try:
        with open(path, "rb", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            begin = file.read(32)
            file.seek(max(0, size - _END))
            end = file.read(_END)
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    if size == 0:
        return "empty"
    if _looks_whole(begin, end, size):
        return None
    try:
        with Image.open(path) as picture:
            if picture.format not in ("TIFF", "PPM"):  # they have no mark at their end; decoding all would take long
                picture.load()
    except UNREADABLE as error:
        return reason_of(error).replace(str(path), "the file")
    return None


def _looks_whole(begin: bytes, end: bytes, size: int) -> bool:
    if begin.startswith(b"\xff\xd8"):  # JPEG
        return b"\xff\xd9" in end
    if begin.startswith(b"\x89PNG"):
        return b"IEND" in end
    if begin.startswith(b"GIF8"):
        return end.rstrip(b"\0").endswith(b";")
    if begin.startswith(b"RIFF") and len(begin) >= 12:  # WebP
        return struct.unpack("<I", begin[4:8])[0] + 8 <= size
    if begin.startswith(b"BM") and len(begin) >= 6:
        return struct.unpack("<I", begin[2:6])[0] <= size
    return False
