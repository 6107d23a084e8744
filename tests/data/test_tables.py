"""Errors and warnings about tables of texts: they name the file and the row, and say what to do."""

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
         r"line 3 is not UTF-8 \(near 'café it,no', if it is Latin-1\); convert such a file with "
         r"iconv -f WINDOWS-1252 -t UTF-8"),
        ("a.jsonl", b'{"text": "\xff"}\n', r"line 1 is not UTF-8"),
        ("a.csv", "text,label\nit,no\n".encode("utf-16"),
         r"the file is UTF-16, expected UTF-8; convert it with iconv -f UTF-16LE"),
        ("a.csv", b"text,label,text\nit,no,is\n", "the header has 'text' twice; rename one"),
        ("a.csv", b"text;label\nit;no\n", r"the header has one field, 'text;label', with fields separated by ';'; "
         r"expected ',' in a \.csv file"),
        ("a.tsv", b"text,label\nit,no\n", r".*separated by ','; expected '\\t' in a \.tsv file"),
        ("a.csv", b"text,label\nit,no\n\ntext,label\n", "row 4 repeats the header: delete it"),
        ("a.csv", b'text,label\n"it is,no\nit,no\n', r"row 2 cannot be read: unexpected end of data \(a quote that is "
         r"not closed\?\); `quoted: false`"),
        ("a.csv", b'text,label\nit,no\n"it" is,no\n', "row 3 cannot be read: ',' expected after '\"'"),
        ("a.csv", b"text,label\nit,no\nit, is,no\n", "row 3 has 3 fields, the header has 2: text, label"),
        ("a.csv", b"\n", "there is no header line"),
        ("a.jsonl", b"", "the file is empty"),
        ("a.jsonl", b'{"text": "a", "label": 1}\n\n{"text": "b", "lable": 1}\n',
         "line 3 must be an object with text, label; it lacks label and also has lable"),
        ("a.tsv", b"text\tlabel\rit\tno\r",
         r"lines end with a carriage return only: convert the file with tr '\\r' '\\n'"),
        ("a.jsonl", b'{"a": ' + b"9" * 5000 + b"}\n", "line 1 is not JSON"),
        ("a.jsonl", b'["a", 1]\n', "line 1 must be an object, got list"),
        ("a.jsonl", b'[{"a": 1},\n{"a": 2}]\n', "line 1 is not JSON .*; write a JSON array as one object per line"),
        ("a.csv.gz", gzip.compress(b"text,label\n" + b"it,no\n" * 999, mtime=0)[:-20], "cannot be read as csv"),
        ("a.csv.gz", b"\x1f\x8b\x08" + bytes(40), "cannot be read as csv"),
    ],
)  # fmt: skip
def test_errors_in_files_name_the_line(tmp_path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=rf"{name}: {message}") as caught:
        read_table(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_a_byte_order_mark_and_non_latin_text(tmp_path, tokenizer: str) -> None:
    path = tmp_path / "größe 梨.csv"
    path.write_bytes("\ufefftext,label\n".encode() + "it is,süß 🍐\nit,bitter\n".encode() * 6)
    assert list(read_table(path)) == ["text", "label"]
    assert build(path, tokenizer).class_names == ("bitter", "süß 🍐")


def test_the_index_of_a_data_frame_is_not_a_text_column(tmp_path, tokenizer: str) -> None:
    path = tmp_path / "a.csv"
    path.write_text(",text,label\n" + "".join(f"{i},it is good {i % 4},{'yes' if i % 2 else 'no'}\n" for i in range(9)))
    with pytest.warns(DataWarning, match=r"a\.csv: a column without a name is ignored \(the index of a DataFrame"):
        task = build(path, tokenizer)
    assert task.train[0][0]["input_ids"][1] == tiny_files.WORDS.index("it")


# ---- rows


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        (
            [("it", "no"), ("it", "")],
            r"train: 1 of 12 samples have no label in 'label': .*a\.csv, row 3; remove them",
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
def test_non_numbers_among_numeric_labels_are_missing_labels(tmp_path, tokenizer: str, missing: str, kind: str) -> None:
    lines = [f'{{"text": "it is {i % 4}", "label": {missing if i == 7 else i % 2}}}\n' for i in range(12)]
    (tmp_path / "a.jsonl").write_text("\n" + "".join(lines))
    with pytest.raises(DataError, match=r"have no label in 'label': .*a\.jsonl, line 9;"):
        build(tmp_path / "a.jsonl", tokenizer, kind=kind)


def test_a_class_can_be_named_none(tmp_path, tokenizer: str) -> None:
    (tmp_path / "a.csv").write_text(rows(("it", "none"), ("it", "none"), ("it", "none")))
    assert build(tmp_path / "a.csv", tokenizer).class_names == ("no", "none", "yes")


def test_an_unknown_label_is_reported_with_its_row(tmp_path, tokenizer: str) -> None:
    lines = [f"it,{i % 2},{'train' if i < 10 else 'test'}\n" for i in range(12)]
    (tmp_path / "a.csv").write_text("text,label,split\n" + "".join(lines) + "it,-1,test\n")
    with pytest.raises(
        DataError,
        match=r"task 'a', test: sample 2 has the label '-1', expected one of 0, 1 or an index below 2; -1 often marks "
        r"labels that are not published \(.*a\.csv, row 14\)",
    ):
        build(tmp_path / "a.csv", tokenizer)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([str(i / 7) for i in range(60)], r"60 samples have 60 different labels \(.*\); set kind: regression"),
        (
            ["7000", "8000"] * 5,
            r"up to 8000, but there are only 2 different ones; name the classes in classes: \['7000', '8000'\]",
        ),
    ],
)
def test_labels_that_do_not_look_like_classes_are_refused(
    tmp_path, tokenizer: str, labels: list[str], message: str
) -> None:
    (tmp_path / "a.csv").write_text("text,label\n" + "".join(f"it,{label}\n" for label in labels))
    with pytest.raises(DataError, match=message):
        build(tmp_path / "a.csv", tokenizer)


