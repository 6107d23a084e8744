"""The search space of a method."""

import pytest

from freemerge.merging import (
    Butterworth,
    Dare,
    FRMerging,
    HighPass,
    MergeError,
    PCBMerging,
    TaskArithmetic,
    Ties,
    TSVMerge,
    WeightAverage,
)
from freemerge.tuning import Range, Space, default_ranges

TASKS = ("a", "b", "c")


@pytest.mark.parametrize("method", [TaskArithmetic(), PCBMerging(), FRMerging()])
def test_by_default_each_task_has_its_own_scale(method) -> None:
    space = Space(method, TASKS, default_ranges(method))
    assert [each.name for each in space.parameters] == ["scale/a", "scale/b", "scale/c"]
    assert space.start() == dict.fromkeys(["scale/a", "scale/b", "scale/c"], method.scale)
    assert space.apply({"scale/a": 0.1, "scale/b": 0.2, "scale/c": 0.3}).scale == [0.1, 0.2, 0.3]


@pytest.mark.parametrize("method", [Ties(), TSVMerge(), Dare(Ties())])
def test_a_method_with_one_scale_searches_one_value(method) -> None:
    space = Space(method, TASKS, default_ranges(method))
    assert space.apply({"scale": 0.5}).scale == 0.5


def test_any_number_of_a_method_can_be_searched_for() -> None:
    ranges = {"ratio": Range(0.01, 1.0, log=True), "filter.cutoff": Range(0.0, 0.5), "scale": Range(0, 2)}
    space = Space(PCBMerging(0.2, filter=HighPass(0.1)), TASKS, ranges)
    assert space.start() == {"ratio": 0.2, "filter.cutoff": 0.1, "scale": 1.0}
    assert space.apply({"ratio": 0.5, "filter.cutoff": 0.3, "scale": 2.0}) == PCBMerging(0.5, 2.0, filter=HighPass(0.3))
    inner = Space(Dare(Ties()), TASKS, {"method.density": Range(0.1, 0.9), "drop": Range(0, 0.99)})
    assert inner.apply({"method.density": 0.3, "drop": 0.5}) == Dare(Ties(0.3), 0.5)


def test_integers_stay_integers_and_lists_start_at_their_values() -> None:
    space = Space(FRMerging(Butterworth(0.1)), TASKS, {"filter.order": Range(1, 6)})
    assert space.parameters[0].integer
    own = Space(TaskArithmetic([0.1, 0.2, 5.0]), TASKS, {"scale": Range(0, 1, per_task=True)})
    assert own.start() == {
        "scale/a": 0.1,
        "scale/b": 0.2,
        "scale/c": 1.0,
    }  # a value outside of the range starts at its end
    one = Space(TaskArithmetic([0.1, 0.2, 0.3]), TASKS, {"scale": Range(0, 1)})
    assert one.start() == pytest.approx({"scale": 0.2})
    word = Space(FRMerging(), TASKS, {"coefficients": Range(0, 2, per_task=True)})
    assert word.start() == {"coefficients/a": 1.0, "coefficients/b": 1.0, "coefficients/c": 1.0}


@pytest.mark.parametrize(
    ("method", "ranges", "message"),
    [
        (Ties(), {"densty": Range(0, 1)}, "Ties has no parameter 'densty'; did you mean 'density'"),
        (Ties(), {"scale": Range(0, 1, per_task=True)}, "tune.space: scale of Ties is not a list of numbers"),
        (Ties(), {"scope": Range(0, 1)}, "tune.space: scope of Ties is not a number"),
        (FRMerging(), {"coefficients": Range(0, 1)}, "tune.space: coefficients of FRMerging is not a number"),
        (FRMerging(), {"filter.cutoff": Range(0, 1)}, "NyquistDisc has no parameter 'cutoff'; it has radius"),
        (Ties(), {}, "there is no parameter to search for"),
    ],
)
def test_unsuitable_parameters_are_refused(method, ranges, message) -> None:
    with pytest.raises((ValueError, MergeError), match=message):
        Space(method, TASKS, ranges)


def test_invalid_ranges_are_refused() -> None:
    with pytest.raises(ValueError, match="low must be less than high, got 1 and 1"):
        Range(1, 1)
    with pytest.raises(ValueError, match="a range with log must start above 0"):
        Range(0, 1, log=True)
    with pytest.raises(ValueError, match="tune: WeightAverage has no scale to search for"):
        default_ranges(WeightAverage())
