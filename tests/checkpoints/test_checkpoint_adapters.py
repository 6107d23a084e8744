"""LoRA adapters as PEFT writes them: exact differences, whole tensors, and what is refused."""

import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from freemerge.checkpoints import CheckpointError, load_checkpoint, open_checkpoint, save_checkpoint

PREFIX = "base_model.model."


def write_adapter(folder, tensors, **config):
    folder.mkdir(exist_ok=True)
    settings_ = {"peft_type": "LORA", "r": 4, "lora_alpha": 16, "base_model_name_or_path": "base"} | config
    (folder / "adapter_config.json").write_text(json.dumps(settings_))
    save_checkpoint(folder / "adapter_model.safetensors", {PREFIX + name: t for name, t in tensors.items()})
    return folder


PAIR = {"q.lora_A.weight": torch.ones(4, 6), "q.lora_B.weight": torch.ones(6, 4)}


def factors(rank=4, rows=6, columns=10, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rank, columns, generator=generator), torch.randn(rows, rank, generator=generator)


def test_a_linear_layer(tmp_path):
    a, b = factors()
    adapter = open_checkpoint(
        write_adapter(tmp_path / "a", {"h.q.lora_A.weight": a.bfloat16(), "h.q.lora_B.weight": b.bfloat16()})
    )
    assert adapter.names == ("h.q.weight",)
    assert adapter.deltas == {"h.q.weight"}
    assert adapter.partial
    assert adapter.spec("h.q.weight") == ((6, 10), torch.float32)
    expected = 4.0 * (b.bfloat16().double() @ a.bfloat16().double())
    torch.testing.assert_close(adapter.tensor("h.q.weight").double(), expected, rtol=1e-6, atol=1e-6)


def test_embeddings_convolutions_and_transposed_layers(tmp_path):
    a, b = factors()
    embedding = {"e.lora_embedding_A": a, "e.lora_embedding_B": b}
    adapter = open_checkpoint(write_adapter(tmp_path / "e", embedding))
    torch.testing.assert_close(adapter.tensor("e.weight"), 4.0 * (b @ a).T)
    transposed = {"c.lora_A.weight": a, "c.lora_B.weight": b}
    adapter = open_checkpoint(write_adapter(tmp_path / "t", transposed, fan_in_fan_out=True))
    assert adapter.spec("c.weight").shape == (10, 6)
    torch.testing.assert_close(adapter.tensor("c.weight"), 4.0 * (b @ a).T)
    kernel, mix = torch.randn(4, 3, 2, 2), torch.randn(5, 4, 1, 1)
    adapter = open_checkpoint(write_adapter(tmp_path / "c", {"k.lora_A.weight": kernel, "k.lora_B.weight": mix}))
    expected = 4.0 * torch.einsum("rchw,or->ochw", kernel, mix[:, :, 0, 0])
    torch.testing.assert_close(adapter.tensor("k.weight"), expected)


def test_scales(tmp_path):
    a, b = factors()
    tensors = {f"{name}.lora_{kind}.weight": t for name in ("up.q", "down.q", "v") for kind, t in (("A", a), ("B", b))}
    adapter = open_checkpoint(
        write_adapter(tmp_path / "a", tensors, use_rslora=True, alpha_pattern={"down.q": 2, "v": 6}, r=99)
    )
    for name, alpha in {"up.q": 16, "down.q": 2, "v": 6}.items():
        torch.testing.assert_close(adapter.tensor(f"{name}.weight"), alpha / math.sqrt(4) * (b @ a))


def test_modules_to_save_and_biases_of_factors(tmp_path):
    a, b = factors()
    tensors = {
        "q.lora_A.weight": a,
        "q.lora_B.weight": b,
        "q.lora_B.bias": torch.ones(6),
        "classifier.weight": torch.ones(2, 2).half(),
        "norm.bias": torch.zeros(3),
        "embed.base_layer.weight": torch.zeros(9, 9),
    }
    adapter = open_checkpoint(write_adapter(tmp_path / "a", tensors))
    assert set(adapter.names) == {"q.weight", "q.bias", "classifier.weight", "norm.bias"}
    assert adapter.deltas == {"q.weight", "q.bias"}
    assert adapter.tensor("q.bias").tolist() == [4.0] * 6
    assert adapter.read_range("q.bias", 2, 4).tolist() == [4.0] * 2
    assert adapter.spec("classifier.weight") == ((2, 2), torch.float16)
    prefixed = open_checkpoint(tmp_path / "a", prefix="q.", label="mine")
    assert prefixed.deltas == {"weight", "bias"}
    assert prefixed.partial
    assert prefixed.label == "mine"
    assert set(prefixed.source) == {PREFIX + name for name in tensors}


