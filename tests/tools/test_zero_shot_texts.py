"""The tasks made from the packages are read back as they were written, and no document is in two splits."""

import io
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from freemerge.data import TextTableSuite
from tests.configs import tiny_files
from tools import zero_shot_texts as made

QUESTIONS = {name: [f"(Show {name}) Who is {name}  number {n}?" for n in range(40)] for name in ("anime", "nba")}


def tar(files: dict[str, bytes]) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:gz") as archive:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return stream.getvalue()


@pytest.fixture
def packages(tmp_path: Path) -> list[str]:
    """Tiny packages of the same layout: 60 documents of two sentences, and 40 questions in each of two lists."""
    ratings = ("-2.1", "0.1", "0.6", "0.8")  # negative, neutral, between two, positive
    lines = [
        f"{document}_{sentence}\t{ratings[(document + sentence) % 4]}\tdocument {document} &amp; caf\xe9 {sentence}"
        for document in range(60)
        for sentence in range(2)
    ]
    rated = "\r\n".join(lines).encode("latin-1") + b"\r\n"
    inner = tar({f"hutto_ICWSM_2014/{name}_GroundTruth.txt": rated for name in made.RATED.values()})
    vader, trivia = tmp_path / "vader.zip", tmp_path / "trivia.tar.gz"
    with zipfile.ZipFile(vader, "w") as archive:
        archive.writestr("vaderSentiment-0.5/additional_resources/hutto_ICWSM_2014.tar.gz", inner)
    names = [name for lists in made.TOPICS.values() for name in lists]
    trivia.write_bytes(
        tar(
            {
                f"Red-Trivia-1.1.1/redbot/ext/trivia/lists/{name}.yaml": b"AUTHOR: somebody\n"
                + "".join(f'"{text}":\n- yes\n' for text in QUESTIONS.get(name, [])).encode()
                for name in names
            }
        )
    )
    return ["--vader", str(vader), "--trivia", str(trivia)]


def make(folder: Path, packages: list[str], monkeypatch) -> dict[str, bytes]:
    monkeypatch.setattr(made.split, "__defaults__", (10, 20))  # smallest numbers of validation and test texts
    monkeypatch.setattr(sys, "argv", ["zero_shot_texts.py", "--output", str(folder), *packages])
    made.main()
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_suite_reads_what_the_packages_hold(tmp_path, packages, monkeypatch, capsys) -> None:
    written = make(tmp_path / "texts", packages, monkeypatch)
    assert make(tmp_path / "again", packages, monkeypatch) == written
    tokenizer = tiny_files.write_tokenizer(tmp_path / "tokenizer")
    suite = TextTableSuite(str(tmp_path / "texts"), tokenizer, text=["text_a", "text_b"])
    suite.prepare_data()
    suite.setup()
    assert suite.names == ("amazon", "nyt", "trivia", "tweets")
    tweets, trivia = suite.task("tweets"), suite.task("trivia")
    assert tweets.class_names == ("negative", "neutral", "positive")
    assert trivia.num_classes == 12
    # every fourth sentence has a rating between two classes and is left out: 120 - 30
    assert sum(map(len, (tweets.train, tweets.val, tweets.test))) == 90
    assert sum(map(len, (trivia.train, trivia.val, trivia.test))) == 80
    assert len(trivia.test) == 20
    assert len(trivia.val) == 10
    assert "trivia.tsv.gz: 50 / 10 / 20 texts (train / val / test), 12 classes" in capsys.readouterr().out


def test_labels_and_texts_are_those_of_the_source(tmp_path, packages) -> None:
    lines = dict(made.rated_texts(Path(packages[1])))
    parts = made.split(made.rated_groups(lines["nyt"]), val=10, test=20)
    rows = [row for part in parts.values() for row in part]
    rating = {0: 0, 1: 1, 3: 2}  # (document + sentence) mod 4 → class
    for text, label in rows:
        document, sentence = int(text.split()[1]), int(text.split()[4])
        assert text == f"document {document} & café {sentence}"
        assert label == rating[(document + sentence) % 4]
    documents = [{text.split()[1] for text, _ in part} for part in parts.values()]
    assert not documents[0] & documents[1]
    assert not documents[0] & documents[2]
    assert not documents[1] & documents[2]
    groups = made.trivia_groups(made.trivia_questions(Path(packages[3])))
    topics = list(made.TOPICS)
    assert {label for ((_, label),) in groups} == {topics.index("anime"), topics.index("sports")}
    assert all(text.startswith(("Who is anime number", "Who is nba number")) for ((text, _),) in groups)


def test_repeated_texts_are_in_the_first_split_only() -> None:
    groups: list[made.Group] = [[(f"Text {n % 7}" if n % 2 else f"text {n % 7}", n % 2)] for n in range(40)]
    parts = made.split(groups, val=2, test=2)
    texts = [text.lower() for part in parts.values() for text, _ in part]
    assert sorted(texts) == [f"text {n}" for n in range(7)]
    assert [len(parts[name]) for name in ("train", "val", "test")] == [3, 2, 2]


def test_another_package_is_refused_by_name(tmp_path) -> None:
    other = tmp_path / "other.tar.gz"
    other.write_bytes(tar({"other/readme.txt": b""}))
    with pytest.raises(SystemExit, match=r"other\.tar\.gz: expected one file lists/artandliterature\.yaml, found 0"):
        made.trivia_questions(other)
