"""Common to all methods for matrices: convolutions, stacked experts, the filter before the merge."""

import dataclasses

import pytest
import torch

from freemerge.merging import (
    ACEMerging,
    BalancedMerging,
    FRMerging,
    HighPass,
    IsoC,
    IsoCTS,
    NyquistDisc,
    TSVMerge,
    WeightAverage,
    WUDIMerging,
    merge_task_vectors,
)
from freemerge.merging.methods.matrices import is_embedding, stack_shape

METHODS = [
    TSVMerge(1.2),
    IsoC(1.2),
    IsoC(align=True),
    IsoCTS(1.2),
    ACEMerging(),
    ACEMerging(form="released"),
    BalancedMerging(),
    WUDIMerging(solver="exact"),
    WUDIMerging(learning_rate=1e-3, steps=20),
]


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("method", METHODS, ids=repr)
class TestEveryMethod:
    def test_convolutions_are_matrices(self, method):
        convolutions = [{"conv.weight": normal(6, 3, 2, 2, seed=seed)} for seed in range(3)]
        matrices = [{"conv.weight": vector["conv.weight"].flatten(1)} for vector in convolutions]
        merged = merge_task_vectors(convolutions, method)["conv.weight"]
        expected = merge_task_vectors(matrices, method)["conv.weight"]
        assert merged.shape == (6, 3, 2, 2)
        torch.testing.assert_close(merged.flatten(1), expected, rtol=1e-5, atol=1e-6)
        assert not torch.allclose(expected, merge_task_vectors(matrices, WeightAverage())["conv.weight"], atol=1e-3)

    def test_stacked_experts_are_merged_each_by_itself(self, method):
        name = "model.layers.0.mlp.experts.down_proj"
        vectors = [{name: normal(4, 6, 9, seed=seed)} for seed in range(3)]
        merged = merge_task_vectors(vectors, method)[name]
        for expert in range(4):
            alone = merge_task_vectors([{"w": vector[name][expert]} for vector in vectors], method)["w"]
            torch.testing.assert_close(merged[expert], alone, rtol=1e-5, atol=1e-6)

    def test_other_tensors_are_averaged(self, method):
        names = {"norm.weight": (7,), "temperature": (), "mlp.experts.down_proj_bias": (4, 6)}
        vectors = [{name: normal(*shape, seed=seed) for name, shape in names.items()} for seed in range(3)]
        merged, mean = merge_task_vectors(vectors, method), merge_task_vectors(vectors, WeightAverage())
        for name in names:
            torch.testing.assert_close(merged[name], method.scale * mean[name])

    def test_the_filter_comes_first(self, method):
        vectors = [{"w": normal(12, 20, seed=seed)} for seed in range(3)]
        filter_ = HighPass(0.15)
        if method.align:  # FR-Merging of one model is its filter; alignment brings all to the largest
            filtered = [filter_(vector["w"]) for vector in vectors]
            largest = max(float(each.abs().mean()) for each in filtered)
            filtered = [{"w": each * largest / float(each.abs().mean())} for each in filtered]
        else:
            filtered = [merge_task_vectors([vector], FRMerging(filter_)) for vector in vectors]
        merged = merge_task_vectors(vectors, dataclasses.replace(method, filter=filter_))["w"]
        expected = merge_task_vectors(filtered, dataclasses.replace(method, align=False))["w"]
        torch.testing.assert_close(merged, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("method", [ACEMerging(2.0), WUDIMerging(2.0)], ids=repr)
def test_embeddings_are_averaged_where_rows_are_no_outputs(method):
    vectors = [{"model.embed_tokens.weight": normal(30, 8, seed=seed)} for seed in range(2)]
    merged, mean = merge_task_vectors(vectors, method), merge_task_vectors(vectors, WeightAverage())
    torch.testing.assert_close(merged["model.embed_tokens.weight"], 2 * mean["model.embed_tokens.weight"])


def test_what_is_an_embedding():
    for name in (
        "embeddings.word_embeddings.weight",
        "model.embed_tokens.weight",
        "transformer.wte.weight",
        "shared.weight",
        "vision_model.embeddings.class_embedding",
        "vision_model.embeddings.position_embedding.weight",
    ):
        assert is_embedding(name), name
    for name in (
        "vision_model.embeddings.patch_embedding.weight",
        "lm_head.weight",
        "mlp.shared_expert.up_proj.weight",
    ):
        assert not is_embedding(name), name


def test_what_is_a_stack():
    assert stack_shape("mlp.experts.gate_up_proj", torch.Size([8, 4, 6])) == (8, 4, 6)
    assert stack_shape("block_sparse_moe.input_linear.weight", torch.Size([8, 4, 6])) == (8, 4, 6)
    assert stack_shape("block_sparse_moe.experts.3.w1.weight", torch.Size([4, 6])) == (1, 4, 6)
    assert stack_shape("conv.weight", torch.Size([8, 4, 6])) == (1, 8, 24)
    assert stack_shape("mlp.experts.gate_up_proj_bias", torch.Size([8, 4])) is None
    assert stack_shape("norm.weight", torch.Size([8])) is None


def test_wrong_parameters():
    for build, message in [
        (lambda: TSVMerge(scale=[1.0, 2.0]), "`scale` must be one number for all models"),
        (lambda: IsoC(filter="high"), "`filter` must be a Filter or None, got 'high'"),
        (lambda: ACEMerging(form="best"), '`form` must be "normalized" or "released", got \'best\''),
        (lambda: ACEMerging(ridge=-1), "`ridge` must be at least 0, got -1"),
        (lambda: WUDIMerging(solver="sgd"), '`solver` must be "adam" or "exact", got \'sgd\''),
        (lambda: WUDIMerging(steps=0), "`steps` must be a positive integer, got 0"),
        (lambda: IsoCTS(common=1.5, filter=NyquistDisc()), r"`common` must lie in \[0, 1\], got 1.5"),
    ]:
        with pytest.raises(ValueError, match=message):
            build()
