"""Adapter settings that no program writes: each is understood, or refused at once in one line."""

import json
import random
import time

import pytest
import torch

from freemerge.checkpoints import CheckpointError, open_checkpoint, save_checkpoint
from freemerge.checkpoints.formats.adapters import patterns

PREFIX = "base_model.model."
BASE = {
    "h.q.weight": torch.ones(6, 10),
    "h.v.weight": torch.ones(6, 6),
    "h.v.bias": torch.ones(6),
    "emb.weight": torch.ones(12, 4),
}
PAIR = {"h.q.lora_A.weight": torch.ones(4, 10), "h.q.lora_B.weight": torch.ones(6, 4)}
HANGS = r"((\w|\w\w)*)*!"  # backtracks without end where it does not match


def write_adapter(folder, config, tensors=PAIR):
    folder.mkdir(exist_ok=True)
    text = config if isinstance(config, str) else json.dumps({"peft_type": "LORA", "lora_alpha": 8} | config)
    (folder / "adapter_config.json").write_text(text)
    save_checkpoint(folder / "adapter_model.safetensors", {PREFIX + name: t for name, t in tensors.items()})
    return folder


def read(folder):
    """All differences of an adapter from the base."""
    adapter = open_checkpoint(folder).on(open_checkpoint(BASE))
    return {name: adapter.tensor(name) for name in adapter.names}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"peft_type": ["LORA"]}, r'adapter_config\.json: peft_type is \["LORA"\], expected the name of a method'),
        ({"peft_type": None}, "peft_type is null, expected the name of a method"),
        ({"lora_alpha": "8"}, 'lora_alpha is "8", expected a finite number'),
        ({"lora_alpha": None}, "lora_alpha is null, expected a finite number"),
        ({"lora_alpha": True}, "lora_alpha is true, expected a finite number"),
        ({"lora_alpha": 10**39}, r"lora_alpha is 10{39}, expected a finite number"),
        ({"lora_alpha": 10**400}, r"lora_alpha is 10+…, expected a finite number"),
        ({"lora_alpha": float("nan")}, "lora_alpha is NaN, expected a finite number"),
        ({"alpha_pattern": ["q"]}, r'alpha_pattern is \["q"\], expected an object that maps names'),
        ({"alpha_pattern": 3}, "alpha_pattern is 3, expected an object that maps names"),
        ({"alpha_pattern": {"q": "3"}}, "alpha_pattern is .*, expected finite numbers only"),
        ({"alpha_pattern": {"q(": 3}}, r"alpha_pattern: 'q\(' is not a regular expression"),
        ({"alpha_pattern": {"(" * 5000 + ")" * 5000: 3}}, "alpha_pattern: .* is not a regular expression"),
        ({"alpha_pattern": {"q{99999999999999999999}": 3}}, "alpha_pattern: .* is not a regular expression"),
        ({"alpha_pattern": {"q" * 200_000: 3}}, "alpha_pattern: has a pattern of 200,000 characters"),
        ({"rank_pattern": [1]}, r"rank_pattern is \[1\], expected an object that maps names"),
        ({"use_dora": "yes"}, 'use_dora is "yes", expected true or false'),
        ({"fan_in_fan_out": 2}, "fan_in_fan_out is 2, expected true or false"),
        ({"target_parameters": "experts"}, 'target_parameters is "experts", expected a list of names'),
        ({"trainable_token_indices": {"emb": 3}}, "trainable_token_indices is .*, expected a list of row numbers"),
        ({"trainable_token_indices": [-1]}, "trainable_token_indices is .*, expected a list of row numbers"),
        ("[1, 2]", "adapter_config.json: holds a list, expected an object"),
        ("null", "adapter_config.json: holds a NoneType, expected an object"),
        ("{", "adapter_config.json: is not JSON in UTF-8"),
        ("[" * 100_000, "adapter_config.json: is nested too deeply to be read"),
        ('{"lora_alpha": ' * 100_000, "adapter_config.json: is nested too deeply to be read"),
        ('{"lora_alpha": ' + "1" * 5000 + "}", "adapter_config.json: is not JSON in UTF-8"),
    ],
)
def test_wrong_types_and_sizes(tmp_path, config, message):
    with pytest.raises(CheckpointError, match=message) as caught:
        read(write_adapter(tmp_path / "a", config))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("tensors", "config", "message"),
    [
        (
            {"h.q.lora_A.weight": torch.ones(0, 10), "h.q.lora_B.weight": torch.ones(6, 0)},
            {},
            r"'.*lora_A.weight' \[0, 10\] is a factor of rank 0",
        ),
        (
            {"h.q.lora_A.weight": torch.ones(4, 10).to(torch.int8), "h.q.lora_B.weight": torch.ones(6, 4)},
            {},
            "has dtype torch.int8, expected a floating-point one",
        ),
        (
            PAIR | {"h.q.lora_magnitude_vector": torch.ones(5)},
            {"use_dora": True},
            r"lora_magnitude_vector' has shape \[5\], expected 6 numbers",
        ),
        (
            {"emb.trainable_tokens_delta": torch.ones(4)},
            {"peft_type": "TRAINABLE_TOKENS", "token_indices": [1, 2, 3, 4]},
            r"has shape \[4\], expected rows of an embedding",
        ),
    ],
)
def test_invalid_adapter_tensors(tmp_path, tensors, config, message):
    with pytest.raises(CheckpointError, match=message):
        read(write_adapter(tmp_path / "a", config, tensors))