def test_labels_that_start_at_one_give_a_warning(tmp_path, tokenizer: str) -> None:
    (tmp_path / "a.csv").write_text("text,label\n" + "".join(f"it,{1 + i % 5}\n" for i in range(40)))
    with pytest.warns(DataWarning, match=r"labels range from 1 to 5, but class indices start at 0: .*subtract 1"):
        assert build(tmp_path / "a.csv", tokenizer).num_classes == 6


def test_superscripts_are_names_not_numbers(tmp_path, tokenizer: str) -> None:
    (tmp_path / "a.csv").write_text("text,label\n" + "it,²\nit,³\n" * 6)
    assert build(tmp_path / "a.csv", tokenizer).class_names == ("²", "³")


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        ("text,label\n", {}, "there are no training samples"),
        ("text,lable\nit,no\n", {"text": ["text"]}, "train has no column 'label'; its columns: text, lable"),
        ("text,label\nit,no\n", {"text": ["sentence"]}, "train has no column 'sentence'"),
        ("a,b,c,label\n1,2,3,no\n", {}, "name one or two text columns in `text`; columns that could be: a, b, c"),
        ("text,label,split\nit,no,hold-out\n", {}, r"row 2 has the split 'hold-out', expected train, val, test"),
        ("text,label,split\nit,no,test\n", {}, "the column 'split' has test, but never train"),
    ],
)
def test_missing_columns_and_wrong_splits(tmp_path, tokenizer: str, content, options, message: str) -> None:
    (tmp_path / "a.csv").write_text(content)
    with pytest.raises(DataError if "split" in message else ValueError, match=message):
        build(tmp_path / "a.csv", tokenizer, **options)


def test_split_names_ignore_case_and_spaces(tmp_path, tokenizer: str) -> None:
    lines = [f"it,{i % 2},{split}\n" for i in range(4) for split in ("Train", "VALIDATION", " test ")]
    (tmp_path / "a.csv").write_text("text,label,split\n" + "".join(lines))
    task = build(tmp_path / "a.csv", tokenizer)
    assert [len(part) for part in (task.train, task.val, task.test)] == [4, 4, 4]


# ---- texts


def test_empty_texts_are_named(tmp_path, tokenizer: str) -> None:
    texts = ["it", None, "  ", float("nan"), *["it"] * 9]
    lines = [{"text": text, "label": i % 2, "split": "test" if i > 9 else "train"} for i, text in enumerate(texts)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.warns(DataWarning) as warned:
        build(tmp_path / "a.jsonl", tokenizer, val_fraction=0.1)
    said = " ".join(str(each.message) for each in warned)
    assert "samples have no text in text: " in said
    assert all(f"a.jsonl, line {number}" in said for number in (2, 3, 4))


def test_a_list_instead_of_a_text_is_named(tmp_path, tokenizer: str) -> None:
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
    with pytest.warns(DataWarning), pytest.raises(DataError, match=r"the text of .*a\.csv, row \d+ has no tokens"):
        build(tmp_path / "a.csv", str(tmp_path / "plain"))


def test_truncated_texts_and_texts_too_long_for_the_model_give_warnings(tmp_path, tokenizer: str) -> None:
    from transformers import AutoTokenizer

    AutoTokenizer.from_pretrained(tokenizer, model_max_length=6).save_pretrained(tmp_path / "short")
    lines = [f"{'it is ' * (20 if i == 3 else 1)},{i % 2}\n" for i in range(12)]
    (tmp_path / "a.csv").write_text("text,label\n" + "".join(lines))
    with pytest.warns(
        DataWarning, match=r"a\.csv, row 5 has 42 tokens, .*model_max_length is 6: set max_length: 6, unless"
    ):
        build(tmp_path / "a.csv", str(tmp_path / "short"))
    with pytest.warns(
        DataWarning, match=r"task 'a', train: 9 of 9 texts reach max_length: 4, where they are truncated"
    ):
        build(tmp_path / "a.csv", tokenizer, max_length=4)
