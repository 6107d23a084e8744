"""Tensor names with wrappers' prefixes, and state dicts with unmerged adapters."""

import pytest
import torch
from torch import nn

from freemerge.checkpoints import CheckpointError, open_checkpoint
from freemerge.checkpoints.marks import without_marks
from freemerge.merging import TaskArithmetic, merge


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.layers = nn.Linear(3, 4), nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 2)])


def _tuned(base):
    return {name: value + 1.0 for name, value in base.items()}


@pytest.mark.parametrize(
    "mark",
    [
        lambda name: f"_orig_mod.{name}",
        lambda name: f"module.{name}",
        lambda name: f"model.module._orig_mod.{name}",
        lambda name: name.replace("layers.0.", "layers.0._checkpoint_wrapped_module."),
        lambda name: "model._fsdp_wrapped_module." + name.replace("layers.1.", "layers.1._fsdp_wrapped_module."),
        lambda name: "_forward_module." + name.replace("first.", "first.module."),
    ],
)
@pytest.mark.parametrize("in_base", [False, True])
def test_wrapper_prefixes_are_removed(mark, in_base):
    base = Net().state_dict()
    tuned = _tuned(base)
    marked = {mark(name): value for name, value in (base if in_base else tuned).items()}
    if in_base and next(iter(marked)).startswith("model."):
        marked = {name.removeprefix("model."): value for name, value in marked.items()}
    merged = merge(marked, [tuned], TaskArithmetic(1.0)) if in_base else merge(base, [marked], TaskArithmetic(1.0))
    assert list(merged) == list(marked if in_base else base)
    for value, name in zip(merged.values(), base, strict=True):
        torch.testing.assert_close(value, base[name] + 1.0)


def test_a_layer_that_is_called_module_keeps_its_name():
    base = {"module.weight": torch.zeros(2), "weight": torch.ones(2)}
    checkpoint = open_checkpoint(_tuned(base))
    assert without_marks(checkpoint, base).names == ("module.weight", "weight")


def test_prefixes_that_distinguish_names_are_kept():
    both = {"a._orig_mod.weight": torch.zeros(2), "a.weight": torch.zeros(2)}
    assert without_marks(open_checkpoint(both), ["a.weight"]).names == tuple(both)


@pytest.mark.parametrize(
    "name",
    [
        "model.q.lora_A.default.weight",
        "base_model.model.q.base_layer.weight",
        "wte.lora_embedding_A.mine",
        "q.lora_magnitude_vector.default.weight",
        "head.modules_to_save.default.weight",
    ],
)
def test_unmerged_adapters_in_a_state_dict_are_called_by_their_name(name):
    base = {"q.weight": torch.zeros(2, 2)}
    with pytest.raises(CheckpointError, match=r"holds an unmerged PEFT adapter .* merge_and_unload"):
        merge(base, [{"q.weight": torch.zeros(2, 2), name: torch.zeros(2, 2)}], TaskArithmetic(1.0))


def test_a_file_with_factors_alone_is_an_adapter_unless_the_base_has_factors_too():
    base, factors = {"q.weight": torch.zeros(2, 2)}, {"q.lora_A.weight": torch.ones(2, 2)}
    with pytest.raises(CheckpointError, match="holds an unmerged PEFT adapter"):
        merge(base, [base | factors], TaskArithmetic())
    own = {"q.lora_A.weight": torch.zeros(2, 2)}
    assert torch.equal(merge(own, [factors], TaskArithmetic(1.0))["q.lora_A.weight"], torch.ones(2, 2))
