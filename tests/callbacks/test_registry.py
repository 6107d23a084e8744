"""MergeAtFitEnd with a folder that several jobs share: the last job to finish merges all models."""

import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from freemerge.checkpoints import hash_tensors, load_checkpoint, save_checkpoint
from freemerge.checkpoints.formats.task_files import TaskRecord, read_record
from freemerge.merging import TaskArithmetic, WeightAverage, merge
from freemerge_callbacks import MergeAtFitEnd, MultiTaskEvaluation
from freemerge_callbacks import _registry as registries
from freemerge_callbacks._registry import Registry
from tests import processes
from tests.callbacks.callbacks_project import Plain, make_backbone, make_loader, make_trainer

METHOD = TaskArithmetic(scale=[0.5, 0.3, 0.2])
ALONE = SimpleNamespace(is_global_zero=True, strategy=SimpleNamespace(broadcast=lambda value: value))


def job(folder, task, tasks=("a", "b", "c"), method=METHOD, **arguments):
    tasks = list(tasks) if isinstance(tasks, tuple) else tasks
    output = str(folder / "merged.safetensors")
    return MergeAtFitEnd(method, output=output, registry=str(folder / "shared"), task=task, tasks=tasks, **arguments)


def fit(folder, callback, feature=0, *more, module=None, ckpt_path=None, **arguments):
    module = module or Plain()
    make_trainer(folder, callback, *more, **arguments).fit(module, make_loader(feature), ckpt_path=ckpt_path)
    return {name: value.detach() for name, value in module.backbone.state_dict().items()}


@pytest.mark.parametrize("tasks", [("a", "b", "c"), 3])
def test_the_last_job_merges_them_all_in_one_order(tmp_path, tasks):
    trained = {}
    for feature, task in enumerate("cab"):
        callback = job(tmp_path, task, tasks)
        trained[task] = fit(tmp_path, callback, feature)
        last = task == "b"
        assert callback.merged_path == (tmp_path / "merged.safetensors" if last else None)
        assert (callback.report != {}) is last
    merge(make_backbone(), {task: trained[task] for task in "abc"}, METHOD, output=tmp_path / "one.safetensors")
    assert (tmp_path / "one.safetensors").read_bytes() == callback.merged_path.read_bytes()
    assert [model["name"] for model in callback.report["finetuned"]] == ["a", "b", "c"]
    record = read_record(tmp_path / "shared" / "b.safetensors")
    assert record == TaskRecord("b", "weights", hash_tensors(make_backbone().state_dict()), record.seed, {})
    left = sorted(path.name for path in (tmp_path / "shared").iterdir())
    assert left == [".lock", "a.safetensors", "b.safetensors", "c.safetensors"]  # no kept base


def test_others_in_addition_to_a_registry_and_the_evaluation_of_the_last_job(tmp_path, other):
    loaders = {"x": make_loader(0, 50, seed=5)}
    results = []
    for task in ("a", "b"):
        callback = job(tmp_path, task, ("a", "b"), WeightAverage(), others=[str(other)])
        evaluation = MultiTaskEvaluation(loaders)
        fit(tmp_path, callback, 0, evaluation)
        results.append(evaluation.results)
    assert [model["name"] for model in callback.report["finetuned"]] == ["a", "b", str(other)]
    assert set(results[0]) == set(results[1]) == {"x"}  # the first job has evaluated its own weights


def finish(folder, task, names, start):
    """What a job does when its fit ends; writes a file if it has merged."""
    registry = Registry(str(folder), task, names, "Somebody")
    weights = {"w": torch.full((1000,), float(names.index(task)))}
    start.wait()
    with registry.turn(ALONE):
        registry.register(TaskRecord(task, "weights", "h", None, {}), weights, False)
        if not registry.missing():
            merged = merge({"w": torch.zeros(1000)}, registry.registered(), WeightAverage())
            save_checkpoint(folder / f"merged-by-{task}.ckpt.safetensors", merged)


def test_jobs_that_finish_at_the_same_time(tmp_path):
    """Each job registers and checks whether it is the last; exactly one is, after all have registered."""
    context, names = processes.forkserver(), [f"t{index}" for index in range(6)]
    start = context.Barrier(len(names))
    jobs = [context.Process(target=finish, args=(tmp_path, name, names, start)) for name in names]
    for each in jobs:
        each.start()
    for each in jobs:
        each.join(60)
    assert [each.exitcode for each in jobs] == [0] * len(names)
    (merged,) = tmp_path.glob("merged-by-*")
    assert torch.equal(load_checkpoint(merged)["w"], torch.full((1000,), 2.5))


