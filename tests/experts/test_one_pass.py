"""One pass with several low-rank experts: each group has the result of its own changed weights."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from freemerge.experts import LowRankExpert, PackedExpert, extract_low_rank
from freemerge.experts.running.one_pass import fits_one_pass, in_one_pass
from freemerge.inputs import Inputs, select
from tests.tiny import tiny_backbone, tiny_text_backbone

TEXTS = {
    "input_ids": torch.randint(5, 20, (9, 6), generator=torch.Generator().manual_seed(0)),
    "attention_mask": torch.ones(9, 6, dtype=torch.long),
}


def images(count: int) -> Tensor:
    return torch.randn(count, 1, 8, 8, generator=torch.Generator().manual_seed(1))


def make_expert(weights: dict[str, Tensor], seed: int, rank: int = 2) -> LowRankExpert:
    generator = torch.Generator().manual_seed(seed)
    floating = {name: tensor for name, tensor in weights.items() if tensor.is_floating_point()}
    noise = {name: 0.3 * torch.randn(tensor.shape, generator=generator) for name, tensor in floating.items()}
    return extract_low_rank(noise, rank=rank)


def with_changed_weights(model: nn.Module, run: Callable, expert: LowRankExpert | None, inputs: Inputs) -> Tensor:
    own = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    if expert is not None:
        model.load_state_dict(own | {name: expert.added(name, own[name]) for name in expert.shapes})
    result = run(inputs)
    model.load_state_dict(own)
    return result


@torch.no_grad()
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("counts", [(4, 1, 3, 1), (9,), (1,)])
@pytest.mark.parametrize(("make", "inputs"), [(tiny_backbone, images(9)), (tiny_text_backbone, TEXTS)])
def test_every_group_has_the_result_of_its_changed_weights(make, inputs: Inputs, counts: tuple, packed: bool) -> None:
    backbone = make().eval()
    before = {name: tensor.clone() for name, tensor in backbone.weights().items()}
    experts = [make_expert(backbone.weights(), seed) for seed in range(len(counts))]
    assert any(expert.whole for expert in experts)
    if packed:
        experts = [PackedExpert(expert) for expert in experts]
    experts = [None if index == 2 else expert for index, expert in enumerate(experts)]
    groups = list(zip(experts, counts, strict=True))
    inputs = select(inputs, slice(sum(counts)))
    assert fits_one_pass(backbone.model, backbone, groups, inputs)
    with in_one_pass(backbone.model, groups):
        found = backbone(inputs)
    start = 0
    for expert, count in groups:
        part = slice(start, start + count)
        start += count
        plain = expert.unpacked() if isinstance(expert, PackedExpert) else expert
        expected = with_changed_weights(backbone.model, backbone, plain, select(inputs, part))
        torch.testing.assert_close(found[part], expected, rtol=1e-4, atol=1e-4)
    assert all(torch.equal(tensor, before[name]) for name, tensor in backbone.weights().items())
    assert not any("forward" in vars(part) for part in backbone.modules())


def test_large_packed_experts_are_unpacked_layer_by_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("freemerge.experts.running.one_pass._SMALL", 0)
    monkeypatch.setattr(PackedExpert, "unpacked", lambda self: pytest.fail("unpacked as a whole"))
    backbone = tiny_backbone().eval()
    expert = make_expert(backbone.weights(), 0)
    with torch.no_grad(), in_one_pass(backbone.model, [(PackedExpert(expert), 5), (None, 4)]):
        found = backbone(images(9))
    with torch.no_grad(), in_one_pass(backbone.model, [(expert, 5), (None, 4)]):
        torch.testing.assert_close(found, backbone(images(9)))


class TimeFirst(nn.Module):
    """A model whose layers have inputs (time, samples, features)."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.layer(inputs.transpose(0, 1)).mean(0)


class Functional(nn.Module):
    """A model that uses a layer's weight directly."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs @ self.layer.weight.T


@pytest.mark.parametrize("make", [TimeFirst, Functional])
def test_other_layouts_are_detected(make: type[nn.Module]) -> None:
    model = make().eval()
    groups = [(make_expert(model.state_dict(), 0, rank=1), 3), (None, 3)]
    assert not fits_one_pass(model, model, groups, torch.randn(6, 2, 4))
    assert not fits_one_pass(model, model, groups, torch.randn(1, 3, 4))


def test_layers_are_restored_after_an_error() -> None:
    backbone = tiny_backbone().eval()
    groups = [(make_expert(backbone.weights(), 0), 2), (None, 1)]
    own = backbone.model.layernorm.forward
    backbone.model.layernorm.forward = lambda inputs: own(inputs)  # an instance's own `forward`, which must be restored
    mine = backbone.model.layernorm.forward
    with pytest.raises(RuntimeError), in_one_pass(backbone.model, groups):
        backbone(images(3)[:, :, :3])
    assert backbone.model.layernorm.forward is mine
    del backbone.model.layernorm.forward
    assert not any("forward" in vars(part) for part in backbone.modules())


@torch.no_grad()
def test_a_parameter_of_the_whole_model_makes_the_whole_model_run_group_by_group() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(4))
            self.layer = nn.Linear(4, 4)

        def forward(self, inputs: Tensor) -> Tensor:
            return self.layer(inputs) * self.scale

    model = Scaled().eval()
    experts = [make_expert(model.state_dict(), seed, rank=1) for seed in range(2)]
    inputs = torch.randn(5, 4)
    groups = [(experts[0], 2), (experts[1], 3)]
    assert fits_one_pass(model, model, groups, inputs)
    with in_one_pass(model, groups):
        found = model(inputs)
    for expert, part in zip(experts, (slice(0, 2), slice(2, 5)), strict=True):
        changed = {name: expert.added(name, tensor) for name, tensor in model.state_dict().items()}
        torch.testing.assert_close(found[part], functional_call(model, changed, (inputs[part],)))


@torch.no_grad()
def test_whole_weights_and_factors_of_the_same_layer_are_distinguished() -> None:
    class Shared(nn.Module):
        """A layer with one input row for all samples."""

        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4, bias=False)

        def forward(self, inputs: Tensor) -> Tensor:
            return inputs + self.layer(torch.ones(1, 4))

    model, inputs = Shared().eval(), torch.randn(5, 4)
    whole = LowRankExpert({}, {}, {"layer.weight": torch.randn(4, 4)}, {"layer.weight": (4, 4)})
    factors = {"layer.weight": torch.randn(4, 1)}, {"layer.weight": torch.randn(1, 4)}
    factored = LowRankExpert(*factors, {}, {"layer.weight": (4, 4)})
    assert fits_one_pass(model, model, [(whole, 2), (None, 3)], inputs)
    assert not fits_one_pass(model, model, [(factored, 2), (None, 3)], inputs)
