"""What tables of texts are found to be wrong in, and what is said of it: which file, which row, what to do."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from freemerge.data import TextTableSource
from freemerge.data.errors import DataError, DataWarning
from freemerge.data.sources.tables import read_table
from tests.configs import tiny_files


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> str:
    return tiny_files.write_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def build(path: Path, tokenizer: str, **options):
    return TextTableSource(path=str(path), tokenizer=tokenizer, **options).build("a", 0)


def rows(*pairs: tuple[str, str], header: str = "text,label") -> str:
    """A CSV of `pairs`, and ten good rows after them."""
    good = [("it is good", "yes"), ("it is bad", "no")] * 5
    return "\n".join([header, *(f"{text},{label}" for text, label in [*pairs, *good])]) + "\n"


# ---- files


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "text,label\nit,no\ncaf\xe9 it,no\n".encode("latin-1"),
         r"line 3 is not UTF-8 \(near 'café it,no', if it is Latin-1\); iconv -f WINDOWS-1252 -t UTF-8"),
        ("a.jsonl", b'{"text": "\xff"}\n', r"line 1 is not UTF-8"),
        ("a.csv", "text,label\nit,no\n".encode("utf-16"), r"is UTF-16, expected UTF-8; iconv -f UTF-16LE"),
        ("a.csv", b"text,label,text\nit,no,is\n", "the header has 'text' twice; rename one"),
        ("a.csv", b"text;label\nit;no\n", r"the header is one field, 'text;label': fields are separated by ';' there, "
         r"expected ',' in a \.csv file"),
        ("a.tsv", b"text,label\nit,no\n", r".*separated by ',' there, expected '\\t' in a \.tsv file"),
        ("a.csv", b"text,label\nit,no\n\ntext,label\n", "row 4 is the header again: delete it"),
        ("a.csv", b'text,label\n"it is,no\nit,no\n', r"row 2 cannot be read: unexpected end of data \(a quote that is "
         r"not closed\?\); `quoted: false`"),
        ("a.csv", b'text,label\nit,no\n"it" is,no\n', "row 3 cannot be read: ',' expected after '\"'"),
        ("a.csv", b"text,label\nit,no\nit, is,no\n", "row 3 has 3 fields, the header has 2: text, label"),
        ("a.csv", b"\n", "there is no header line"),
        ("a.jsonl", b"", "there is no line in it"),
        ("a.jsonl", b'{"text": "a", "label": 1}\n\n{"text": "b", "lable": 1}\n',
         "line 3 must be an object with text, label; it lacks label and has lable too"),
        ("a.tsv", b"text\tlabel\rit\tno\r", r"lines end with a carriage return alone: tr '\\r' '\\n' converts"),
        ("a.jsonl", b'{"a": ' + b"9" * 5000 + b"}\n", "line 1 is not JSON"),
        ("a.jsonl", b'["a", 1]\n', "line 1 must be an object, got list"),
        ("a.jsonl", b'[{"a": 1},\n{"a": 2}]\n', "line 1 is not JSON .*; a JSON array is written one object per line"),
        ("a.csv.gz", gzip.compress(b"text,label\n" + b"it,no\n" * 999, mtime=0)[:-20], "cannot be read as csv"),
        ("a.csv.gz", b"\x1f\x8b\x08" + bytes(40), "cannot be read as csv"),
    ],
)  # fmt: skip
def test_faults_of_files_name_the_line(tmp_path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=rf"{name}: {message}") as caught:
        read_table(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_a_byte_order_mark_and_any_script_are_read(tmp_path, tokenizer: str) -> None:
    path = tmp_path / "größe 梨.csv"
    path.write_bytes("\ufefftext,label\n".encode() + "it is,süß 🍐\nit,bitter\n".encode() * 6)
    assert list(read_table(path)) == ["text", "label"]
    assert build(path, tokenizer).class_names == ("bitter", "süß 🍐")


def test_the_index_of_a_data_frame_is_no_text(tmp_path, tokenizer: str) -> None:
    path = tmp_path / "a.csv"
    path.write_text(",text,label\n" + "".join(f"{i},it is good {i % 4},{'yes' if i % 2 else 'no'}\n" for i in range(9)))
    with pytest.warns(DataWarning, match=r"a\.csv: a column without a name is left out \(the index of a DataFrame"):
        task = build(path, tokenizer)
    assert task.train[0][0]["input_ids"][1] == tiny_files.WORDS.index("it")


# ---- rows


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        (
            [("it", "no"), ("it", "")],
            r"train: 1 of 12 samples have no label in 'label': .*a\.csv, row 3; leave them out",
        ),
        ([("it", "  ")] * 5, r"train: 5 of 15 samples have no label .*row 2, .*row 3, .*row 4, … \(5 in all\)"),
    ],
)
def test_rows_without_a_label_are_named(tmp_path, tokenizer: str, pairs, message: str) -> None:
    (tmp_path / "a.csv").write_text(rows(*pairs))
    with pytest.raises(DataError, match=message):
        build(tmp_path / "a.csv", tokenizer)


@pytest.mark.parametrize("missing", ["NaN", "null", '"nan"', '""'])
@pytest.mark.parametrize("kind", ["classification", "regression"])
def test_a_label_that_is_not_a_number_among_numbers_is_none(tmp_path, tokenizer: str, missing: str, kind: str) -> None:
    lines = [f'{{"text": "it is {i % 4}", "label": {missing if i == 7 else i % 2}}}\n' for i in range(12)]
    (tmp_path / "a.jsonl").write_text("\n" + "".join(lines))
    with pytest.raises(DataError, match=r"have no label in 'label': .*a\.jsonl, line 9;"):
        build(tmp_path / "a.jsonl", tokenizer, kind=kind)


def test_a_class_may_be_called_none_among_names(tmp_path, tokenizer: str) -> None:
    (tmp_path / "a.csv").write_text(rows(("it", "none"), ("it", "none"), ("it", "none")))
    assert build(tmp_path / "a.csv", tokenizer).class_names == ("no", "none", "yes")


def test_a_label_that_is_not_known_is_named_with_its_row(tmp_path, tokenizer: str) -> None:
    lines = [f"it,{i % 2},{'train' if i < 10 else 'test'}\n" for i in range(12)]
    (tmp_path / "a.csv").write_text("text,label,split\n" + "".join(lines) + "it,-1,test\n")
    with pytest.raises(
        DataError,
        match=r"task 'a', test: sample 2 has the label '-1', expected one of 0, 1 or an index below 2; -1 often stands "
        r"for labels that are kept secret \(.*a\.csv, row 14\)",
    ):
        build(tmp_path / "a.csv", tokenizer)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([str(i / 7) for i in range(60)], r"60 samples have 60 different labels \(.*\): is it a regression"),
        (["7000", "8000"] * 5, r"go up to 8000, but only 2 differ; give their names in classes: \['7000', '8000'\]"),
    ],
)
def test_labels_that_are_no_classes(tmp_path, tokenizer: str, labels: list[str], message: str) -> None:
    (tmp_path / "a.csv").write_text("text,label\n" + "".join(f"it,{label}\n" for label in labels))
    with pytest.raises(DataError, match=message):
        build(tmp_path / "a.csv", tokenizer)


def test_labels_that_count_from_one_are_noticed(tmp_path, tokenizer: str) -> None:
    (tmp_path / "a.csv").write_text("text,label\n" + "".join(f"it,{1 + i % 5}\n" for i in range(40)))
    with pytest.warns(DataWarning, match=r"labels go from 1 to 5, and indices of classes count from 0: .*subtract 1"):
        assert build(tmp_path / "a.csv", tokenizer).num_classes == 6


def test_superscripts_are_names_and_no_numbers(tmp_path, tokenizer: str) -> None:
    (tmp_path / "a.csv").write_text("text,label\n" + "it,²\nit,³\n" * 6)
    assert build(tmp_path / "a.csv", tokenizer).class_names == ("²", "³")


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        ("text,label\n", {}, "there are no training samples"),
        ("text,lable\nit,no\n", {"text": ["text"]}, "there is no column 'label' in train; there are text, lable"),
        ("text,label\nit,no\n", {"text": ["sentence"]}, "there is no column 'sentence' in train"),
        ("a,b,c,label\n1,2,3,no\n", {}, "which columns are the text"),
        ("text,label,split\nit,no,hold-out\n", {}, r"row 2 has the split 'hold-out', expected train, val, test"),
        ("text,label,split\nit,no,test\n", {}, "the column 'split' says test, and never train"),
    ],
)
def test_columns_that_are_not_what_they_should_be(tmp_path, tokenizer: str, content, options, message: str) -> None:
    (tmp_path / "a.csv").write_text(content)
    with pytest.raises(DataError if "split" in message else ValueError, match=message):
        build(tmp_path / "a.csv", tokenizer, **options)


def test_splits_may_be_written_with_capitals(tmp_path, tokenizer: str) -> None:
    lines = [f"it,{i % 2},{split}\n" for i in range(4) for split in ("Train", "VALIDATION", " test ")]
    (tmp_path / "a.csv").write_text("text,label,split\n" + "".join(lines))
    task = build(tmp_path / "a.csv", tokenizer)
    assert [len(part) for part in (task.train, task.val, task.test)] == [4, 4, 4]


# ---- texts


def test_texts_that_are_empty_are_named(tmp_path, tokenizer: str) -> None:
    texts = ["it", None, "  ", float("nan"), *["it"] * 9]
    lines = [{"text": text, "label": i % 2, "split": "test" if i > 9 else "train"} for i, text in enumerate(texts)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.warns(DataWarning) as warned:
        build(tmp_path / "a.jsonl", tokenizer, val_fraction=0.1)
    said = " ".join(str(each.message) for each in warned)
    assert "samples have no text in text: " in said
    assert all(f"a.jsonl, line {number}" in said for number in (2, 3, 4))


def test_a_text_that_is_a_list_is_named(tmp_path, tokenizer: str) -> None:
    lines = [{"text": "it", "label": i % 2} for i in range(12)]
    lines[4]["text"] = ["it", "is"]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(DataError, match=r"'text' of .*a\.jsonl, line 5 is a list, expected a text"):
        build(tmp_path / "a.jsonl", tokenizer)


def test_a_text_without_a_token_is_refused(tmp_path, tokenizer: str) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    plain = Tokenizer(models.WordLevel({word: i for i, word in enumerate(tiny_files.WORDS)}, unk_token="[UNK]"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=plain, pad_token="[PAD]").save_pretrained(tmp_path / "plain")
    (tmp_path / "a.csv").write_text(rows(*[("", "no")] * 6))
    with pytest.warns(DataWarning), pytest.raises(DataError, match=r"the text of .*a\.csv, row \d+ has no token"):
        build(tmp_path / "a.csv", str(tmp_path / "plain"))


def test_texts_that_are_cut_or_longer_than_the_model_takes(tmp_path, tokenizer: str) -> None:
    from transformers import AutoTokenizer

    AutoTokenizer.from_pretrained(tokenizer, model_max_length=6).save_pretrained(tmp_path / "short")
    lines = [f"{'it is ' * (20 if i == 3 else 1)},{i % 2}\n" for i in range(12)]
    (tmp_path / "a.csv").write_text("text,label\n" + "".join(lines))
    with pytest.warns(
        DataWarning, match=r"a\.csv, row 5 has 42 tokens, .* its model takes 6: set max_length: 6, unless"
    ):
        build(tmp_path / "a.csv", str(tmp_path / "short"))
    with pytest.warns(DataWarning, match=r"task 'a', train: 9 of 9 texts fill max_length: 4, where they are cut"):
        build(tmp_path / "a.csv", tokenizer, max_length=4)
