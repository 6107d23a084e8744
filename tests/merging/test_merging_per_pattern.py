"""Different methods for different tensors."""

import pytest
import torch
import yaml

from freemerge.merging import (
    FRMerging,
    HighPass,
    MergeError,
    PCBMerging,
    PerPattern,
    TaskArithmetic,
    Ties,
    WeightAverage,
    merge,
)
from freemerge.merging.command import build_parser


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


def test_the_first_pattern_counts(base, models):
    method = PerPattern(WeightAverage(), {"embed.weight": TaskArithmetic(1.0), "*.weight": TaskArithmetic(0.0)})
    merged = merge(base, models, method)
    assert torch.equal(merged["conv.weight"], base["conv.weight"])
    assert torch.equal(merged["embed.weight"], merge(base, models, TaskArithmetic(1.0))["embed.weight"])


def test_pieces_only_if_every_method_takes_them():
    assert PerPattern(PCBMerging(), {"a": WeightAverage()}).elementwise
    assert not PerPattern(PCBMerging(), {"a": FRMerging()}).elementwise


def test_errors(base, models):
    method = PerPattern(WeightAverage(), {"*.weight": Ties(), "conv.weight": Ties()})
    with pytest.raises(MergeError, match=r"overrides: the pattern 'conv\.weight' matches no tensor that is left to it"):
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
