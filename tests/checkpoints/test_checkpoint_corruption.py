"""Damaged files give an error of one line that names the file; none is read as a different model."""

import contextlib
import itertools
import json
import struct

import numpy as np
import pytest
import safetensors
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from freemerge.checkpoints import CheckpointError, load_checkpoint, open_checkpoint, save_checkpoint
from freemerge.checkpoints.formats.safetensors_header import DTYPES, parse_header
from freemerge.checkpoints.writing.checksums import add_up
from freemerge.merging import WeightAverage, merge

TENSORS = {
    "layer.weight": torch.arange(6.0).view(2, 3),
    "layer.bias": torch.ones(3).bfloat16(),
    "steps": torch.tensor(7),
    "empty": torch.zeros(0, 4),
}


def outcome(path):
    """The table of a file, or the line of the error if it cannot be read."""
    try:
        checkpoint = open_checkpoint(path)
    except CheckpointError as error:
        return str(error)
    return {name: checkpoint.spec(name) for name in checkpoint.names}


def header_of(path):
    data = path.read_bytes()
    return 8 + struct.unpack("<Q", data[:8])[0]


def damaged(data, stop):
    """Every byte of the header with each bit flipped, and replaced by characters with a meaning in JSON."""
    for position in range(stop):
        values = {data[position] ^ (1 << bit) for bit in range(8)} | set(b'"{}[],:0 9\\')
        for value in values - {data[position]}:
            yield data[:position] + bytes([value]) + data[position + 1 :]


def test_any_damage_to_the_head_of_our_own_files_is_seen(tmp_path):
    path = tmp_path / "m.safetensors"
    save_checkpoint(path, TENSORS | {"head": TENSORS["layer.weight"]}, {"note": "ä"})
    good, data, start = outcome(path), path.read_bytes(), header_of(path)
    for changed in damaged(data, 8):
        path.write_bytes(changed)
        found = outcome(path)
        assert isinstance(found, str)
        assert str(path) in found
        assert "\n" not in found
    for changed in damaged(data[8:start], start - 8):
        with contextlib.suppress(ValueError):
            assert parse_header(changed, len(data) - start).specs == good


def test_damage_to_the_head_of_other_files_is_seen_or_changes_words_only(tmp_path):
    """Without a digest, changes to a tensor's name, dtype or order of axes cannot be detected."""
    path = tmp_path / "m.safetensors"
    safetensors.torch.save_file(TENSORS, path, {"note": "x"})
    start, size = header_of(path), path.stat().st_size
    text = path.read_bytes()[8:start]
    widths = sorted(tensor.nbytes for tensor in TENSORS.values())
    seen = 0
    for changed in damaged(text, len(text)):
        try:
            header = parse_header(changed, size - start)
        except ValueError:
            seen += 1
        else:
            assert sorted(stop - begin for begin, stop in header.places.values()) == widths
            assert [torch.Size(s.shape).numel() * s.dtype.itemsize for s in header.specs.values()] == [
                stop - begin for begin, stop in header.places.values()
            ]
    assert seen > 1000


def test_a_flipped_bit_in_the_values_is_seen(tmp_path):
    """Every flipped bit of freemerge's own files is detected, and undamaged files never raise an error."""
    path = tmp_path / "m.safetensors"
    save_checkpoint(path, TENSORS)
    data, start = path.read_bytes(), header_of(path)
    assert set(load_checkpoint(path)) == set(TENSORS)
    for position in range(start, len(data)):
        for bit in range(8):
            path.write_bytes(data[:position] + bytes([data[position] ^ (1 << bit)]) + data[position + 1 :])
            with pytest.raises(
                CheckpointError, match=r"m\.safetensors: the values of the tensor '.*' are not those"
            ) as error:
                load_checkpoint(path)
            assert "\n" not in str(error.value)


