"""The README's examples run as printed, YAML builds every callback, and --help describes every argument."""

import re
from pathlib import Path

import jsonargparse
import lightning as L
import pytest
import yaml
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint

import freemerge_callbacks
from freemerge import merging
from freemerge.checkpoints import load_checkpoint
from freemerge.data import QuickstartSuite
from freemerge_callbacks import MergeAtFitEnd, MergePreview, MultiTaskEvaluation, TaskCheckpoint
from tests import processes

README = Path(__file__).parents[2] / "callbacks" / "README.md"
EXAMPLES = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)
# In addition to Lightning, importing the callbacks loads only what merging needs and the base class of suites.
IMPORTS = """
import sys, lightning
before = set(sys.modules)
import freemerge_callbacks
from tests import processes
found = {".".join(name.split(".")[:2]) for name in set(sys.modules) - before if "callbacks" not in name}
rooms = ("checkpoints", "data", "errors", "inputs", "merging", "moved", "names", "runtime", "tensors")
assert found == {"freemerge", *("freemerge." + room for room in rooms)}, found
"""
NAMES = {
    **{name: getattr(module, name) for module in (freemerge_callbacks, merging) for name in module.__all__},
    **{"L": L, "ModelCheckpoint": ModelCheckpoint, "EarlyStopping": EarlyStopping, "val": {}, "heads": {}},
}
YAML = """
- class_path: freemerge_callbacks.MergeAtFitEnd
  init_args:
    method:
      class_path: freemerge.merging.PCBMerging
      init_args: {ratio: 0.2}
    others: [runs/*/backbone.safetensors]
    output: merged.safetensors
    exclude: [head.*]
- class_path: MultiTaskEvaluation
  init_args:
    loaders:
      class_path: freemerge.data.QuickstartSuite
      init_args: {tasks: [digits], seed: 3}
    heads: {digits: runs/digits/head.safetensors}
    every_n_epochs: 2
- class_path: TaskCheckpoint
  init_args: {output: tasks/a.safetensors, task: a, save: task_vector, head: null}
- class_path: MergePreview
  init_args:
    method: {class_path: TaskArithmetic, init_args: {scale: [1.0, 0.5]}}
    base: base.safetensors
    others: [b.safetensors]
    loaders: {class_path: QuickstartSuite}
"""


def test_the_first_example_is_a_whole_project(tmp_path):
    assert len(EXAMPLES[0].splitlines()) <= 40
    done = processes.run("-c", IMPORTS + EXAMPLES[0], cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    path, results = done.stdout.strip().splitlines()[-1].split(" ", 1)
    assert list(load_checkpoint(tmp_path / path)) == ["0.weight", "0.bias", "2.weight", "2.bias"]
    accuracies = [float(number) for number in re.findall(r"0\.\d+", results)]
    assert len(accuracies) == 2
    assert min(accuracies) > 0.75  # by chance: 0.5


@pytest.mark.parametrize("example", EXAMPLES[1:])
def test_the_other_examples_are_valid(example, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(example, dict(NAMES))


def instantiate(callbacks):
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("--callbacks", type=list[Callback])
    return parser.instantiate_classes(parser.parse_object({"callbacks": callbacks})).callbacks


def test_the_yaml_of_the_readme():
    (text,) = re.findall(r"```yaml\n(.*?)```", README.read_text(), flags=re.DOTALL)
    merge, evaluation = instantiate(yaml.safe_load(text)["trainer"]["callbacks"])
    assert merge.method == merging.FRMerging(scale=0.7)
    assert list(evaluation.evaluation.heads) == list(evaluation.evaluation.loaders.names)


def test_yaml_by_class_path():
    merge, evaluation, keep, preview = instantiate(yaml.safe_load(YAML))
    assert isinstance(merge, MergeAtFitEnd)
    assert merge.method == merging.PCBMerging(ratio=0.2)
    assert merge.others == ["runs/*/backbone.safetensors"]
    assert merge.exclude == ["head.*"]
    assert isinstance(evaluation, MultiTaskEvaluation)
    assert isinstance(evaluation.evaluation.loaders, QuickstartSuite)
    assert evaluation.evaluation.loaders.names == ("digits",)
    assert evaluation.evaluation.heads == {"digits": "runs/digits/head.safetensors"}
    assert evaluation.merged == "auto"
    assert isinstance(keep, TaskCheckpoint)
    assert keep.head is None
    assert isinstance(preview, MergePreview)
    assert preview.method == merging.TaskArithmetic(scale=[1.0, 0.5])


def test_mistakes_in_yaml_are_named():
    with pytest.raises(jsonargparse.ArgumentError, match="sead"):
        instantiate(yaml.safe_load(YAML.replace("seed: 3", "sead: 3")))


@pytest.mark.parametrize("name", freemerge_callbacks.__all__)
def test_every_argument_has_its_help(name):
    parser, found = jsonargparse.ArgumentParser(), getattr(freemerge_callbacks, name)
    add = parser.add_class_arguments if isinstance(found, type) else parser.add_function_arguments
    add(found, None)
    undocumented = [action.dest for action in parser._actions if action.dest != "help" and not action.help]
    assert undocumented == []
