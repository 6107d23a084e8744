"""Image files in one folder per class: the search for them, and a check for damaged files."""

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
from freemerge.data.image_dataset import UNREADABLE

SUFFIXES = frozenset(
    (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp", ".gif")
)
"""Suffixes of image files, in lower case."""

MAX_CHECKED = 20_000
"""The maximum number of files checked before training; if there are more, evenly spaced ones are checked."""

_SYSTEM_FILES = frozenset(("Thumbs.db", "desktop.ini", "__MACOSX", "@eaDir", "$RECYCLE.BIN", "lost+found"))
_TAIL_BYTES = 64  # the last bytes of a file, in which its format's end marker is searched


@dataclass(frozen=True)
class ImageFolder:
    """The images of a folder that has one subfolder per class.

    Args:
        root: the folder.
        classes: names of the subfolders with images, sorted, in composed Unicode (NFC).
        files: the images, sorted by class and name.
        labels: each image's index into `classes`.
        skipped: descriptions of files and folders that were skipped.
    """

    root: Path
    classes: tuple[str, ...]
    files: tuple[Path, ...]
    labels: tuple[int, ...]
    skipped: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.files)

    def name(self, index: int) -> str:
        """The name of an image in messages.

        Args:
            index: index into `files`.

        Returns:
            Its path.
        """
        return str(self.files[index])

    def fetch(self, index: int) -> tuple[Image.Image, int]:
        """Decode an image.

        Args:
            index: index into `files`.

        Returns:
            The decoded PIL image and its label.
        """
        with Image.open(self.files[index]) as image:
            image.load()
            return image, self.labels[index]


def scan(root: Path) -> ImageFolder:
    """Find the images in `<root>/<class>/…/*.jpg`; links to folders are followed.

    Hidden files and folders (`.ipynb_checkpoints`, `.DS_Store`, `._photo.jpg`), files that operating systems create
    (`Thumbs.db`, `@eaDir`) and class folders without an image are skipped; torchvision's `ImageFolder` would take
    hidden folders for classes.

    Args:
        root: the folder.

    Returns:
        The images and their classes.

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
            found.setdefault(_class_name(root, entry.name), []).extend(_images(Path(entry.path), others))
        else:
            loose += Path(entry.name).suffix.lower() in SUFFIXES
    classes = sorted(name for name, files in found.items() if files)
    skipped = []
    if hidden:
        skipped.append(f"hidden folders ({listed(hidden)})")
    if empty := sorted(set(found) - set(classes)):
        skipped.append(f"class folders without an image ({listed(empty)})")
    if loose:
        skipped.append(f"{loose} images outside of class folders")
    if others:
        kinds = [f"{count} {suffix or 'without suffix'}" for suffix, count in others.most_common()]
        skipped.append(f"files of other types ({listed(kinds)})")
    files = tuple(file for name in classes for file in found[name])
    labels = tuple(label for label, name in enumerate(classes) for _ in found[name])
    return ImageFolder(root, tuple(classes), files, labels, tuple(skipped))


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name in _SYSTEM_FILES


def _class_name(root: Path, name: str) -> str:
    try:
        name.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{root}: the name of the folder {os.fsencode(name)!r} is not UTF-8: rename it") from error
    return unicodedata.normalize("NFC", name)  # macOS may store é as two code points, other systems store one


def _images(folder: Path, others: Counter[str]) -> list[Path]:
    found, seen = [], {os.path.realpath(folder.parent)}
    for current, folders, names in os.walk(folder, followlinks=True):
        seen.add(os.path.realpath(current))
        # A link to a parent folder would lead into a cycle.
        inner = [name for name in folders if not _is_hidden(name)]
        folders[:] = [name for name in inner if os.path.realpath(os.path.join(current, name)) not in seen]
        found.append((current, sorted(name for name in names if not _is_hidden(name))))
    files = []
    for current, names in sorted(found):
        for name in names:
            suffix = Path(name).suffix.lower()
            if suffix in SUFFIXES:
                files.append(Path(current, name))
            else:
                others[suffix] += 1
    return files


def check_files(where: str, files: Sequence[Path]) -> None:
    """Check by their first and last bytes that files are complete images.

    A file whose bytes look wrong is decoded to make sure. Damage in the middle of a file is found when it is read in
    training.

    Args:
        where: the beginning of error messages.
        files: the files; at most `MAX_CHECKED` of them are checked.

    Raises:
        DataError: if files are empty, truncated or not images; names the first few.
    """
    chosen = files if len(files) <= MAX_CHECKED else [files[i * len(files) // MAX_CHECKED] for i in range(MAX_CHECKED)]
    with ThreadPoolExecutor(8) as threads:  # a network file system has high latency, but serves requests in parallel
        broken = [f"{file} ({fault})" for file, fault in zip(chosen, threads.map(_fault, chosen), strict=True) if fault]
    if broken:
        are = "1 image is" if len(broken) == 1 else f"{len(broken)} images are"
        raise DataError(
            f"{where}: {are} damaged, of {len(chosen)} checked: {listed(broken, 3)}; replace or delete "
            f"{'it' if len(broken) == 1 else 'them'}"
        )


def _fault(path: Path) -> str | None:
    """The reason why a file is not a complete image; None if its first and last bytes look right."""
    try:
        with open(path, "rb", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            begin = file.read(32)
            file.seek(max(0, size - _TAIL_BYTES))
            end = file.read(_TAIL_BYTES)
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    if size == 0:
        return "empty"
    if _looks_whole(begin, end, size):
        return None
    try:
        with Image.open(path) as image:
            if image.format not in ("TIFF", "PPM"):  # formats without an end marker: decoding all files would take long
                image.load()
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