def test_a_merge_of_damaged_values_writes_nothing(tmp_path):
    save_checkpoint(tmp_path / "base.safetensors", {"w": torch.zeros(9, 9)})
    save_checkpoint(tmp_path / "tuned.safetensors", {"w": torch.ones(9, 9)})
    data = bytearray((tmp_path / "tuned.safetensors").read_bytes())
    data[-1] ^= 1
    (tmp_path / "tuned.safetensors").write_bytes(data)
    with pytest.raises(CheckpointError, match=r"tuned\.safetensors: the values of the tensor 'w' are not those"):
        merge(tmp_path / "base.safetensors", [tmp_path / "tuned.safetensors"], WeightAverage(), output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@given(content=st.binary(max_size=40), cuts=st.lists(st.integers(0, 40)))
def test_checksums_of_chunks_combine(content, cuts):
    padded = content + bytes(-len(content) % 8)
    expected = sum(int.from_bytes(padded[i : i + 8], "little") for i in range(0, len(padded), 8)) % 2**64
    data = np.frombuffer(content, dtype=np.uint8)
    assert add_up(data) == expected
    edges = sorted({0, len(content), *(min(cut, len(content)) for cut in cuts)})
    parts = [add_up(data[low:high], low) for low, high in itertools.pairwise(edges)]
    assert sum(parts) % 2**64 == expected


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_what_is_accepted_is_what_safetensors_accepts(tmp_path_factory, data):
    """Any table of small numbers: accepted by both with equal content, by neither, or by safetensors only."""
    numbers = st.integers(-1, 9) | st.sampled_from([2**31, 2**63, 2**64, 1.5, True, None, "2"])
    entry = st.fixed_dictionaries(
        {
            "dtype": st.sampled_from([*DTYPES, "F4", 3]),
            "shape": st.lists(numbers, max_size=2),
            "data_offsets": st.lists(numbers, min_size=1, max_size=3),
        }
    )
    table = data.draw(st.dictionaries(st.sampled_from("abc"), entry, max_size=3))
    size = data.draw(st.integers(0, 12))
    text = json.dumps(table).encode()
    path = tmp_path_factory.mktemp("any") / "x.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(size))
    found = outcome(path)
    try:
        with safetensors.safe_open(path, "pt") as file:
            theirs = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except Exception:
        assert isinstance(found, str)
    else:
        assert isinstance(found, str) or {name: spec.shape for name, spec in found.items()} == theirs


ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
BAD_TABLES = [
    ({"a": ENTRY, "b": ENTRY}, 8, "'b' begins at byte 0 of the data, expected at 8"),
    ({"a": ENTRY, "b": ENTRY | {"data_offsets": [4, 12]}}, 12, "'b' begins at byte 4 of the data, expected at 8"),
    ({"a": ENTRY | {"data_offsets": [4, 12]}}, 12, "'a' begins at byte 4 of the data, expected at 0"),
    ({"a": ENTRY}, 9, "accounts for 8 bytes of data and the file has 9"),
    ({"a": ENTRY}, 7, "truncated: its header promises 8 bytes of data and the file has 7"),
    ({"a": ENTRY | {"data_offsets": [-8, 0]}}, 8, r"malformed at 'a': shape \[2\], data_offsets \[-8, 0\]"),
    ({"a": ENTRY | {"shape": [-2]}}, 8, "malformed at 'a'"),
    ({"a": ENTRY | {"shape": [True, 2]}}, 8, "malformed at 'a'"),
    ({"a": ENTRY | {"shape": [2**40, 2**40]}}, 8, "another length than its shape"),
    ({"a": ENTRY | {"data_offsets": [0, 2**64]}}, 8, "another length than its shape"),
    ({"a": ENTRY | {"extra": 1}}, 8, "malformed at 'a': expected dtype, shape and data_offsets"),
    ({"a": ENTRY, "__metadata__": {"x": 1}}, 8, "its metadata is not a table of strings"),
    (b'{"a":{"dtype":"F32","shape":[],"data_offsets":[0,4]},"a":{"dtype":"F32","shape":[],"data_offsets":[0,4]}}', 4,
     "has 'a' twice"),
    (b"[" * 100_000, 0, "its header is not JSON"),
    ("{}".encode("utf-16"), 0, "its header is not JSON"),
]  # fmt: skip


@pytest.mark.parametrize(("table", "size", "message"), BAD_TABLES)
def test_impossible_tables_are_refused(table, size, message):
    text = table if isinstance(table, bytes) else json.dumps(table).encode()
    with pytest.raises(ValueError, match=message):
        parse_header(text, size)


def shards(folder, **changes):
    """Two shards and an index that assigns some tensors to the wrong shard."""
    folder.mkdir()
    files = {"model-1.safetensors": {"a": torch.zeros(1)}, "model-2.safetensors": {"b": torch.ones(1)}}
    for file, tensors in files.items():
        save_checkpoint(folder / file, tensors)
    weight_map = {name: file for file, tensors in files.items() for name in tensors} | changes
    weight_map = {name: file for name, file in weight_map.items() if file}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def test_an_index_that_does_not_fit_its_shards(tmp_path):
    assert set(load_checkpoint(shards(tmp_path / "good"))) == {"a", "b"}
    for number, (changes, message) in enumerate(
        [
            (
                {"a": "model-2.safetensors", "b": "model-1.safetensors"},
                r"lists the tensor 'a' in model-2.safetensors, but it is in model-1",
            ),
            ({"c": "model-2.safetensors"}, r"lists the tensor 'c' in model-2.safetensors, but no shard holds it"),
            ({"b": None}, None),
            ({"c": "../model-2.safetensors"}, "which is not beside it; do not trust this index"),
            ({"c": "/etc/passwd"}, "which is not beside it"),
        ]
    ):
        folder = shards(tmp_path / str(number), **changes)
        if message is None:  # the index names another shard only, as if it belonged to another model
            save_checkpoint(folder / "model-1.safetensors", {"a": torch.zeros(1), "b": torch.ones(1)})
            message = r"does not list the tensor 'b', which model-1\.safetensors holds"
        with pytest.raises(CheckpointError, match=message):
            open_checkpoint(folder)


def test_the_same_for_torch_files(tmp_path):
    for name in ("a", "b"):
        torch.save({name: torch.ones(1), "c": torch.ones(1)}, tmp_path / f"{name}.bin")
    index = tmp_path / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "a.bin", "b": "b.bin", "c": "a.bin"}}))
    with pytest.raises(CheckpointError, match=r"b\.bin: the tensor 'c' is also in .*a\.bin"):
        open_checkpoint(tmp_path)
    torch.save({"b": torch.ones(1), "d": torch.ones(1)}, tmp_path / "b.bin")
    with pytest.raises(CheckpointError, match=r"does not list the tensor 'd', which b\.bin holds"):
        open_checkpoint(tmp_path)


def test_a_stale_file_beside_an_index(tmp_path):
    """transformers loads one of the two, other tools the other."""
    folder = shards(tmp_path / "model")
    save_checkpoint(folder / "model.safetensors", {"a": torch.full((1,), 5.0), "b": torch.ones(1)})
    with pytest.raises(CheckpointError, match=r"has both model\.safetensors and model\.safetensors\.index\.json"):
        open_checkpoint(folder)


def test_shards_without_an_index(tmp_path):
    save_checkpoint(tmp_path / "model-00001-of-00002.safetensors", {"a": torch.zeros(1)})
    with pytest.raises(CheckpointError, match=r"has shards \(model-00001-of-00002\.safetensors\) and no model"):
        open_checkpoint(tmp_path)
