"""`check_method` accepts all of our methods and names the faults of others."""

from dataclasses import dataclass, field
from typing import ClassVar

import pytest
import torch

from freemerge.merging import MergeMethod
from freemerge.testing import check_method
from tests.merging.merging_models import METHODS


@pytest.mark.parametrize("method", METHODS, ids=repr)
def test_all_of_our_methods_pass(method):
    check_method(method)


@dataclass(frozen=True)
class Sum(MergeMethod):
    """The simplest method."""

    scale: float = 1.0

    linear_in_scale: ClassVar[bool] = True

    def combine(self, name, deltas, statistics):
        return self.scale * deltas.sum(dim=0)


def test_a_user_made_method_passes():
    check_method(Sum())
    check_method(Sum(0.3), models=2)


@dataclass(frozen=True)
class Wide(Sum):
    def combine(self, name, deltas, statistics):
        return super().combine(name, deltas, statistics).double()


@dataclass(frozen=True)
class Flat(Sum):
    def combine(self, name, deltas, statistics):
        return super().combine(name, deltas, statistics).reshape(-1)


@dataclass(frozen=True)
class Dice(Sum):
    def combine(self, name, deltas, statistics):
        return torch.rand(deltas.shape[1:])


@dataclass(frozen=True)
class Chunky(Sum):
    elementwise = True

    def combine(self, name, deltas, statistics):
        return deltas.sum(dim=0) / deltas.abs().max().clamp_min(1e-9)


@dataclass(frozen=True)
class Bent(Sum):
    linear_in_scale: ClassVar[bool] = True

    def combine(self, name, deltas, statistics):
        return self.scale**2 * deltas.sum(dim=0)


@dataclass(frozen=True)
class Forgetful(Sum):
    statistics_fields: ClassVar = ()

    def collect_statistics(self, vectors):
        return self.scale

    def combine(self, name, deltas, statistics):
        return statistics * deltas.sum(dim=0)


@dataclass(frozen=True)
class First(Sum):
    def combine(self, name, deltas, statistics):
        return deltas[0].clone()


@dataclass(frozen=True)
class Shifted(Sum):
    def combine(self, name, deltas, statistics):
        return deltas.sum(dim=0) + 1


@dataclass(frozen=True)
class Infinite(Sum):
    def combine(self, name, deltas, statistics):
        return deltas.sum(dim=0) / 0


@dataclass
class Loose(MergeMethod):
    scale: float = 1.0

    def combine(self, name, deltas, statistics):
        return deltas.sum(dim=0)


class Plain(MergeMethod):
    def combine(self, name, deltas, statistics):
        return deltas.sum(dim=0)


@dataclass(frozen=True)
class Unsent(Sum):
    function: object = field(default_factory=lambda: lambda: 0, compare=False)


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (Wide(), "Wide.combine returns torch.float64"),
        (Flat(), "returned shape"),
        (Dice(), "Dice is not deterministic"),
        (Chunky(), "Chunky is elementwise, but chunks of"),
        (Bent(), "Bent sets linear_in_scale"),
        (Forgetful(), "Forgetful: its statistics depend on `scale`"),
        (First(), "First's result depends on the order of the models"),
        (Shifted(), "Shifted of models that equal the base is not the base"),
        (Infinite(), "NaN or infinite"),
        (Loose(), "Loose is mutable"),
        (Plain(), "Plain is not a dataclass"),
        (Unsent(), "Unsent cannot be sent to another process"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, MergeMethod) else "",
)
def test_a_fault_is_named(method, message):
    with pytest.raises(AssertionError, match=message.replace("(", r"\(")):
        check_method(method)


def test_a_method_may_depend_on_the_order():
    check_method(First(), symmetric=False)
