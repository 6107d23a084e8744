"""Buffers in a model's file: constants, which may be missing, and batch-norm statistics, which are averaged."""

import pytest
import torch
from torch import nn

from freemerge.checkpoints import load_checkpoint, save_checkpoint
from freemerge.merging import (
    MergeError,
    PerPattern,
    TaskArithmetic,
    WeightAverage,
    apply_task_vector,
    merge,
    merge_task_vectors,
)
from freemerge.merging.engine.search import Candidates
from tests.merging.merging_models import METHODS as ALL

METHODS = [method for method in ALL if not isinstance(method, PerPattern)]  # whose patterns need other names
WEIGHT = "conv.weight"
CONSTANTS = {
    "h.0.attn.bias": torch.ones(1, 1, 4, 4).tril(),
    "h.0.attn.masked_bias": torch.tensor(-1e4),
    "layers.1.attention.bias": torch.ones(1, 1, 4, 4).tril(),
    "model.layers.0.self_attn.rotary_emb.inv_freq": torch.rand(4),
    "rotary_emb.cos_cached": torch.rand(1, 1, 4, 4),
    "embeddings.position_ids": torch.arange(4)[None],
}


@pytest.mark.parametrize("where", ["base", "models", "one"])
def test_constant_buffers_never_block_a_merge_and_never_change(where):
    base = {WEIGHT: torch.zeros(3, 3)}
    tuned = [{WEIGHT: torch.ones(3, 3)}, {WEIGHT: torch.full((3, 3), 3.0)}]
    if where == "base":
        base |= CONSTANTS
    else:
        for model in tuned if where == "models" else tuned[:1]:
            model.update({name: value + 1 for name, value in CONSTANTS.items()})
    merged = merge(base, tuned, TaskArithmetic(0.5))
    assert list(merged) == list(base)
    assert torch.equal(merged[WEIGHT], torch.full((3, 3), 2.0))
    assert all(torch.equal(merged[name], value) for name, value in base.items() if name != WEIGHT)


def test_weights_named_like_masks_are_merged():
    base, tuned = {WEIGHT: torch.zeros(2), "attn.bias": torch.zeros(4)}, {WEIGHT: torch.zeros(2)}
    with pytest.raises(MergeError, match=r"attn\.bias"):
        merge(base, [tuned], TaskArithmetic())


def _normed(scale):
    """Opposed weights, and variances so near zero that extrapolation makes them negative."""
    torch.manual_seed(int(scale * 10))
    return {
        WEIGHT: torch.randn(6, 5) * scale,
        "bn.running_mean": torch.randn(6) * scale,
        "bn.running_var": torch.rand(6) * 0.1 + (1.0 if scale == 0 else 0.0),
        "bn.num_batches_tracked": torch.tensor(int(scale * 10)),
    }


@pytest.mark.parametrize("method", METHODS, ids=repr)
@pytest.mark.parametrize("how", ["memory", "file", "candidates", "vectors"])
def test_statistics_are_averaged_by_every_method_on_every_path(method, how, tmp_path):
    base, tuned = _normed(0), [_normed(0.1), _normed(0.2), _normed(0.3)]
    if how == "memory":
        merged = merge(base, tuned, method)
    elif how == "file":
        for index, state in enumerate((base, *tuned)):
            save_checkpoint(tmp_path / f"{index}.safetensors", state)
        paths = [tmp_path / f"{index}.safetensors" for index in range(4)]
        merged = load_checkpoint(merge(paths[0], paths[1:], method, output=tmp_path / "out.safetensors"))
    elif how == "candidates":
        merged = Candidates(base, dict(zip("abc", tuned, strict=True))).merge(method)
    else:
        vectors = [{name: model[name] - base[name] for name in list(base)[:3]} for model in tuned]
        merged = apply_task_vector(base, merge_task_vectors(vectors, method))
    for name in ("bn.running_mean", "bn.running_var"):
        expected = torch.stack([model[name].double() for model in tuned]).mean(dim=0)
        torch.testing.assert_close(merged[name].double(), expected, rtol=1e-5, atol=1e-6)
    assert int(merged["bn.num_batches_tracked"]) == 0


def test_methods_see_no_statistics():
    """Global order statistics count weights only: merged weights are equal with and without batch norm."""
    base, tuned = _normed(0), [_normed(0.1), _normed(0.2), _normed(0.3)]
    alone = [{WEIGHT: model[WEIGHT]} for model in (base, *tuned)]
    for method in METHODS:
        assert torch.equal(merge(base, tuned, method)[WEIGHT], merge(alone[0], alone[1:], method)[WEIGHT])


def test_buffers_of_modules_are_statistics_whatever_they_are_called():
    class Centred(nn.Module):
        def __init__(self, value):
            super().__init__()
            self.weight = nn.Parameter(torch.full((2, 2), value))
            self.register_buffer("seen", torch.full((2,), value))

    merged = merge(Centred(0.0), [Centred(1.0), Centred(3.0)], TaskArithmetic(2.0))
    assert torch.equal(merged["weight"], torch.full((2, 2), 8.0))
    assert torch.equal(merged["seen"], torch.full((2,), 2.0))


def test_scaled_task_vectors_do_not_take_statistics_beyond_the_model():
    base = {"bn.running_var": torch.ones(2), "weight": torch.ones(2)}
    vector = {name: torch.full((2,), -0.5) for name in base}
    for scale, variance in ((3.0, 0.5), (0.5, 0.75), (-1.0, 1.0)):
        found = apply_task_vector(base, vector, scale)
        assert torch.equal(found["bn.running_var"], torch.full((2,), variance))
        assert torch.equal(found["weight"], torch.full((2,), 1 - 0.5 * scale))


def test_reestimating_batch_norm_is_suggested(caplog):
    merge(_normed(0), [_normed(0.1)], TaskArithmetic())
    assert "reestimate_batch_norm" in caplog.text
    caplog.clear()
    merge(_normed(0), [_normed(0.1)], WeightAverage())  # a copy of that model
    assert not caplog.text
