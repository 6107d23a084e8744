"""Settings refuse what they cannot mean, before any work."""

import pytest
import torch
from jsonargparse import ArgumentParser

from freemerge.experts import Expert, LowRankExpert, MaskedExpert
from freemerge.merging import TaskArithmetic, WeightAverage
from freemerge.pipeline import ExpertsSettings, MergeSettings, PretrainSettings, RouterSettings, Settings
from freemerge.pipeline.dependencies import dependencies
from freemerge.training import FineTuner
from tests.models.own_parts import ShiftExpert
from tests.tiny import tiny_backbone


def test_a_misspelt_trainer_argument_is_named_with_the_right_one() -> None:
    with pytest.raises(
        ValueError, match=r"pretrain\.trainer: Trainer has no argument 'max_epoch'; did you mean 'max_epochs'"
    ):
        PretrainSettings(trainer={"max_epoch": 1})


def test_merge_settings_need_scales_and_a_known_method() -> None:
    assert list(MergeSettings().methods) == ["average", "task arithmetic", "TIES", "PCB", "FR"]
    with pytest.raises(ValueError, match="at least one scale"):
        MergeSettings(scales=[])
    with pytest.raises(ValueError, match="no method 'FRR'; methods: average, task arithmetic, TIES, PCB, FR"):
        MergeSettings(free="FRR")


def test_without_a_grid_each_method_has_its_own_scale() -> None:
    settings = MergeSettings(scales=None)
    assert settings.scales_of(TaskArithmetic(scale=0.3)) == [0.3]
    assert settings.scales_of(TaskArithmetic(scale=[0.3, 0.5])) == [1.0]  # the factor of both
    assert settings.scales_of(WeightAverage()) == [1.0]
    assert MergeSettings(scales=[0.2, 0.4]).scales_of(TaskArithmetic(scale=0.3)) == [0.2, 0.4]


def test_density_is_a_fraction() -> None:
    with pytest.raises(ValueError, match=r"experts\.density: must be in \(0, 1\], got 1\.5"):
        ExpertsSettings(density=1.5)


def test_a_configuration_may_use_the_former_name_of_the_router_fraction() -> None:
    parser = ArgumentParser()
    parser.add_argument("--router", type=RouterSettings)
    settings = parser.instantiate_classes(parser.parse_string("router: {share: 0.9}")).router
    assert settings.fraction == 0.9
    assert identity(settings) == identity(RouterSettings(fraction=0.9))


def identity(router: RouterSettings) -> dict:
    """The values that decide whether a router has to be trained again."""
    return dependencies(FineTuner(tiny_backbone()), {}, Settings(router=router))["router"]


def test_an_expert_kind_of_ones_own_receives_its_arguments() -> None:
    residual = {"weight": torch.tensor([[1.0, 3.0]])}
    expert = ExpertsSettings(kind=ShiftExpert, arguments={"factor": 0.5}).cut(residual, {"task": "a"})
    assert isinstance(expert, ShiftExpert)
    assert expert.metadata == {"task": "a"}
    torch.testing.assert_close(expert.dense()["weight"], torch.tensor([[1.0, 1.0]]))
    ranks = ExpertsSettings(kind="low_rank", arguments={"density": None, "rank": 2}).cut({"weight": torch.eye(9)})
    assert isinstance(ranks, LowRankExpert)
    assert ranks.left["weight"].shape == (9, 2)


def test_arguments_that_the_kind_does_not_take_are_refused() -> None:
    with pytest.raises(ValueError, match=r"experts\.arguments: extracting a ShiftExpert expert: .*'facto'"):
        ExpertsSettings(kind=ShiftExpert, arguments={"facto": 0.5})
    with pytest.raises(ValueError, match=r"experts\.arguments: extracting a sparse expert: .*'factor'"):
        ExpertsSettings(arguments={"factor": 0.5})


def test_a_kind_that_cannot_be_extracted_or_found_again_is_refused() -> None:
    class Nameless(ShiftExpert):
        pass

    with pytest.raises(ValueError, match=r"experts\.kind: .*Nameless has no KIND of its own"):
        ExpertsSettings(kind=Nameless)
    with pytest.raises(ValueError, match=r"experts\.kind: Expert .*KIND"):
        ExpertsSettings(kind=Expert)
    with pytest.raises(ValueError, match=r"experts\.kind: MaskedExpert has no class method `extract`"):
        ExpertsSettings(kind=MaskedExpert)