@settings(max_examples=40, deadline=None)
@given(transposed=st.booleans(), data=st.data())
def test_chunks_are_parts_of_the_whole(tmp_path_factory, transposed, data):
    a, b = factors()
    folder = write_adapter(
        tmp_path_factory.mktemp("a"), {"q.lora_A.weight": a, "q.lora_B.weight": b}, fan_in_fan_out=transposed
    )
    adapter = open_checkpoint(folder)
    whole = adapter.tensor("q.weight").flatten()
    start = data.draw(st.integers(0, 60))
    stop = data.draw(st.integers(start, 60))
    torch.testing.assert_close(adapter.read_range("q.weight", start, stop), whole[start:stop])


def test_torch_files(tmp_path):
    a, b = factors()
    folder = write_adapter(tmp_path / "a", {})
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"no weights of the adapter; expected one of adapter_model\.safetensors"):
        open_checkpoint(folder)
    torch.save({PREFIX + "q.lora_A.weight": a, PREFIX + "q.lora_B.weight": b}, folder / "adapter_model.bin")
    torch.testing.assert_close(open_checkpoint(folder).tensor("q.weight"), 4.0 * b @ a)


@pytest.mark.parametrize(
    ("tensors", "config", "message"),
    [
        (
            {},
            {"peft_type": "PREFIX_TUNING"},
            "is a PREFIX_TUNING adapter, whose difference to the base cannot be computed here",
        ),
        ({}, {"peft_type": "LOHA"}, "holds no tensor of a LOHA adapter"),
        ({}, {"use_qalora": True}, "is a LoRA adapter with use_qalora"),
        ({}, {"alora_invocation_tokens": [1]}, "is a LoRA adapter with alora_invocation_tokens"),
        (
            {},
            {"init_lora_weights": "pissa_niter_4"},
            "is 'pissa_niter_4', so its factors are not relative to the published base",
        ),
        ({"q.lora_magnitude_vector": torch.ones(1)}, {}, "which is not part of a supported LoRA"),
        ({"q.lora_arrow": torch.ones(1)}, {}, "which is not part of a supported LoRA"),
        (
            PAIR | {"q.lora_magnitude_vector": torch.ones(6)},
            {},
            "use_dora is False in adapter_config.json, but .* has a",
        ),
        (PAIR, {"use_dora": True}, "use_dora is True in adapter_config.json, but .* has no lora_magnitude_vector"),
        (
            {"q.lora_A.weight": torch.ones(4, 6, 1, 1), "q.lora_B.weight": torch.ones(6, 2, 1, 1)},
            {},
            "are not the factors of one matrix; is it a grouped convolution",
        ),
        (
            PAIR | {"q.bias": torch.ones(6), "q.lora_B.bias": torch.ones(6)},
            {},
            "stores the tensor 'q.bias' and changes it",
        ),
        (
            {"e.trainable_tokens_delta": torch.ones(2, 3)},
            {"trainable_token_indices": [1]},
            "lists 1 trainable tokens for 'e', and the adapter has 2",
        ),
        ({"q.lora_A.weight": torch.ones(1, 1)}, {}, r"has 'base_model\.model\.q\.lora_A\.weight' and no '.*lora_B"),
        ({"classifier.weight": torch.ones(1)}, {}, "holds no LoRA factors"),
    ],
)
def test_what_is_refused(tmp_path, tensors, config, message):
    folder = write_adapter(tmp_path / "a", tensors, **config)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(folder)


def test_an_adapter_is_not_a_model(tmp_path):
    a, b = factors()
    folder = write_adapter(tmp_path / "a", {"q.lora_A.weight": a, "q.lora_B.weight": b})
    with pytest.raises(CheckpointError, match="is an adapter, not a model; merge it with its base"):
        load_checkpoint(folder)
    (folder / "adapter_config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"adapter_config\.json: is not JSON in UTF-8"):
        open_checkpoint(folder)