def test_text_that_is_not_utf8(tmp_path):
    folder = write_adapter(tmp_path / "a", {})
    (folder / "adapter_config.json").write_bytes(b'{"peft_type": "\xff\xfe"}')
    with pytest.raises(CheckpointError, match=r"adapter_config\.json: is not JSON in UTF-8"):
        read(folder)


def test_patterns_are_matched_as_peft_does(tmp_path):
    """A pattern matches the end of a name after a dot; the first match applies, and a dot matches any character."""
    for pattern, scale in (
        ({"q": 16}, 4.0),
        ({"h.q": 16}, 4.0),
        ({r".*\.q": 16}, 4.0),
        ({"^h.q": 16}, 4.0),
        ({r"(k|q)": 16, "q": 32}, 4.0),
        ({"k": 16, "h": 16}, 2.0),
        ({".*q.+": 16}, 2.0),
    ):
        found = read(write_adapter(tmp_path / "a", {"alpha_pattern": pattern}))
        assert torch.equal(found["h.q.weight"], torch.full((6, 10), scale * 4)), pattern


def test_a_pattern_that_backtracks_without_end(tmp_path):
    long = {".".join(["layer"] * 30) + f".{name}": tensor for name, tensor in PAIR.items()}
    start = time.monotonic()
    found = open_checkpoint(write_adapter(tmp_path / "a", {"alpha_pattern": {HANGS: 1}}, long))
    assert len(found.names) == 1
    tuned = {"h.q.ia3_l": torch.ones(6)}
    read(write_adapter(tmp_path / "b", {"peft_type": "IA3", "feedforward_modules": HANGS}, tuned))
    assert time.monotonic() - start < 5


def test_a_pattern_that_takes_too_long(tmp_path, monkeypatch):
    monkeypatch.setattr(patterns, "_SECONDS", 0.2)
    long = {".".join(["layer"] * 30) + f".{name}": tensor for name, tensor in PAIR.items()}
    start = time.monotonic()
    with pytest.raises(CheckpointError, match=r"alpha_pattern: matching the pattern '.*' .* takes more than 0\.2 s"):
        open_checkpoint(write_adapter(tmp_path / "a", {"alpha_pattern": {r"(?:.*(\w+)\.){8}\1\1x": 1}}, long))
    assert time.monotonic() - start < 3


def test_settings_changed_at_random(tmp_path):
    """Each variant is read or refused in one line, without another exception or a hang."""
    generator = random.Random(0)
    values = [
        None, True, False, 0, -1, 1, 3.5, 10**39, 10**400, float("nan"), float("inf"), "", "q", "(", HANGS, "LORA",
        "IA3", [], ["q"], [0], [1, 2], [[]], {}, {"q": 1}, {"q": None}, {"(": 1}, {"emb": [1, 2]}, {"emb": "1"},
        {"": [0]}, {HANGS: 2}, {"q": {"q": 1}},
    ]  # fmt: skip
    keys = [
        "peft_type", "lora_alpha", "r", "alpha_pattern", "rank_pattern", "use_rslora", "use_dora", "fan_in_fan_out",
        "feedforward_modules", "trainable_token_indices", "token_indices", "init_lora_weights", "target_parameters",
        "target_modules", "bias", "layer_replication", "lora_bias", "modules_to_save", "eva_config", "use_other",
    ]  # fmt: skip
    files = [
        PAIR,
        {"h.v.ia3_l": torch.ones(6)},
        {"emb.trainable_tokens_delta": torch.ones(2, 4)},
        PAIR | {"h.q.lora_magnitude_vector": torch.ones(6)},
        {"emb.lora_embedding_A": torch.ones(2, 12), "emb.lora_embedding_B": torch.ones(4, 2)},
    ]
    kinds = ["LORA", "IA3", "TRAINABLE_TOKENS", "LORA", "LORA"]
    understood, refusals = 0, []
    start = time.monotonic()
    for _ in range(400):
        choice = generator.randrange(len(files))
        config = {"peft_type": kinds[choice], "trainable_token_indices": [1, 2], "use_dora": choice == 3}
        config |= {generator.choice(keys): generator.choice(values) for _ in range(generator.randint(0, 3))}
        try:
            found = read(write_adapter(tmp_path / "a", config, files[choice]))
        except CheckpointError as error:
            refusals.append(str(error))
        else:
            understood += 1
            assert all(tensor.dtype == torch.float32 for tensor in found.values())
    assert 50 < understood < 350
    assert all("\n" not in message and len(message) < 600 for message in refusals)
    assert time.monotonic() - start < 20
