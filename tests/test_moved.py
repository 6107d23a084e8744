"""Old names of modules and classes in saved configurations and programs resolve to the present ones."""

import subprocess
import sys
from importlib import import_module

import pytest

from freemerge import moved


@pytest.mark.parametrize("name", sorted(moved._MOVED))
def test_every_old_module_is_the_new_one(name):
    assert import_module(f"freemerge.{name}") is import_module(f"freemerge.{moved._MOVED[name]}")


def test_modules_of_a_moved_package_are_not_loaded_twice():
    old, new = (import_module(f"freemerge.checkpoints.{room}adapters.lora") for room in ("", "formats."))
    assert old is new


@pytest.mark.parametrize(("room", "name"), sorted(moved._MOVED_NAMES))
def test_every_old_name_is_the_new_one(room, name):
    home, current = moved._MOVED_NAMES[room, name]
    assert getattr(import_module(room), name) is getattr(import_module(home), current)


def test_a_class_renamed_in_a_module_that_moved_is_found_by_its_old_path():
    from freemerge.models.familiarity import Familiarity

    from freemerge.models.out_of_distribution import OutOfDistributionScore

    assert Familiarity is OutOfDistributionScore


def test_unknown_names_do_not_exist():
    with pytest.raises(ModuleNotFoundError, match=r"No module named 'freemerge\.merging\.nothing'"):
        import_module("freemerge.merging.nothing")
    with pytest.raises(AttributeError, match=r"module 'freemerge\.data' has no attribute 'Nothing'"):
        _ = import_module("freemerge.data").Nothing


def test_an_old_class_path_on_the_command_line(tmp_path):
    """A class path from an earlier version's configuration, in a process that has imported nothing."""
    from safetensors.torch import save_file
    from torch import ones, zeros

    save_file({"w": zeros(2)}, tmp_path / "base.safetensors")
    save_file({"w": ones(2)}, tmp_path / "tuned.safetensors")
    (tmp_path / "merge.yaml").write_text(
        "method: {class_path: freemerge.merging.task_arithmetic.TaskArithmetic, init_args: {scale: 0.5}}\n"
        "base: base.safetensors\nfinetuned: [tuned.safetensors]\noutput: merged.safetensors\n"
    )
    command = [sys.executable, "-m", "freemerge", "merge", "--config", "merge.yaml"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
