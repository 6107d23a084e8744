"""Different methods for different tensors."""

from dataclasses import dataclass, replace

import pytest
import torch
import yaml

from freemerge.cli.merge import build_parser
from freemerge.merging import (
    Dare,
    FRMerging,
    HighPass,
    MergeError,
    MergeMethod,
    NyquistDisc,
    PCBMerging,
    PerPattern,
    TaskArithmetic,
    Ties,
    WeightAverage,
    merge,
)


def test_each_method_sees_its_own_tensors(base, models):
    default, inner = PCBMerging(0.5), Ties(0.3)
    merged = merge(base, models, PerPattern(default, {"*.bias": WeightAverage(), "conv.*": inner}))
    parts = {
        "norm.bias": merge(base, models, WeightAverage()),
        "conv.weight": merge(base, models, inner, include=["conv.*"]),
        "embed.weight": merge(base, models, default, include=["embed.*", "temperature"]),
        "temperature": merge(base, models, default, include=["embed.*", "temperature"]),
    }
    for name, expected in parts.items():
        assert torch.equal(merged[name], expected[name]), name


def test_the_first_matching_pattern_applies(base, models):
    method = PerPattern(WeightAverage(), {"embed.weight": TaskArithmetic(1.0), "*.weight": TaskArithmetic(0.0)})
    merged = merge(base, models, method)
    assert torch.equal(merged["conv.weight"], base["conv.weight"])
    assert torch.equal(merged["embed.weight"], merge(base, models, TaskArithmetic(1.0))["embed.weight"])


def test_chunks_only_if_every_method_accepts_them():
    assert PerPattern(PCBMerging(), {"a": WeightAverage()}).elementwise
    assert not PerPattern(PCBMerging(), {"a": FRMerging()}).elementwise


def test_errors(base, models):
    method = PerPattern(WeightAverage(), {"*.weight": Ties(), "conv.weight": Ties()})
    with pytest.raises(
        MergeError, match=r"overrides: the pattern 'conv\.weight' matches no tensor that is left by earlier patterns"
    ):
        merge(base, models, method)
    with pytest.raises(MergeError, match="TaskArithmetic has 2 values in `scale` for 3 fine-tuned models"):
        merge(base, models, PerPattern(WeightAverage(), {"*.weight": TaskArithmetic([1, 2])}))
    with pytest.raises(ValueError, match="PerPattern: expected a MergeMethod, got 'Ties'"):
        PerPattern(WeightAverage(), {"*": "Ties"})
    with pytest.raises(ValueError, match="not a valid regular expression"):
        PerPattern(WeightAverage(), {"re:(": Ties()})


def test_from_yaml(tmp_path):
    config = """
base: a
finetuned: [b]
output: c
method:
  class_path: PerPattern
  init_args:
    default: {class_path: FRMerging, init_args: {filter: {class_path: HighPass, init_args: {cutoff: 0.1}}}}
    overrides:
      "*.bias": {class_path: WeightAverage}
      "re:.*norm.*": {class_path: TaskArithmetic, init_args: {scale: 0.5}}
"""
    (tmp_path / "m.yaml").write_text(config)
    parser = build_parser()
    parsed = parser.parse_args(["--config", str(tmp_path / "m.yaml")])
    method = parser.instantiate_classes(parsed).method
    expected = {"*.bias": WeightAverage(), "re:.*norm.*": TaskArithmetic(0.5)}
    assert method == PerPattern(FRMerging(HighPass(0.1)), expected)
    assert yaml.safe_load(parser.dump(parsed))["method"]["init_args"]["overrides"]["*.bias"]


def test_overrides_change_parameters_for_some_tensors(base, models):
    merged = merge(base, models, FRMerging(), overrides=[{"match": "embed.*", "scale": 0.5, "filter.radius": 0.3}])
    changed = merge(base, models, FRMerging(NyquistDisc(0.3), scale=0.5))
    plain = merge(base, models, FRMerging())
    for name in base:
        assert torch.equal(merged[name], (changed if name.startswith("embed") else plain)[name]), name


@pytest.mark.parametrize("method", [PCBMerging(0.3), Ties(0.4), Dare(Ties(0.4), 0.5), FRMerging(coefficients="mean")])
def test_overriding_the_scale_keeps_statistics_of_the_whole_model(base, models, method):
    merged = merge(base, models, method, overrides=[{"match": "embed.*", "scale": 0.25}])
    plain, quarter = merge(base, models, method), merge(base, models, replace(method, scale=0.25))
    for name in base:
        assert torch.equal(merged[name], (quarter if name.startswith("embed") else plain)[name]), name


def test_overriding_a_statistics_parameter_collects_over_its_own_tensors(base, models):
    merged = merge(base, models, Ties(0.4), overrides=[{"match": "embed.*", "density": 0.1}])
    embed = merge(base, models, Ties(0.1), include=["embed.*"])
    assert torch.equal(merged["embed.weight"], embed["embed.weight"])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([{"match": "*", "scal": 1}], r"overrides\[0\]: Ties has no parameter 'scal'; did you mean 'scale'\?"),
        (
            [{"match": "*", "filter.cutoff": 1}],
            r"overrides\[0\]: Ties has no parameter 'filter'; it has density",
        ),
        ([{"match": "*", "scale.x": 1}], r"overrides\[0\]: float has no parameters, so no 'x'"),
        ([{"scale": 1}], r"overrides\[0\]: needs a pattern"),
        ([{"match": "*"}], r"overrides\[0\]: names no parameter to change"),
        ([{"match": "a", "scale": 1}, {"match": "a", "scale": 2}], r"overrides\[1\]: the pattern 'a' is given twice"),
        ([{"match": "*", "density": 2}], r"Ties: `density` must lie in \(0, 1\], got 2"),
    ],
)
def test_invalid_overrides(base, models, overrides, message):
    with pytest.raises(ValueError, match=message):
        merge(base, models, Ties(), overrides=overrides)


def test_equal_statistics_keys_mean_equal_statistics():
    assert PCBMerging(0.1, 1.0).statistics_key == PCBMerging(0.1, [1.0, 2.0]).statistics_key
    assert PCBMerging(0.1).statistics_key != PCBMerging(0.2).statistics_key
    assert PCBMerging(filter=HighPass(0.1)).statistics_key != PCBMerging(filter=HighPass(0.2)).statistics_key
    assert Dare(Ties(0.1, scale=2.0)).statistics_key == Dare(Ties(0.1), scale=3.0).statistics_key
    assert Dare(Ties(), seed=1).statistics_key != Dare(Ties(), seed=2).statistics_key
    assert TaskArithmetic(0.1).statistics_key != WeightAverage().statistics_key
    hash(PerPattern(PCBMerging(), {"*": FRMerging(coefficients=[1.0])}).statistics_key)


def test_methods_without_statistics_fields_share_only_with_equal_methods():
    @dataclass(frozen=True)
    class Silent(MergeMethod):
        scale: float = 1.0

        def combine(self, name, deltas, statistics):
            return deltas[0]

    class Plain(MergeMethod):
        def combine(self, name, deltas, statistics):
            return deltas[0]

    assert Silent(1.0).statistics_key == Silent(1.0).statistics_key != Silent(2.0).statistics_key
    assert Plain().statistics_key != Plain().statistics_key
