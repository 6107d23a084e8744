"""Malicious headers and indexes give an error of one line at once, or a readable model."""

import json
import os
import random
import struct
import time

import pytest
import torch

from freemerge.checkpoints import CheckpointError, open_checkpoint, save_checkpoint
from freemerge.checkpoints.formats.safetensors_header import parse_header

TENSORS = {
    "a": torch.arange(6.0).view(2, 3),
    "b": torch.ones(3).bfloat16(),
    "c": torch.tensor(7),
    "d": torch.zeros(0, 4),
}
TASK = {"kind": "freemerge-task-1", "task": "x", "holds": "weights", "base_hash": "0", "seed": "1", "metrics": "{}"}
SECONDS = 1.0  # of the processor, for one file
ODD = [
    *(0, -1, 1, 2**31, 2**63 - 1, 2**63, 2**64, 10**400, 1.5, 1e400, float("nan"), True, None),
    *("", "F32", "BF16", "F4", "a", "a\nb", "\x00", "\ud800", "..", "../a", "/", "x" * 300, "x" * 5000, "…"),
    *([], {}, [0, 24], [2, 3], [0] * 1000, [2**62] * 500, [1] * 200, ["a"], {"a": "b"}, {"weight_map": {}}),
    ["dtype", "shape", "data_offsets"],
]


def read_all(path):
    """Open and read a file; return the line of the error, or None."""
    began, message = time.process_time(), None
    try:
        checkpoint = open_checkpoint(path)
        for name in (*checkpoint.names, *checkpoint.tied):
            tensor = checkpoint.tensor(name)
            assert (tuple(tensor.shape), tensor.dtype) == checkpoint.spec(name)
    except CheckpointError as error:
        message = str(error)
    assert time.process_time() - began < SECONDS
    assert message is None or (message.isprintable() and len(message) < 5000)
    return message


def mutated(value, chance: random.Random):
    """The same JSON with a random part replaced, removed, duplicated or moved."""
    if isinstance(value, dict) and value and chance.random() < 0.8:
        keys = list(value)
        key = chance.choice(keys)
        action = chance.randrange(6)
        if action == 0:
            return {other: inner for other, inner in value.items() if other != key}
        if action == 1:
            return {str(chance.choice(ODD)) if other == key else other: inner for other, inner in value.items()}
        if action == 2:
            return value | {str(chance.choice(ODD)): value[key]}
        return value | {key: mutated(value[key], chance)}
    if isinstance(value, list) and value and chance.random() < 0.5:
        index = chance.randrange(len(value))
        return [*value[:index], mutated(value[index], chance), *value[index + 1 :]]
    return chance.choice(ODD)


def scratched(text: bytes, chance: random.Random) -> bytes:
    """The same bytes with a few of them changed, removed or duplicated."""
    for _ in range(chance.randrange(1, 4)):
        position = chance.randrange(len(text) + 1)
        action = chance.randrange(4)
        new = {0: b"", 1: bytes([chance.randrange(256)]), 2: chance.choice([b"9", b'"', b"[", b"}", b"\\u0000"])}
        text = text[:position] + new.get(action, text[position : position + 9] * 2) + text[position + 1 :]
    return text


def with_header(text: bytes, data: bytes, chance: random.Random) -> bytes:
    """A file with this header, sometimes with a wrong length and sometimes truncated."""
    length = (
        len(text) if chance.random() < 0.9 else chance.choice([0, 1, len(text) - 1, len(text) + 9, 2**40, 2**64 - 1])
    )
    return struct.pack("<Q", length) + text + data[: chance.choice([None, None, None, -1, 0])]


def test_any_header_is_refused_in_one_line_or_can_be_read(tmp_path):
    path = tmp_path / "m.safetensors"
    save_checkpoint(path, TENSORS | {"tied": TENSORS["a"]}, TASK)
    good = path.read_bytes()
    start = 8 + struct.unpack("<Q", good[:8])[0]
    chance, refused = random.Random(0), 0
    for _ in range(500):
        if chance.random() < 0.6:
            table = json.loads(good[8:start])
            for _ in range(chance.randrange(1, 4)):
                table = mutated(table, chance)
            text = json.dumps(table, ensure_ascii=chance.random() < 0.9).encode("utf-8", "surrogatepass")
        else:
            text = scratched(good[8:start], chance)
        path.write_bytes(with_header(text, good[start:], chance))
        refused += read_all(path) is not None
    assert refused > 200


def test_any_index_is_refused_in_one_line_or_can_be_read(tmp_path):
    save_checkpoint(tmp_path / "model-1.safetensors", {"a": TENSORS["a"], "c": TENSORS["c"]})
    save_checkpoint(tmp_path / "model-2.safetensors", {"b": TENSORS["b"]})
    good = {
        "metadata": {"total_size": 38},
        "weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors", "c": "model-1.safetensors"},
    }
    path = tmp_path / "model.safetensors.index.json"
    path.write_text(json.dumps(good))
    assert read_all(tmp_path) is None
    chance, refused = random.Random(1), 0
    for _ in range(300):
        table = good
        for _ in range(chance.randrange(1, 4)):
            table = mutated(table, chance)
        text = json.dumps(table).encode()
        path.write_bytes(scratched(text, chance) if chance.random() < 0.3 else text)
        refused += read_all(tmp_path) is not None
    assert refused > 100
    assert sorted(os.listdir(tmp_path)) == ["model-1.safetensors", "model-2.safetensors", path.name]


NESTED = {
    "lists": b"[" * 100_000 + b"]" * 100_000,
    "objects": b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
    "a thousand": b"[" * 900 + b"]" * 900,
}
PLACES = [
    "%s",
    '{"a":%s}',
    '{"__metadata__":%s}',
    '{"a":{"dtype":%s,"shape":[],"data_offsets":[0,4]}}',
    '{"a":{"dtype":"F32","shape":%s,"data_offsets":[0,4]}}',
    '{"weight_map":%s}',
    '{"weight_map":{"a":%s}}',
]


@pytest.mark.parametrize("nested", NESTED.values(), ids=NESTED)
@pytest.mark.parametrize("place", PLACES)
def test_json_that_is_nested_deeply(nested, place, tmp_path):
    text = place.encode() % nested
    (tmp_path / "m.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + bytes(4))
    assert "not a safetensors file" in read_all(tmp_path / "m.safetensors")
    (tmp_path / "model.safetensors.index.json").write_bytes(text)
    assert "model.safetensors.index.json: not an index of shards" in read_all(tmp_path)


@pytest.mark.parametrize("name", ["x" * 300 + ".safetensors", "a\nb.safetensors", "a\x00b", "\ud800", "ä" * 5000])
def test_invalid_shard_names(name, tmp_path):
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    message = read_all(tmp_path)
    assert "model.safetensors.index.json" in message
    assert "missing" in message or "cannot be a file here (File name too long); do not trust this index" in message


def test_many_entries_take_linear_time():
    """Work quadratic in the file's length would take hours here."""
    many = ",".join(f'"{index}":{{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}' for index in range(10_000))
    last = '"9999":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}'
    long = json.dumps({"a": {"dtype": "U8", "shape": [2**62] * 100_000, "data_offsets": [0, 8]}})
    began = time.process_time()
    assert len(parse_header(f"{{{many}}}".encode(), 0).specs) == 10_000
    with pytest.raises(ValueError, match="has '9999' twice"):
        parse_header(f"{{{many},{last}}}".encode(), 0)
    with pytest.raises(ValueError, match="another length than its shape"):
        parse_header(long.encode(), 8)
    assert time.process_time() - began < 3 * SECONDS
