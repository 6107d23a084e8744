"""`check_expert` accepts correct kinds of experts and names the faults of others."""

from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from freemerge.experts import Expert, LowRankExpert, MaskedExpert, SparseExpert, emr_experts
from freemerge.testing import check_expert
from tests.models.own_parts import ShiftExpert


def shift_of(residual: Mapping[str, Tensor]) -> ShiftExpert:
    shifts = {name: tensor.mean().view(1) for name, tensor in residual.items()}
    return ShiftExpert(shifts, {name: tuple(tensor.shape) for name, tensor in residual.items()})


def masked_of(residual: Mapping[str, Tensor]) -> MaskedExpert:
    return emr_experts({"a": residual, "b": {name: -tensor.flip(0) for name, tensor in residual.items()}})[1]["a"]


def test_correct_kinds_pass() -> None:
    check_expert(SparseExpert, density=0.2, fresh_process=False)
    check_expert(LowRankExpert, rank=1, fresh_process=False)
    check_expert(MaskedExpert, masked_of, fresh_process=False)


def test_a_user_made_kind_is_loaded_in_a_new_process() -> None:
    check_expert(ShiftExpert, shift_of)


class Shift(ShiftExpert):
    KIND = "another shift"

    def with_parts(self, parts: Mapping[str, Tensor]) -> Expert:
        return replace(self, shifts=dict(parts))


class RoundsTwice(ShiftExpert):
    KIND = "rounds twice"

    def added(self, name: str, weight: Tensor) -> Tensor:
        return weight + self.shifts[name].to(weight.dtype)


class Detached(Shift):
    KIND = "detached"

    def added(self, name: str, weight: Tensor) -> Tensor:
        return (weight.float() + self.shifts[name].detach()).to(weight.dtype)


class InPlace(ShiftExpert):
    KIND = "in place"

    def added(self, name: str, weight: Tensor) -> Tensor:
        return weight.add_(self.shifts[name].to(weight.dtype))


class Forgetful(Shift):
    KIND = "forgetful"

    @classmethod
    def restored(cls, plain, arrays, parts, metadata) -> Expert:
        return super().restored(plain, arrays, {name: 2 * part for name, part in parts.items()}, metadata)


class Unfaithful(ShiftExpert):
    KIND = "unfaithful"


class WithoutKind(ShiftExpert):
    pass


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (RoundsTwice, "added of a bfloat16 weight is not the float32 sum rounded once, for '0.weight'"),
        (Detached, "added is not differentiable in the values"),
        (InPlace, "added changes its argument, the weight '0.weight'"),
        (Forgetful, "PackedExpert unpacks another expert, at '0.weight'"),
        (Unfaithful, "with_parts returns a ShiftExpert"),
        (WithoutKind, "has no KIND of its own"),
    ],
)
def test_a_fault_is_named(kind: type[Expert], message: str) -> None:
    def make(residual: Mapping[str, Tensor]) -> Expert:
        own = shift_of(residual)
        return kind({name: torch.full((1,), 0.3) for name in own.shifts}, own.shapes)

    with pytest.raises(AssertionError, match=message):
        check_expert(kind, make, fresh_process=False)


def test_a_kind_without_extraction_says_so() -> None:
    with pytest.raises(NotImplementedError, match="MaskedExpert does not define how it is extracted"):
        MaskedExpert.extract({})
