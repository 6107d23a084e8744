"""Replicas share every tensor with their original and do not change it."""

import gc
import weakref
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from freemerge.experts import Expert, extract, extract_low_rank, workspace
from freemerge.experts.running.groups import run_groups
from freemerge.experts.running.replicas import make_replica


def experts_of(module: nn.Module, kind: str) -> list[Expert]:
    found = []
    for seed in range(2):
        generator = torch.Generator().manual_seed(seed)
        residual = {name: 0.3 * torch.randn(t.shape, generator=generator) for name, t in module.state_dict().items()}
        found.append(extract(residual, 0.3) if kind == "sparse" else extract_low_rank(residual, rank=1))
    return found


class Recurrent(nn.Module):
    """A recurrent layer, which has a list of its weights."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.LSTM(4, 5, batch_first=True)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.body(inputs)[0][:, -1]


class WithLists(nn.Module):
    """Layers in a list, a dictionary, a bound method and a partial; a parameter in a list."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.three, self.four = (nn.Linear(4, 4) for _ in range(4))
        self.scale = nn.Parameter(torch.randn(4))
        self.order = [self.one]
        self.by_name = {"two": self.two}
        self.call = self.three.forward
        self.last = partial(WithLists.apply_to, layer=self.four)
        self.scales = [self.scale]

    @staticmethod
    def apply_to(inputs: Tensor, layer: nn.Module) -> Tensor:
        return layer(inputs)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self.by_name["two"](self.order[0](inputs.mean(1)).tanh())
        return self.last(self.call(hidden).tanh() * self.scales[0])


class WithClosure(nn.Module):
    """A layer in the closure of a function."""

    def __init__(self) -> None:
        super().__init__()
        layer = self.layer = nn.Linear(4, 4)
        self.run = lambda inputs: layer(inputs)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.run(inputs.mean(1))


class Functional(nn.Module):
    """A parent that uses a layer's weights directly; parameters in a list."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(4, 4)])
        self.shifts = nn.ParameterList([torch.randn(4)])

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs.mean(1) @ self.layers[0].weight.T + self.shifts[0] * self.layers[0].bias


class Normed(nn.Module):
    """A hook computes the weight from others before each pass."""

    def __init__(self) -> None:
        super().__init__()
        self.old = torch.nn.utils.weight_norm(nn.Linear(4, 4))
        self.new = torch.nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))

    def forward(self, inputs: Tensor) -> Tensor:
        return self.new(self.old(inputs.mean(1)))


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated", "ignore:RNN module weights")
@pytest.mark.parametrize("kind", ["sparse", "low_rank"])
@pytest.mark.parametrize("make", [Recurrent, WithLists, WithClosure, Functional, Normed, "encoder"])
def test_modules_of_any_structure_use_each_groups_expert(make: Callable[[], nn.Module] | str, kind: str) -> None:
    """The result equals that of a module with the changed weights as its state."""
    torch.manual_seed(0)
    if make == "encoder":
        make = partial(nn.TransformerEncoderLayer, 4, 2, 8, batch_first=True)
    module, inputs = make().eval(), torch.randn(5, 3, 4)
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    experts = experts_of(module, kind)
    expected = []
    for expert, part in zip(experts, (inputs[:2], inputs[2:4]), strict=True):
        other = make().eval()
        other.load_state_dict(
            {name: expert.added(name, tensor) for name, tensor in before.items() if name in expert.shapes}
            | {name: tensor for name, tensor in before.items() if name not in expert.shapes}
        )
        expected.append(other(part))
    expected.append(module(inputs[4:]))
    for _ in range(2):
        found = run_groups(module, module, inputs, [(experts[0], 2), (experts[1], 2), (None, 1)])
        torch.testing.assert_close(found, torch.cat(expected))
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())
    assert not any(
        part._forward_pre_hooks and "Weight" not in str(part._forward_pre_hooks) for part in module.modules()
    )


def test_a_compiled_module_or_one_with_layers_in_closures_has_no_replica() -> None:
    assert make_replica(WithClosure()) is None
    compiled = nn.Sequential(nn.Linear(2, 2))
    assert make_replica(compiled) is not None
    compiled[0].compile(backend="eager")
    assert make_replica(compiled) is None
    assert make_replica(nn.Sequential(torch.compile(nn.Linear(2, 2), backend="eager"))) is None
    assert make_replica(torch.jit.script(nn.Linear(2, 2))) is None
    around = nn.ModuleDict({"inner": nn.Linear(2, 2)})
    around["inner"].register_forward_hook(lambda *_: around)
    assert make_replica(around["inner"]) is None


def test_a_replica_follows_changes_of_its_original_and_is_reset_after_a_pass() -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.seen = nn.Linear(2, 2), 0
            self.register_buffer("last", torch.zeros(2))

        def forward(self, inputs: Tensor) -> Tensor:
            self.seen += 1
            self.last = inputs[0]
            return self.layer(inputs) + self.seen

    module, inputs = Counting(), torch.ones(1, 2)

    def run() -> Tensor:
        with workspace(module) as own:
            assert own.is_replica
            return own[module](inputs)

    with workspace(module) as first:
        pass
    assert torch.equal(run(), run())
    assert module.seen == 0
    assert not module.last.any()
    with workspace(module) as again:
        assert again is first
    module.layer = nn.Linear(2, 2)
    torch.testing.assert_close(run(), module.layer(inputs) + 1)
    module.layer.weight = nn.Parameter(torch.zeros(2, 2))
    torch.testing.assert_close(run(), module.layer(inputs) + 1)
    module.register_buffer("last", torch.ones(2))
    with workspace(module) as own:
        assert own[module].last is module.last
    module.eval()
    with workspace(module) as own:
        assert not own[module].training
    seen = []
    module.layer.register_forward_hook(lambda *_: seen.append(1))
    run()
    assert seen == [1]


def test_gradients_reach_the_originals_parameters() -> None:
    module = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 2))
    (expert, _), inputs = experts_of(module, "sparse"), torch.randn(4, 3)
    run_groups(module, module, inputs, [(expert, 4)]).sum().backward()
    other = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 2))
    other.load_state_dict(
        {
            name: expert.added(name, tensor) if name in expert.shapes else tensor
            for name, tensor in module.state_dict().items()
        }
    )
    other(inputs).sum().backward()
    for ours, expected in zip(module.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, expected.grad)


def test_spare_replicas_do_not_keep_their_original_alive() -> None:
    for bound in (False, True):
        module = nn.Sequential(nn.Linear(2, 2))
        if bound:
            module[0].around = [module.forward]
        with workspace(module) as own:
            assert own.is_replica
            own[module](torch.ones(1, 2))
            del own
        there = weakref.ref(module)
        del module
        gc.collect()
        assert there() is None
