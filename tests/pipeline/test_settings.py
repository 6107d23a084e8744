"""Settings refuse what they cannot mean, before any work."""

import pytest

from freemerge.pipeline import ExpertsSettings, MergeSettings, PretrainSettings


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


def test_density_is_a_share() -> None:
    with pytest.raises(ValueError, match=r"experts\.density: must be in \(0, 1\], got 1\.5"):
        ExpertsSettings(density=1.5)