HOLD = """
import sys, time
from filelock import FileLock
with FileLock(sys.argv[1]):
    print("held", flush=True)
    time.sleep(600)
"""


def test_a_job_that_dies_while_it_merges_blocks_no_other(tmp_path, monkeypatch):
    fit(tmp_path, job(tmp_path, "a", ("a", "b"), WeightAverage()))
    lock = tmp_path / "shared" / ".lock"
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(lock)], stdout=subprocess.PIPE)
    holder.stdout.readline()
    monkeypatch.setattr(registries, "_LONGEST_WAIT", 0.2)
    with pytest.raises(RuntimeError, match=r"another job has held .*\.lock for 0 minutes; end it if it hangs"):
        fit(tmp_path, job(tmp_path, "b", ("a", "b"), WeightAverage()))
    monkeypatch.setattr(registries, "_LONGEST_WAIT", 60)
    threading.Thread(target=lambda: (time.sleep(0.3), holder.kill())).start()
    last = job(tmp_path, "b", ("a", "b"), WeightAverage())
    fit(tmp_path, last)
    holder.wait()
    holder.stdout.close()
    assert last.merged_path.exists()


def test_a_job_that_died_after_it_registered_resumes(tmp_path):
    """Its merge failed, for instance because of a full disk; resumed from its last checkpoint, the job merges."""
    fit(tmp_path, job(tmp_path, "a", ("a", "b"), WeightAverage()))
    last = job(tmp_path, "b", ("a", "b"), WeightAverage())
    checkpoint = ModelCheckpoint(dirpath=tmp_path / "ckpt", save_last=True)

    def fail(*_):
        raise OSError("disk full")

    last._write = fail
    with pytest.raises(OSError, match="disk full"):
        fit(tmp_path, last, 1, checkpoint, enable_checkpointing=True)
    assert (tmp_path / "shared" / "b.safetensors").exists()
    fresh = job(tmp_path, "b", ("a", "b"), WeightAverage())
    with pytest.raises(ValueError, match=r"'b' is already registered .*; set overwrite=True"):
        fit(tmp_path, fresh)
    fit(tmp_path, fresh, 1, ckpt_path=tmp_path / "ckpt" / "last.ckpt")
    assert fresh.merged_path.exists()


def test_another_base_is_refused_before_training(tmp_path):
    fit(tmp_path, job(tmp_path, "a"))
    torch.manual_seed(99)
    stranger = Plain(torch.nn.Sequential(*[torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 8)]))
    stranger.training_step = lambda *_: pytest.fail("training began")
    with pytest.raises(ValueError, match=r"a.safetensors was fine-tuned from another base than this fit"):
        fit(tmp_path, job(tmp_path, "b"), module=stranger)


def test_two_jobs_with_the_same_task(tmp_path):
    record = TaskRecord("a", "weights", "h", None, {})
    registry = Registry(str(tmp_path), "a", 2, "Somebody")
    registry.register(record, {"w": torch.zeros(3)}, False)
    registry.register(record, {"w": torch.zeros(3)}, False)  # a second callback of the same fit has the same weights
    with pytest.raises(ValueError, match=r"another job has registered the task 'a' in .* since this fit began"):
        registry.register(record, {"w": torch.ones(3)}, False)
    registry.register(record, {"w": torch.ones(3)}, True)
    assert torch.equal(load_checkpoint(registry.path)["backbone.w"], torch.ones(3))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"task": "d"}, "the task 'd' is not among `tasks`: a, b, c"),
        ({"task": "x/y"}, "a valid file name"),
        ({"tasks": 0}, "at least 1"),
        ({"tasks": ("a", "a")}, "names one task twice"),
        ({"tasks": 1, "task": "z"}, r"already holds 1 tasks \(a\) of the 1 expected"),
        ({"method": TaskArithmetic(scale=[1.0, 1.0])}, "2 values in `scale` for 3"),
    ],
)
def test_mistakes_are_found_before_training(tmp_path, arguments, message):
    Registry(str(tmp_path / "shared"), "a", 3, "x").register(
        TaskRecord("a", "weights", "h", None, {}), make_backbone().state_dict(), False
    )
    module = Plain()
    module.training_step = lambda *_: pytest.fail("training began")
    with pytest.raises(ValueError, match=message):
        fit(tmp_path, job(tmp_path, **{"task": "b", **arguments}), module=module)


def test_a_registry_needs_its_names():
    with pytest.raises(ValueError, match="a registry needs `task`"):
        MergeAtFitEnd(METHOD, registry="shared")
    with pytest.raises(ValueError, match="are for a registry"):
        MergeAtFitEnd(METHOD, others=["a"], task="a")
