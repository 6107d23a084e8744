"""Layerwise substitution has the outputs and gradients of a model whose weights are all changed."""

import pytest
import torch
from torch import nn
from torch.func import functional_call

from freemerge.experts import Expert, extract, extract_low_rank
from freemerge.experts.running.layerwise import substituted


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 6, 3, padding=1),
        nn.BatchNorm2d(6),
        nn.Flatten(),
        nn.Linear(96, 40),
        nn.ReLU(),
        nn.Linear(40, 40),
        nn.ReLU(),
        nn.Linear(40, 3),
    ).eval()


def expert_of(module: nn.Module, kind: str) -> Expert:
    residual = {name: 0.3 * torch.randn(t.shape) for name, t in module.state_dict().items() if t.is_floating_point()}
    return extract(residual, 0.2) if kind == "sparse" else extract_low_rank(residual, rank=2)


@pytest.mark.parametrize("kind", ["sparse", "low_rank"])
def test_outputs_and_gradients_are_those_of_the_summed_weights(kind: str) -> None:
    module, images = network().requires_grad_(False), torch.randn(5, 2, 4, 4, requires_grad=True)
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    expert = expert_of(module, kind)

    def gradients(run) -> tuple[torch.Tensor, ...]:
        values = expert.flat_values().clone().requires_grad_()
        output = run(expert.with_values(values))
        return output, *torch.autograd.grad(output.square().sum(), [values, images])

    def layer_by_layer(expert: Expert) -> torch.Tensor:
        with substituted(module, expert.shapes, expert.added):
            return module(images)

    def all_at_once(expert: Expert) -> torch.Tensor:
        return functional_call(module, {name: expert.added(name, before[name]) for name in expert.shapes}, (images,))

    for ours, expected in zip(gradients(layer_by_layer), gradients(all_at_once), strict=True):
        torch.testing.assert_close(ours, expected)
    assert all(torch.equal(before[name], tensor) for name, tensor in module.state_dict().items())
    assert all(isinstance(parameter, nn.Parameter) for parameter in module.parameters())


def test_autograd_saves_no_changed_weight() -> None:
    """No tensor saved for the backward pass is a changed weight or a view of one."""
    module, images = network().requires_grad_(False), torch.randn(5, 2, 4, 4)
    expert = expert_of(module, "low_rank")
    expert = expert.with_values(expert.flat_values().requires_grad_())
    with substituted(module, expert.shapes, expert.added):
        output = module(images).sum()
    weights = {(40, 96), (96, 40), (40, 40), (6, 2, 3, 3), (3, 40), (40, 3)}
    kept, seen, waiting = set(), set(), [output.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        waiting += [parent for parent, _ in node.next_functions]
        for name in dir(node):
            if name.startswith("_raw_saved"):
                data = getattr(node, name)
                value = getattr(data, "data", None)
                kept |= {tuple(value.shape)} if isinstance(value, torch.Tensor) else set()
    assert any("Addmm" in type(node).__name__ for node in seen)
    assert not kept & weights


def test_attention_uses_its_projection_directly() -> None:
    torch.manual_seed(0)
    module, tokens = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval(), torch.randn(2, 3, 8)
    module.requires_grad_(False)
    expert = expert_of(module, "low_rank")
    expected = functional_call(
        module, {name: expert.added(name, module.get_parameter(name)) for name in expert.shapes}, (tokens.clone(),)
    )
    module.train()  # the fast path of inference runs no submodule
    module.dropout.p = module.dropout1.p = module.dropout2.p = module.self_attn.dropout = 0.0
    with substituted(module, expert.shapes, expert.added):
        torch.testing.assert_close(module(tokens), expected)


def test_weights_that_a_parent_uses_directly_are_reported_and_restored() -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(3, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x @ self.inner.weight

    module = Outer()
    with (
        pytest.raises(RuntimeError, match="the layer 'inner' did not run, so its changed weights were not used"),
        substituted(module, ["inner.weight"], lambda _, weight: weight + 1),
    ):
        module(torch.ones(1, 3))
    module.branch = nn.Sequential(nn.Linear(3, 3))  # not part of the pass, so no change is lost
    with substituted(module, ["branch.0.weight"], lambda _, weight: weight + 1):
        module(torch.ones(1, 3))
    own = network()
    before = own[0].weight
    with pytest.raises(RuntimeError), substituted(own, ["0.weight"], lambda _, weight: weight + 1):
        own(torch.ones(1, 5, 4, 4))
    assert own[0].weight is before
